"""Prunes windows with fewer layers than ranks, without a training, on three ranks.

RANK and WORLD_SIZE are set when this is imported. Each rank ends with an error where something is not as it
should be; then the others may wait for it forever.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from thanos_lightning.calibration.moments import Moments
from thanos_lightning.events.prune import prune_window
from thanos_lightning.models.targets import find_targets
from thanos_lightning.plan.schedule import Event
from thanos_lightning.plan.windows import Window
from thanos_lightning.report.data import LayerReport
from thanos_lightning.sharding.owners import PruningError, assign_teams
from thanos_lightning.sharding.ranks import RankTeam
from thanos_lightning.sharding.replicated import ReplicatedAccess
from thanos_lightning.solver import (
    NM,
    FactorizationError,
    HessianAccumulator,
    Pattern,
    PrunedLayer,
    Structured,
    Unstructured,
    prune,
)
from thanos_lightning.solver.layer import SolverOptions
from thanos_lightning.training.enforcement import MaskEnforcer

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
METHODS = ("thanos", "sparsegpt", "wanda", "magnitude")
PATTERNS: tuple[Pattern, ...] = (Unstructured(0.6), NM(2, 4, 0.1), Structured(0.3, 0.1))


class Split:
    """A network whose layers are all in one window, the same on all ranks."""

    def __init__(self, *layers: nn.Module) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(*layers)
        for parameter in self.net.parameters():
            nn.init.normal_(parameter)
        self.layers = find_targets(self.net)
        self.access = ReplicatedAccess(RANK, WORLD_SIZE, torch.device("cpu"))
        self.enforcer = MaskEnforcer(self.layers, self.access)
        self.inputs = {name: torch.randn(300, layer.cols).cumsum(1) for name, layer in self.layers.items()}

    def accumulator(self, name: str) -> HessianAccumulator:
        accumulator = HessianAccumulator(self.layers[name].cols)
        accumulator.update(self.inputs[name])
        return accumulator

    def prune(self, pattern: Pattern, options: SolverOptions) -> list[LayerReport]:
        # the last rank has seen all, so that the sums are those of one process to the last bit
        accumulators = {name: self.accumulator(name) for name in self.layers if RANK == WORLD_SIZE - 1}
        reports, _ = prune_window(
            Window(Event(1, 1.0), dict.fromkeys(self.layers, pattern), 0, 1, is_last=True),
            self.layers,
            Moments.of_window(self.layers, WORLD_SIZE, accumulators if options.needs_statistics else None),
            access=self.access,
            enforcer=self.enforcer,
            options=options,
        )
        return reports

    def expected(self, name: str, pattern: Pattern, options: SolverOptions) -> PrunedLayer:
        layer, keep = self.layers[name], self.enforcer.keep_mask(name)
        return prune(
            layer.oriented(layer.parameter.detach()).clone(),
            self.accumulator(name).compute() if options.needs_statistics else None,
            pattern,
            method=options.method,
            block_size=options.block_size,
            frozen=None if keep is None else ~keep,
            refine_steps=options.refine_steps,
        )

    def check(self, pattern: Pattern, options: SolverOptions) -> None:
        """Prune, and compare with one process."""
        expected = {name: self.expected(name, pattern, options) for name in self.layers}
        for report in self.prune(pattern, options):
            whole, keep = expected[report.name], self.enforcer.keep_mask(report.name)
            assert keep is not None
            assert keep.sum() == whole.mask.sum()
            assert (keep == whole.mask).float().mean() >= 0.999
            if options.needs_statistics:
                assert abs(report.relative_loss / whole.relative_loss - 1) < 0.01
            layer = self.layers[report.name]
            weight = layer.oriented(layer.parameter.detach())
            assert not weight[~keep].any()
            same = keep & whole.mask
            difference = (weight - whole.weight)[same].float().norm() / whole.weight[same].float().norm()
            assert difference < 0.01, difference


def check_results() -> None:
    for method in METHODS:
        for pattern in PATTERNS:
            for refine_steps in (0, 2):
                split = Split(nn.Linear(64, 47))
                options = SolverOptions.as_published(method, block_size=16, refine_steps=refine_steps)
                split.check(pattern.with_sparsity(pattern.sparsity * 0.6), options)
                split.check(pattern, options)  # under the mask of the first
    options = SolverOptions.as_published(block_size=16)
    Split(nn.Linear(64, 47, dtype=torch.bfloat16)).check(NM(2, 4), options)
    two_layers = Split(nn.Linear(32, 40), nn.Linear(64, 9))
    assert sorted(len(team) for team in assign_teams(two_layers.layers, 3).values()) == [1, 2]
    for split in (two_layers, Split(nn.Linear(16, 1)), Split(nn.Linear(512, 640))):
        split.check(Unstructured(0.5), options)
    split = Split(nn.Linear(64, 47))
    torch.set_default_dtype(torch.bfloat16)  # sums over ranks are in float32 all the same
    split.check(NM(2, 4), options)
    torch.set_default_dtype(torch.float32)


@contextmanager
def failing(operation: str, member: int, error: Exception, call: int) -> Iterator[None]:
    """Let an operation of a team raise on one member, when it is called for so many times."""
    real: Callable[..., Any] = getattr(RankTeam, operation)
    calls = 0

    def fails(team: RankTeam, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if team.index == member and calls == call:
            raise error
        return real(team, *args)

    setattr(RankTeam, operation, fails)
    try:
        yield
    finally:
        setattr(RankTeam, operation, real)


def check_faults() -> None:
    options = SolverOptions.as_published(block_size=16)
    shares = [("share", call) for call in range(1, 11)]
    for operation, call in [("from_owner", 1), ("hand_out", 1), *shares, ("collect", 1), ("collect", 2)]:
        for member in range(WORLD_SIZE):
            split = Split(nn.Linear(32, 9))
            before = split.net[0].weight.detach().clone()
            with failing(operation, member, MemoryError("none left"), call), pytest.raises(PruningError) as raised:
                split.prune(Unstructured(0.5), options)
            assert f"layer 0: MemoryError: none left (on rank {member})" in str(raised.value)
            assert torch.equal(split.net[0].weight, before)
    split = Split(nn.Linear(32, 9))
    with warnings.catch_warnings(record=True) as caught, failing("share", 1, FactorizationError("no"), 3):
        warnings.simplefilter("always")
        split.prune(Unstructured(0.5), options)
    assert sum("0.1 was used" in str(warning.message) for warning in caught) == (1 if RANK == 0 else 0)


def main(_: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    check_results()
    check_faults()
    dist.barrier()
    dist.destroy_process_group()
