"""What is said of memory before a training, against what its tensors take: on the CPU, and on an accelerator."""

from __future__ import annotations

import gc
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from pretend import pretend_trainer
from torch.profiler import ProfilerActivity, profile, record_function
from toy import ToyLM, grouped, loader, tiny_llama, trainer

from thanos_lightning import SparsitySchedule, ThanosPruningCallback
from thanos_lightning.collect import collector
from thanos_lightning.fit import announce, run
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.plan.estimate import Estimate, Solving, event_bytes
from thanos_lightning.solver.layer import SolverOptions

WIDTHS = {"hidden_size": 128, "intermediate_size": 320}
COUNTED: dict[str, Any] = {"schedule": SparsitySchedule(3, 3, 1), "steps": 1}
A_SET: dict[str, Any] = {"schedule": SparsitySchedule(3, 3, 1), "batches": list(loader(12))}
UNSTRUCTURED: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.6}
CASES: dict[str, dict[str, Any]] = {
    "training batches": {"pattern": "2:4", **COUNTED},
    "a calibration set, scanned": {**UNSTRUCTURED, **A_SET},
    "the paper's": {"pattern": "2:4", "saliency": "wanda", "admm_steps": 0, "refine_steps": 0, **COUNTED},
    "columns": {"pattern": "structured", "sparsity": 0.3, **COUNTED},
}
BY_DEFAULT = ["training batches", "a calibration set, scanned"]  # on an accelerator
TRAINERS = {"cpu": trainer, "accelerator": pretend_trainer}


class Timeline:
    """Bytes that tensors hold, from torch's allocator for the CPU, which has an accelerator's numbers, too."""

    def __init__(self, profiled: profile) -> None:
        events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((one for one in events if one.name() == "[memory]"), key=lambda one: one.start_ns())
        held = itertools.accumulate(one.nbytes() for one in changes)
        self._held = [(one.start_ns(), total) for one, total in zip(changes, held, strict=True)]
        marks = {one.name().removeprefix("mark "): one for one in events if one.name().startswith("mark ")}
        self._marks = {name: (one.start_ns(), one.start_ns() + one.duration_ns()) for name, one in marks.items()}

    def of(self, mark: str) -> tuple[int, int, int]:
        """What is held before it, at most in it, and after it."""
        begin, end = self._marks[mark]
        before, after = ([held for time, held in self._held if time <= moment][-1] for moment in (begin, end))
        return before, max(held for time, held in self._held if begin <= time <= end), after


class Marked(Callback):
    """Marks training steps."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step = record_function(f"mark step {batch_idx + 1}")
        self.step.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.step.__exit__(None, None, None)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Estimate]:
    """What was said, when a training has begun; what prunes and calibrates is marked."""
    estimates: list[Estimate] = []

    def kept(original: Any, *args: Any, **kwargs: Any) -> Estimate:
        estimates.append(original(*args, **kwargs))
        return estimates[-1]

    def marked(original: Any, *args: Any, **kwargs: Any) -> Any:
        with record_function(f"mark {original.__name__}"):
            return original(*args, **kwargs)

    monkeypatch.setattr(announce, "estimate", partial(kept, announce.estimate))
    for place, name in ((run, "prune_window"), (run, "scan_window"), (collector, "count_dataloader")):
        monkeypatch.setattr(place, name, partial(marked, getattr(place, name)))
    return estimates


@pytest.mark.parametrize(
    ("name", "where"),
    [
        pytest.param(name, where, marks=[pytest.mark.rest] if where != "cpu" and name not in BY_DEFAULT else [])
        for name in CASES
        for where in TRAINERS
    ],
)
def test_memory_is_what_was_said(name: str, where: str, tmp_path: Path, told: list[Estimate]) -> None:
    torch.manual_seed(0)
    module, pruning = ToyLM(tiny_llama(**WIDTHS)), ThanosPruningCallback(**grouped(**CASES[name]))
    gc.collect()  # else what other tests have left is freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        TRAINERS[where](tmp_path, Marked(), pruning, max_steps=4).fit(module, loader(32))
    estimated, timeline = told[-1], Timeline(profiled)
    _, training, base = timeline.of("step 2")  # no window is open
    before_event, in_event, _ = timeline.of("prune_window")
    if "batches" in CASES[name]:
        before, collecting, after = timeline.of("count_dataloader")
        assert timeline.of("scan_window")[1] - base < 1.2 * estimated.event
    else:
        before, collecting, after = base, timeline.of("step 3")[1], before_event
    assert collecting - before < 1.2 * (after - before + training - base)
    assert after - before == pytest.approx(estimated.moments + estimated.states, rel=0.02)
    event, waiting = estimated.event + estimated.states, max(window.waiting for window in estimated.windows)
    assert 0.8 * event < in_event - base < 1.2 * (event + waiting)
    assert timeline.of("step 4")[2] - base == pytest.approx(estimated.masks, rel=0.02)


def test_ranks_share_what_an_event_takes() -> None:
    layers = list(find_targets(tiny_llama(**WIDTHS)).values())
    thanos, solving = SolverOptions.as_published(), (Solving(), Solving(again=True), Solving(2))
    alone, again, shared = (event_bytes(layers, thanos, one) for one in solving)
    assert shared < alone < again
    gathered = event_bytes(layers, thanos, Solving(2, in_pieces=True))
    assert shared < gathered < shared + 4 * sum(layer.rows * layer.cols for layer in layers)
    assert event_bytes(layers, SolverOptions.as_published("magnitude")) < alone
