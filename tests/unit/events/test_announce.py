from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ToyLM, loader, trainer

from thanos_lightning import SparsitySchedule, ThanosPruningCallback
from thanos_lightning.events import announce


def gradual() -> ThanosPruningCallback:
    return ThanosPruningCallback("unstructured", 0.5, SparsitySchedule(at=[2, 4, 6]))


def test_all_events_count_while_only_a_scan_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again, needs = [], announce.needs
    monkeypatch.setattr(announce, "needs", lambda *args, **kw: again.append(kw["again"]) or needs(*args, **kw))
    trainer(tmp_path, gradual(), max_steps=8).fit(ToyLM(), loader(48))
    assert again == [True]


def test_an_event_that_is_done_is_not_announced_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    trainer(tmp_path, gradual(), saving, max_steps=8, enable_checkpointing=True).fit(ToyLM(), loader(48))
    (saved,) = tmp_path.glob("*step=4.ckpt")
    assert "after optimizer steps 2, 4, 6 of 8" in capsys.readouterr().out
    trainer(tmp_path, gradual(), max_steps=8).fit(ToyLM(), loader(48), ckpt_path=saved, weights_only=True)
    assert "once, after optimizer step 6 of 8" in capsys.readouterr().out
