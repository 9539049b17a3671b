"""Trained checkpoints and exported folders, whole or damaged, for the tests of export and verification."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import GROUPED, ToyLM, grouped, loader, tiny_gpt2, tiny_llama, trainer
from transformers import LlamaForCausalLM

from thanos_lightning import SparsitySchedule, ThanosPruningCallback
from thanos_lightning.checkpoints.export import export_checkpoint
from thanos_lightning.checkpoints.verify import TensorReport
from thanos_lightning.ranks.masks import LayerMask, pack_bits

SIZES: dict[str, Any] = {  # of a configuration of any family
    **GROUPED,
    "num_attention_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
PRUNED = {"llama": "model.layers.1.mlp.up_proj.weight", "gpt2": "transformer.h.1.mlp.c_fc.weight"}
names = pytest.mark.parametrize("name", ["llama", "gpt2"])


def untied_llama(**config: Any) -> LlamaForCausalLM:
    return tiny_llama(tie_word_embeddings=False, **config)


def train(folder: Path, module: ToyLM, *, steps: int = 3, resume: Path | None = None, **arguments: Any) -> Path:
    """A checkpoint of a real training, pruned after the first step."""
    pruning = ThanosPruningCallback(
        **grouped(**{"pattern": "2:4", "method": "magnitude", "admm_steps": 0, "refine_steps": 0} | arguments),
        schedule=SparsitySchedule(1, 1, 1),
    )
    fitting = trainer(folder, pruning, max_steps=steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitting.fit(module, loader(8), ckpt_path=resume)
        fitting.save_checkpoint(folder / "trained.ckpt")
    return folder / "trained.ckpt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ToyLM, Path]]:
    """Llama (untied head) and GPT-2 (tied head, Conv1D): module and checkpoint, not to be written to."""
    modules = {"llama": ToyLM(untied_llama()), "gpt2": ToyLM(tiny_gpt2())}
    return {name: (module, train(tmp_path_factory.mktemp(name), module)) for name, module in modules.items()}


@pytest.fixture(scope="module")
def exported(trained: dict[str, tuple[ToyLM, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both of them as folders, not to be written to."""
    folders = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (_, checkpoint) in trained.items():
            folders[name] = tmp_path_factory.mktemp("exported") / name
            export_checkpoint(checkpoint, folders[name])
    return folders


def change_checkpoint(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = torch.load(source, weights_only=True)
    change(content)
    torch.save(content, target)
    return target


@pytest.fixture
def changed(trained: dict[str, tuple[ToyLM, Path]], tmp_path: Path) -> Callable[..., Path]:
    """Makes a.ckpt, which is one of the two checkpoints with a change."""

    def make(change: Callable[[dict[str, Any]], object], name: str = "llama") -> Path:
        return change_checkpoint(trained[name][1], tmp_path / "a.ckpt", change)

    return make


def state_of(content: dict[str, Any]) -> dict[str, Any]:
    """The callback's state."""
    state: dict[str, Any] = content["callbacks"]["ThanosPruningCallback"]
    return state


def _flip(content: dict[str, Any], *, kept: bool) -> None:
    """Let one entry of a mask be pruned that was kept, or the other way round."""
    mask = state_of(content)["masks"][f"model.{PRUNED['llama']}"]
    keep = LayerMask.from_state(mask).keep
    keep.view(-1)[keep.view(-1).eq(kept).nonzero()[0]] = not kept
    mask["bits"] = pack_bits(keep)


def _narrow(content: dict[str, Any]) -> None:
    state = content["optimizer_states"][0]["state"]
    index = next(index for index, entry in state.items() if tuple(entry["exp_avg"].shape) == (48, 32))
    state[index]["exp_avg"] = state[index]["exp_avg"][:, :8].clone()


# What is no accident, since its checksums are right -> how it is done to a llama's checkpoint, and what is said
CHANGED_MASKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "one entry kept": (lambda content: _flip(content, kept=False), "1 more entries than|prunes 767 entries"),
    "one entry pruned": (lambda content: _flip(content, kept=True), "prunes 769 entries, recorded were 768"),
    "one mask missing": (
        lambda content: state_of(content)["masks"].pop(f"model.{PRUNED['llama']}"),
        "mask of model.model.layers.1.mlp.up_proj.weight, of 768 pruned entries, is missing",
    ),
    "all masks missing": (lambda content: state_of(content)["masks"].clear(), "of 512 pruned entries, is missing"),
    "other weights": (
        lambda content: content["state_dict"][f"model.{PRUNED['llama']}"].fill_(1.0),
        "768 pruned entries|768 of 768 pruned entries",
    ),
    "a moment of another shape": (_narrow, r"moment exp_avg of .* has shape \(48, 8\), the parameter has \(48, 32\)"),
}


def change_a_byte(file: Path, at: float | None = None) -> None:
    """At this fraction of a file of torch's, or in the middle of its largest tensor, where torch doesn't notice it."""
    content = bytearray(file.read_bytes())
    if at is None:
        with zipfile.ZipFile(file) as archive:  # which stores tensors as they are
            largest = max((archive.read(name) for name in archive.namelist() if "/data/" in name), key=len)
        place = content.index(largest) + len(largest) // 2
    else:
        place = int(at * len(content))
    content[place] ^= 1
    file.write_bytes(content)


def fill(tensor: Tensor, value: float) -> None:
    """Write to the first entry that is 0."""
    flat = tensor.view(-1)
    flat[flat.eq(0).nonzero()[0]] = value


def failed(reports: Sequence[TensorReport]) -> list[TensorReport]:
    assert reports
    return [report for report in reports if not report.ok]
