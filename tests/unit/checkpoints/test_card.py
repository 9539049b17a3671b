from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import change_checkpoint, state_of
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import VOCABULARY, ToyLM, grouped, loader, save_tiny, trainer
from transformers import AutoModelForCausalLM

from thanos_lightning import SparsitySchedule, ThanosPruningCallback, export_checkpoint
from thanos_lightning.report.data import PruningReport


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of six steps with an event at the fourth, of a model that was loaded from a folder."""
    root = tmp_path_factory.mktemp("trained")
    words = ["<end>", "<unknown>", *(f"w{number}" for number in range(VOCABULARY - 2))]
    module = ToyLM(AutoModelForCausalLM.from_pretrained(save_tiny(root / "secret" / "tiny-llama", words)))
    pruning = ThanosPruningCallback(**grouped(schedule=SparsitySchedule(at=[4]), steps=2, monitor="val/loss"))
    saving = ModelCheckpoint(root, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer(root, pruning, saving, max_steps=6, enable_checkpointing=True).fit(module, loader(64), loader(8))
    return root


def card_of(trained: Path, step: int, out: Path) -> str:
    export_checkpoint(trained / f"step={step}.ckpt", out)
    return (out / "README.md").read_text()


def test_the_card_has_the_metric_of_the_report_and_no_path_of_a_users(trained: Path, tmp_path: Path) -> None:
    summary = PruningReport.read(trained / "pruning_report.json").summary
    assert summary.recovered is not None
    assert summary.recovered != summary.pruned
    card = card_of(trained, 6, tmp_path / "out")
    assert "Made from tiny-llama by" in card
    assert [path.name for path in (tmp_path / "out").iterdir() if b"secret" in path.read_bytes()] == []
    assert "| val/loss | |" in card
    assert f"| before pruning | {summary.dense:.4g} |" in card
    assert f"| right after the last event | {summary.pruned:.4g} |" in card
    assert f"| at the end of the training | {summary.recovered:.4g} |" in card


def test_the_metric_after_the_event_is_not_told_twice(trained: Path, tmp_path: Path) -> None:
    card = card_of(trained, 5, tmp_path / "out")
    assert "| right after the last event |" in card
    assert "at the end" not in card
    assert "optimizer steps |" not in card


def test_a_schedule_may_be_long_and_the_last_metric_be_of_before_the_end(trained: Path, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        state_of(content)["arguments"]["schedule"] = f"SparsitySchedule(at={tuple(range(999))})"
        state_of(content)["report"]["history"]["metrics"].append((5, 20.5))

    export_checkpoint(change_checkpoint(trained / "step=5.ckpt", tmp_path / "a.ckpt", change), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| after 5 optimizer steps | 20.5 |" in card
    assert "997, 998))" in card
