"""Threads of one process that prune a layer together."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from thanos_lightning.solver import Pattern, PrunedLayer
from thanos_lightning.solver.factors import Factors
from thanos_lightning.solver.layer import SolverOptions, prune_rows
from thanos_lightning.solver.linalg import exact_arithmetic
from thanos_lightning.solver.team import AgreeingTeam, RowTeam, split_rows

PATIENCE = 20.0  # seconds, after which a member that is waited for counts as missing


class Meeting:
    def __init__(self, members: int) -> None:
        self.barrier = threading.Barrier(members, timeout=PATIENCE)
        self.brought: list[Tensor] = [torch.empty(0)] * members


class ThreadTeam(AgreeingTeam):
    """Members that meet at a barrier.

    `faults` says what to raise: (member, number of the call of `share`) -> error.
    """

    def __init__(self, index: int, rows: Sequence[int], meeting: Meeting, faults: Mapping[tuple[int, int], Exception]):
        super().__init__(index, rows)
        self.meeting = meeting
        self.faults = faults
        self.gathered = self.shared = 0

    def share(self, own: Tensor) -> Tensor:
        self.shared += 1
        if (self.index, self.shared) in self.faults:
            raise self.faults[self.index, self.shared]
        return super().share(own)

    def _gather(self, own: Tensor, everyone: Tensor) -> None:
        self.meeting.brought[self.index] = own.clone()
        self.meeting.barrier.wait()
        brought = list(self.meeting.brought)
        self.meeting.barrier.wait()
        assert {(part.shape, part.dtype) for part in brought} == {(everyone.shape[1:], everyone.dtype)}
        everyone.copy_(torch.stack(brought))
        self.gathered += 1


def outcomes(
    rows: Sequence[int], work: Callable[[ThreadTeam], Any], faults: Mapping[tuple[int, int], Exception] | None = None
) -> list[Any]:
    """What `work` returns or raises in each member of a team."""
    meeting = Meeting(len(rows))
    teams = [ThreadTeam(index, rows, meeting, faults or {}) for index in range(len(rows))]

    def run(team: ThreadTeam) -> Any:
        try:
            with team.stage():
                return work(team)
        except Exception as error:
            return error

    # The outer one, since each member restores the precision that it finds, and they don't take turns.
    with exact_arithmetic(torch.device("cpu")), ThreadPoolExecutor(len(rows)) as pool:
        results = list(pool.map(run, teams))
    assert len({team.gathered for team in teams}) == 1
    return results


def prune_together(
    members: int,
    weight: Tensor,
    hessian: Tensor | None,
    pattern: Pattern,
    frozen: Tensor | None = None,
    faults: Mapping[tuple[int, int], Exception] | None = None,
    **options: Any,
) -> PrunedLayer | list[Any]:
    """The layer as so many members prune it, or what each of them got if one failed."""
    settings = SolverOptions.as_published(**options)

    def work(team: RowTeam) -> PrunedLayer:
        own = team.own_rows
        own_frozen = None if frozen is None else frozen[own]
        return prune_rows(
            weight[own], None if hessian is None else Factors(hessian), pattern, settings, own_frozen, team
        )

    parts = outcomes(split_rows(len(weight), members), work, faults)
    if not all(isinstance(part, PrunedLayer) for part in parts):
        return parts
    assert len({(part.loss, part.relative_loss) for part in parts}) == 1 or hessian is None
    weights, masks = torch.cat([part.weight for part in parts]), torch.cat([part.mask for part in parts])
    return PrunedLayer(weights, masks, parts[0].loss, parts[0].relative_loss)
