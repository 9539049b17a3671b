"""Zeros that are exact."""

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

# By size of an entry in bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def zero_where(tensor: Shaped[Tensor, "*shape"], pruned: Bool[Tensor, "*shape"]) -> Tensor:
    """Set entries to exactly +0, whatever they are: -1, NaN or infinity.

    Args:
        tensor: Of any real dtype; overwritten.
        pruned: True where it becomes zero.

    Returns:
        ``tensor``.

    Example:
        >>> from thanos_lightning.solver.zeros import zero_where
        >>> zero_where(torch.tensor([-1.0, 2.0, float("nan")]), torch.tensor([True, False, True]))
        tensor([0., 2., 0.])
    """
    # All bits where kept, none where pruned. This runs in every training step and in the solver's innermost loops, and
    # masked_fill_ branches at each entry on CPUs: there it takes 12 times as long.
    bits = pruned.view(torch.int8) - 1
    tensor.view(_INTEGERS[tensor.element_size()]).bitwise_and_(bits)
    return tensor
