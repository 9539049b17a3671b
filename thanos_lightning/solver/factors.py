"""What is made of a Hessian alone, once for all layers that have the same inputs (q, k, v; gate, up)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from thanos_lightning.solver.admm import Penalties, penalties
from thanos_lightning.solver.hessian import HessianAccumulator
from thanos_lightning.solver.linalg import Curvature, curvature


class Factors:
    """A Hessian, and what the solver has made of it.

    Args:
        hessian: (in_features, in_features), undamped.

    Attributes:
        hessian: As given, but float32 where it had fewer bits.
        kept: Whether what is made stays for another layer. Else only the caller holds it.

    Examples:
        >>> factors = Factors(4 * torch.eye(2))
        >>> factors.kept = True
        >>> factors.curvature(0.0).factor
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
        >>> factors.curvature(0.0) is factors.curvature(0.0)
        True
    """

    def __init__(self, hessian: Tensor) -> None:
        self.hessian = hessian.detach()
        if hessian.is_floating_point():  # others are refused with the weight that they are for
            self.hessian = self.hessian.to(torch.promote_types(hessian.dtype, torch.float32))
        self.kept = False
        self._curvature: tuple[float, Curvature] | None = None
        self._penalties: tuple[float, int, Penalties] | None = None

    def curvature(self, damping: float) -> Curvature:
        """The Hessian, damped and factored: see `linalg.curvature`.

        Raises:
            FactorizationError: If it is not numerically positive definite so.
        """
        if self._curvature is not None and self._curvature[0] == damping:
            found = self._curvature[1]
        else:
            self._curvature = self._penalties = None
            found = curvature(self.hessian, damping)
        self._curvature = (damping, found) if self.kept else None
        return found

    def penalties(self, cost: Float[Tensor, " cols"], damping: float, steps: int) -> Penalties:
        """What the steps of `admm.alternate` share.

        Args:
            cost: `admm.weight_costs` of what `curvature` gave last.
            damping: As the method's.
            steps: Number of steps.

        Raises:
            FactorizationError: If the Hessian is far from positive semi-definite.
        """
        if self._penalties is not None and self._penalties[:2] == (damping, steps):
            found = self._penalties[2]
        else:
            found = penalties(self.hessian, cost, damping, steps)
        self._penalties = (damping, steps, found) if self.kept else None
        return found


class FactorsInTurn:
    """The factors of one layer after the other; a layer whose statistics are those of the last one has its factors.

    Examples:
        >>> statistics = HessianAccumulator.of_sum(torch.eye(2), num_tokens=1)
        >>> in_turn = FactorsInTurn()
        >>> in_turn.take(statistics, before=statistics) is in_turn.take(statistics)
        True
    """

    def __init__(self) -> None:
        self._statistics: HessianAccumulator | None = None
        self._factors: Factors | None = None

    def take(self, statistics: HessianAccumulator, before: HessianAccumulator | None = None) -> Factors:
        """The factors of a layer.

        Args:
            statistics: Of its inputs.
            before: The next layer's; where it has the same, what is made stays for it.

        Raises:
            ValueError: If no token was counted.
        """
        factors = self._factors if statistics is self._statistics else None
        if factors is None:
            self._statistics = self._factors = None  # memory for what comes
            factors = Factors(statistics.compute())
        factors.kept = statistics is before
        self._statistics, self._factors = (statistics, factors) if factors.kept else (None, None)
        return factors
