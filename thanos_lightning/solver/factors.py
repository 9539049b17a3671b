"""Factors of a Hessian, computed once for all layers that share their inputs (q, k, v; gate, up)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from thanos_lightning.solver.admm import Penalties, penalties
from thanos_lightning.solver.hessian import HessianAccumulator
from thanos_lightning.solver.linalg import Curvature, curvature


class Factors:
    """An undamped Hessian, widened to float32 if its dtype has fewer bits, and its factors."""

    def __init__(self, hessian: Tensor) -> None:
        self.hessian = hessian.detach()
        if hessian.is_floating_point():  # layer.prune_layer refuses other dtypes
            self.hessian = self.hessian.to(torch.promote_types(hessian.dtype, torch.float32))
        self.kept = False  # whether the factors are kept for another layer; otherwise only the caller holds them
        self._curvature: tuple[float, Curvature] | None = None
        self._penalties: tuple[float, int, Penalties] | None = None

    def curvature(self, damping: float) -> Curvature:
        """Damp and factor the Hessian: see `linalg.curvature`."""
        if self._curvature is not None and self._curvature[0] == damping:
            result = self._curvature[1]
        else:
            self._curvature = self._penalties = None
            result = curvature(self.hessian, damping)
        self._curvature = (damping, result) if self.kept else None
        return result

    def penalties(self, cost: Float[Tensor, " cols"], damping: float, steps: int) -> Penalties:
        """Compute what the steps of `admm.alternate` share: see `admm.penalties`.

        ``cost`` is `admm.weight_costs` of the factor that `curvature` returned last.
        """
        if self._penalties is not None and self._penalties[:2] == (damping, steps):
            result = self._penalties[2]
        else:
            result = penalties(self.hessian, cost, damping, steps)
        self._penalties = (damping, steps, result) if self.kept else None
        return result


class FactorsInTurn:
    """Give the factors of one layer after the other. Consecutive layers with the same statistics share factors."""

    def __init__(self) -> None:
        self._statistics: HessianAccumulator | None = None
        self._factors: Factors | None = None

    def take(self, statistics: HessianAccumulator, before: HessianAccumulator | None = None) -> Factors:
        """Return the factors of a layer. Keep them if the next layer's statistics, ``before``, are the same object."""
        factors = self._factors if statistics is self._statistics else None
        if factors is None:
            self._statistics = self._factors = None  # frees memory for the next factors
            factors = Factors(statistics.compute())
        factors.kept = statistics is before
        self._statistics, self._factors = (statistics, factors) if factors.kept else (None, None)
        return factors
