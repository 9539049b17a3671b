"""Magnitude pruning: the smallest |W_ij| of the layer go, the other weights are left alone.

Source: Han et al., Learning both Weights and Connections for Efficient Neural Networks (arXiv 1506.02626).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.pattern import Pattern, Unstructured
from thanos_lightning.solver.saliency import choose_regular, lowest


def magnitude(
    W: Float[Tensor, "rows cols"], frozen: Bool[Tensor, "rows cols"], pattern: Pattern
) -> Bool[Tensor, "rows cols"]:
    """Choose what to prune.

    Args:
        W: Weights.
        frozen: Weights that have to go.
        pattern: The pattern; unstructured compares all weights of the layer.

    Returns:
        True = pruned.
    """
    scores = W.abs()
    if isinstance(pattern, Unstructured):
        count = max(pattern.num_pruned(*W.shape), int(frozen.sum()))
        return lowest(scores.masked_fill(frozen, -torch.inf), count)
    return choose_regular(scores, frozen, pattern)
