"""Magnitude pruning: remove the smallest |W_ij| of the layer, and leave the other weights unchanged.

Source: Han et al., Learning both Weights and Connections for Efficient Neural Networks (arXiv 1506.02626).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.pattern import Solvable, Unstructured
from thanos_lightning.solver.saliency import choose_regular, lowest, num_to_prune


def magnitude(
    W: Float[Tensor, "rows cols"], frozen: Bool[Tensor, "rows cols"], pattern: Solvable
) -> Bool[Tensor, "rows cols"]:
    """Choose what to prune, True = pruned. An unstructured pattern compares all weights of the layer."""
    scores = W.abs()
    if isinstance(pattern, Unstructured):
        count = num_to_prune(pattern, frozen)
        return lowest(scores.masked_fill(frozen, -torch.inf), count)
    return choose_regular(scores, frozen, pattern)
