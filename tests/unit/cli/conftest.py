"""A folder for each test, and a tiny training that the commands read, resume and export."""

import os
import shutil
import sys
from pathlib import Path

import pytest

CHECKPOINT = "run/checkpoints/tiny.ckpt"


@pytest.fixture(autouse=True)
def _in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["thanos-lightning"])
    monkeypatch.delenv("THANOS_LIGHTNING_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml, the model tiny, the text text.txt, exported, and run/checkpoints/tiny.ckpt."""
    # here, since pytest-xdist's own process reads this file, too
    from toy import save_tiny

    from thanos_lightning.cli import main

    folder = tmp_path_factory.mktemp("trained")
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 0}
    for name, width, words in (("tiny", 16, "abcdefgh"), ("wide", 32, "abcdefgh"), ("few", 16, "abcd")):
        save_tiny(folder / name, words, hidden_size=width, **sizes)
    shutil.copytree(folder / "tiny", folder / "cut")
    os.truncate(folder / "cut" / "model.safetensors", 900)
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("b c d e f g h " * 40)
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 99)
    (folder / "tiny.yaml").write_text(
        """\
seed_everything: 1
model: {class_path: CausalLM, init_args: {model: tiny, lr_schedule: constant}}
data: {class_path: TextData, init_args: {dataset: text.txt, tokenizer: tiny, block_size: 8, batch_size: 2}}
trainer:
  accelerator: cpu
  max_steps: 2
  num_sanity_val_steps: 0
  limit_val_batches: 0
  logger: false
  default_root_dir: run
  callbacks:
    - class_path: ThanosPruningCallback
      init_args: {solver: {method: magnitude}, schedule: {start_step: 1, end_step: 1, every_n_steps: 1}}
    - class_path: ModelCheckpoint
      init_args: {filename: tiny, every_n_train_steps: 2, enable_version_counter: false}
"""
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["thanos-lightning"])
        assert main(["fit", "--config", "tiny.yaml"]) == 0
        assert main(["export", CHECKPOINT, "exported"]) == 0
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A folder with hf, which was exported, a.ckpt and report.json, all to be damaged; it is the current one."""
    shutil.copytree(trained / "exported", tmp_path / "hf")
    shutil.copy(trained / CHECKPOINT, tmp_path / "a.ckpt")
    shutil.copy(trained / "run" / "pruning_report.json", tmp_path / "report.json")
    for name in ("tiny", "wide", "tiny.yaml", "text.txt"):
        (tmp_path / name).symlink_to(trained / name)
    return tmp_path
