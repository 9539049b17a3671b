from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import Sequences, ToyLM, loader, trainer

from thanos_lightning import CalibrationOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.checkpoints.format import Size
from thanos_lightning.event.targets import Targets
from thanos_lightning.fit import announce
from thanos_lightning.fit.announce import describe
from thanos_lightning.layers.census import Census
from thanos_lightning.plan.estimate import Batches, Estimate
from thanos_lightning.plan.schedule import Event
from thanos_lightning.solver import NM, Pattern, Unstructured

SMOLLM = Census(210, 211, "Linear", 106_168_320, 134_515_008, {"embeddings": 28_311_552, "lm_head": 0, "norms": 35_136})
ESTIMATED = Estimate((), 128, 384 * 2**20, 901 * 2**20, 101 * 2**20)
UNKNOWN = Estimate((), None, 2**31, 2**32, 0)
A_SET = CalibrationOptions("datamodule")
FEW = [Event(4, 0.5), Event(8, 0.75), Event(12, 1.0)]


def described(
    estimated: Estimate = ESTIMATED,
    *,
    calibration: CalibrationOptions = A_SET,
    patterns: Sequence[Pattern] = (NM(2, 4),),
    census: Census = SMOLLM,
    events: Sequence[Event] = (Event(0, 1.0),),
    steps: int | None = 40,
    steps_taken: int = 0,
) -> str:
    options = ThanosPruningCallback("2:4", calibration=calibration).options
    taken = Targets({}, {f"layer {number}": pattern for number, pattern in enumerate(patterns)})
    dense = Size(census.model_weights, 4.0)
    text = describe(options, taken, census, estimated, events, dense=dense, steps=steps, steps_taken=steps_taken)
    assert max(map(len, text.splitlines())) <= 80
    return text


def pruning(*at: int, pattern: str = "2:4", sparsity: float | None = None) -> ThanosPruningCallback:
    return ThanosPruningCallback(pattern, sparsity, SparsitySchedule(at=at), calibration=CalibrationOptions(steps=2))


def gradual() -> ThanosPruningCallback:
    return pruning(2, 4, 6, pattern="unstructured", sparsity=0.5)


def test_one_block_says_what_when_and_what_it_takes() -> None:
    assert described().splitlines() == [
        "Pruning 210 of 211 Linear layers to 2:4",
        "  weights 106.2 of 134.5 M, 79% of the model",
        "  dense   embeddings (21%), norms, lm_head",
        "  export  134.5 M weights; 0.50 GiB in float32, half in bfloat16; faster only",
        "          with a kernel for 2:4",
        "  events  pruned once, before the first of 40 steps, on 128 calibration batches",
        "  memory  about: the inputs' statistics 384 MiB, an event 901 MiB in all, keep",
        "          masks 101 MiB",
    ]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            {"census": replace(SMOLLM, adapters=600_000, num_adapted=30)},
            "lora 0.6 M weights of adapters, masked; 30 of 210 layers to prune have one; an export merges them",
        ),
        (
            {"estimated": replace(ESTIMATED, batches=32), "calibration": CalibrationOptions(), "events": FEW},
            "after optimizer steps 4, 8, 12 of 40, to 25%, 38%, 50%, on 32 training batches before each",
        ),
        (
            {"events": [Event(step, step / 10) for step in range(1, 11)], "steps": None},
            "events pruned 10 times, after optimizer steps 1, 2, …, 10, to 5%, 10%, …, 50%",
        ),
        ({"patterns": [NM(2, 4), NM(2, 4), Unstructured(0.6)]}, "to 2:4 (2), unstructured 0.6 (1)"),
        ({"estimated": UNKNOWN}, "once, before the first of 40 steps, on calibration batches"),
        ({"estimated": UNKNOWN}, "about: the inputs' statistics 2.0 GiB, an event 4.0 GiB in all"),
    ],
)
def test_what_is_said_of_others(told: dict[str, Any], words: str) -> None:
    assert words in " ".join(described(**told).split())


def test_nothing_is_said_of_memory_where_all_is_done() -> None:
    text = described(events=[Event(4, 1.0)], steps_taken=6)
    assert "all are done after 6 optimizer steps" in text
    assert "memory" not in text


def test_tokens_are_counted_without_a_batch() -> None:
    assert Batches.of(loader(32, 4)) == Batches(8, 4 * 16, 16)
    assert Batches.of(list(loader(32, 4))) == Batches(8, 4 * 16, 16)
    features = [(torch.zeros(4, 8), torch.zeros(4, dtype=torch.long))]  # no tokens
    assert Batches.of(features) == Batches(1, None, None)
    assert Batches.of(iter([])) == Batches(None, None, None)

    class Random(Sequences):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            torch.rand(3)
            return super().__getitem__(index)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert Batches.of(DataLoader(Random(8), batch_size=2)) == Batches(4, 32, 16)
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_begins_with_it_and_ends_with_what_it_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback, saving = pruning(4), ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=6)
    trainer(tmp_path, callback, saving, max_steps=6, enable_checkpointing=True).fit(ToyLM(), loader())
    told = capsys.readouterr().out
    assert "Pruning 14 of 15 Linear layers to 2:4" in told
    assert "pruned once, after optimizer step 4 of 6, on 2 training batches before\n          it\n" in told
    assert told.index("memory  about") < told.index("Pruned at optimizer step 4")
    assert f"next        thanos-lightning export {tmp_path / 'last.ckpt'} exported" in told
    summary = callback.report.summary
    assert 0 < summary.target_weights < summary.model_weights
    assert [step for step, _ in callback.report.history.losses] == [1, 2, 3, 4, 5, 6]
    took = summary.event_seconds + summary.collecting_seconds
    assert callback.report.events[0].seconds == pytest.approx(took)
    assert 0 < min(summary.event_seconds, summary.collecting_seconds) < took < summary.training_seconds
    assert f"Pruning took {took / summary.training_seconds:.1%} of" in told


def test_little_of_a_model_is_said(tmp_path: Path) -> None:
    lm = ToyLM()
    lm.add_module("vision", nn.Conv2d(64, 256, 3))
    with pytest.warns(UserWarning, match=r"only .*% of the model's weights .* left out are Conv2d \(8"):
        trainer(tmp_path, pruning(2), max_steps=3).fit(lm, loader())


def test_all_events_count_while_only_a_scan_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again, estimate = [], announce.estimate
    monkeypatch.setattr(announce, "estimate", lambda *args, **kw: again.append(args[-1].again) or estimate(*args, **kw))
    trainer(tmp_path, gradual(), max_steps=8).fit(ToyLM(), loader(48))
    assert set(again) == {True}


def test_an_event_that_is_done_is_not_announced_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    trainer(tmp_path, gradual(), saving, max_steps=8, enable_checkpointing=True).fit(ToyLM(), loader(48))
    (saved,) = tmp_path.glob("*step=4.ckpt")
    assert "after optimizer steps 2, 4, 6 of 8" in capsys.readouterr().out
    trainer(tmp_path, gradual(), max_steps=8).fit(ToyLM(), loader(48), ckpt_path=saved, weights_only=True)
    assert "once, after optimizer step 6 of 8" in capsys.readouterr().out
