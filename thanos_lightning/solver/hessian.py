"""The second moment of a layer's inputs, accumulated batch by batch, and its factors.

Legend (arXiv 2504.05346): X (cols, tokens) are the inputs; H = 2 X Xᵀ, here divided by the number of tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from thanos_lightning.solver.admm import Penalties, penalties
from thanos_lightning.solver.linalg import Curvature, curvature, exact_arithmetic

# X Xᵀ is computed in strips of rows that begin at the diagonal, which is little more than half the work.
_STRIPS = 8
_LEAST_STRIP = 128


class HessianAccumulator:
    """Accumulates H = (2/T) Σ_t x_t x_tᵀ over T tokens.

    It stores ``triangle``, Σ_t x_t x_tᵀ of shape (in_features, in_features) in float32, and ``num_tokens``. Two
    additions merge the accumulators of two processes. Only the upper triangle of ``triangle`` is valid.

    Args:
        in_features: Width of the layer's input.
        device: Device of the sum; inputs are moved there.

    Raises:
        ValueError: If ``in_features`` is not positive.

    Examples:
        >>> from thanos_lightning.solver import HessianAccumulator
        >>> accumulator = HessianAccumulator(2)
        >>> accumulator.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> accumulator.num_tokens
        2
        >>> accumulator.compute()
        tensor([[2., 2.],
                [2., 4.]])
    """

    triangle: Tensor
    num_tokens: int

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        if in_features < 1:
            raise ValueError(f"in_features={in_features} is not positive: give the width of the layer's input")
        # An accumulator that is created in a validation loop has to accept training batches, too.
        with torch.inference_mode(False):
            self.triangle = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.num_tokens = 0

    @classmethod
    def of_sum(cls, total: Tensor, num_tokens: int) -> "HessianAccumulator":
        """Make an accumulator of `total`, the upper triangle of Σ x xᵀ over `num_tokens` tokens."""
        accumulator = cls.__new__(cls)
        accumulator.triangle, accumulator.num_tokens = total, num_tokens
        return accumulator

    def update(self, inputs: Float[Tensor, "..."], token_mask: Tensor | None = None) -> None:
        """Count a batch of tokens.

        Args:
            inputs: (..., in_features), the layer's inputs in any floating dtype. Their products are in float32, also
                under autocast.
            token_mask: bool (...), True where a token counts. None counts all.

        Raises:
            ValueError: If a shape does not fit, or the mask is not bool.
        """
        width = len(self.triangle)
        if inputs.ndim == 0 or inputs.shape[-1] != width:
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)} do not end in in_features={width}: give batches that fit it"
            )
        if token_mask is not None and token_mask.shape != inputs.shape[:-1]:
            raise ValueError(
                f"token_mask of shape {tuple(token_mask.shape)} does not fit inputs of shape {tuple(inputs.shape)}: "
                "it needs one entry per token"
            )
        if token_mask is not None and token_mask.dtype != torch.bool:
            # Indexing with an attention mask of zeros and ones would pick the first two sequences again and again.
            raise ValueError(f"token_mask of dtype {token_mask.dtype} has to be bool: pass token_mask.bool()")
        # Tokens are selected and not multiplied by zero, since a padding token may hold NaN.
        with exact_arithmetic(self.triangle.device, operands=inputs.dtype):
            tokens = inputs.reshape(-1, width) if token_mask is None else inputs[token_mask.to(inputs.device)]
            tokens = tokens.to(self.triangle)
            step = max(_LEAST_STRIP, -(-width // _STRIPS))
            for start in range(0, width, step):
                strip = self.triangle[start : start + step, start:]
                strip.addmm_(tokens[:, start : start + step].mT, tokens[:, start:])
        self.num_tokens += len(tokens)

    @property
    def sum(self) -> Float[Tensor, "cols cols"]:
        """Σ x xᵀ, float32, a new tensor."""
        return self.triangle.triu().add_(self.triangle.triu(1).mT)

    def merge(self, other: "HessianAccumulator") -> None:
        """Add the tokens of another accumulator of the same layer.

        Raises:
            ValueError: If the widths differ.
        """
        if other.triangle.shape != self.triangle.shape:
            raise ValueError(f"cannot merge accumulators of widths {len(self.triangle)} and {len(other.triangle)}")
        self.triangle.add_(other.triangle.to(self.triangle.device))
        self.num_tokens += other.num_tokens

    def compute(self) -> Float[Tensor, "cols cols"]:
        """H = (2/T) Σ_t x_t x_tᵀ, float32, a new tensor.

        Raises:
            ValueError: If no token was counted.
        """
        if self.num_tokens == 0:
            raise ValueError(
                "no token was counted, so there is no Hessian: check that the layer runs in the forward pass and that "
                "the token mask is not False everywhere"
            )
        return self.sum.mul_(2.0 / self.num_tokens)


class Factors:
    """An undamped Hessian in float32 or wider, and its factors: for all layers with one input (q, k, v; gate, up)."""

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
