"""What the layers of a window are pruned on, and which ranks work on each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from thanos_lightning.models.targets import PrunableLayer
from thanos_lightning.sharding.owners import assign_teams
from thanos_lightning.solver import HessianAccumulator


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of a window's layers, and of the loss's gradients at their outputs.

    Attributes:
        teams: Layer name -> the ranks that solve it, its owner first; the same on all ranks.
        accumulators: Layer name -> the second moments of its inputs on this rank. None where none are collected.
            Emptied as they are summed, so that memory is free for what comes.
        output_weights: Layer name -> how much an error of each of its outputs counts, (out_features,), the same on all
            ranks. Where rows are coupled, the errors of each two, (out_features, out_features), on the layer's owner.
            The outputs of a layer that is missing count alike.
        couples_rows: Whether they are of each two; the same on all ranks.
        seconds: What collecting has taken of the training.
        stay: Whether the accumulators wait for the event that follows a scan, so that emptying them frees no memory.

    Examples:
        >>> Moments.of_window({}, world_size=2).teams
        {}
    """

    teams: Mapping[str, range]
    accumulators: dict[str, HessianAccumulator] | None = None
    output_weights: Mapping[str, Tensor] = field(default_factory=dict)
    couples_rows: bool = False
    seconds: float = 0.0
    stay: bool = False

    @classmethod
    def of_window(
        cls,
        layers: Mapping[str, PrunableLayer],
        world_size: int,
        accumulators: dict[str, HessianAccumulator] | None = None,
    ) -> Moments:
        """Those whose outputs count alike, and whose teams are decided from the shapes.

        Args:
            layers: Name -> layer of the window.
            world_size: Number of ranks.
            accumulators: See the attribute.
        """
        return cls(assign_teams(layers, world_size), accumulators)

    @property
    def owners(self) -> dict[str, int]:
        """Layer name -> the rank on which sums and weight come together."""
        return {name: team[0] for name, team in self.teams.items()}
