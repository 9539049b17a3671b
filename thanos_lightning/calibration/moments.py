"""The moments that a window's layers are pruned on, and the rank that solves each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from thanos_lightning.calibration.hidden_states import HiddenStates
from thanos_lightning.solver import HessianAccumulator


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of a window's layers, and of the loss's gradients at their outputs."""

    owners: Mapping[str, int]  # layer -> the rank that gathers its sums and weight and solves it; alike on all ranks
    # layer -> the second moments of its inputs on this rank; None if none are collected. The dict is emptied while the
    # ranks add up the moments, to free memory
    accumulators: dict[str, HessianAccumulator] | None = None
    # layer -> how much an error at each output counts, (out_features,), alike on all ranks; all alike if it is missing
    output_weights: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0  # training time that collecting has taken
    # what the window's blocks got and gave on this rank; None if no block is trained
    states: HiddenStates | None = None
    # whether accumulators are kept for the event after a scan, so that emptying the dict frees nothing
    stay: bool = False
