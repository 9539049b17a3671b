"""Wanda: prune by |W_ij| ‖X_j‖ within each row, and leave the other weights unchanged.

Source: Sun et al., A Simple and Effective Pruning Approach for Large Language Models (arXiv 2306.11695).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.pattern import Solvable, Unstructured
from thanos_lightning.solver.saliency import choose_regular, importance, lowest_per_row, num_to_prune


def wanda(
    W: Float[Tensor, "rows cols"], norms: Float[Tensor, " cols"], frozen: Bool[Tensor, "rows cols"], pattern: Solvable
) -> Bool[Tensor, "rows cols"]:
    """Choose what to prune, True = pruned. An unstructured pattern prunes equally many weights per row, up to one.

    ``norms`` are ‖X_j‖ up to a common scale.
    """
    scores = importance(W, norms)
    if isinstance(pattern, Unstructured):
        count = num_to_prune(pattern, frozen)
        return lowest_per_row(scores.masked_fill(frozen, -torch.inf), frozen, count)
    return choose_regular(scores, frozen, pattern)
