"""Zeros that are exact, also in a weight that low-rank matrices are added to."""

import torch
from jaxtyping import Bool, Float, Int8, Int64, Shaped
from torch import Tensor

# Of a product in float32, which stays in a GPU's cache until it is rounded.
_ENTRIES_AT_ONCE = 2**22
# By size of an entry in bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def zero_where(tensor: Shaped[Tensor, "*shape"], pruned: Bool[Tensor, "*shape"]) -> Tensor:
    """Set the pruned entries to exactly +0, also negative ones, NaN and infinity.

    The tensor has any real dtype and is overwritten. Return it, or a view of it.
    """
    return clear_bits(tensor, kept_bits(pruned))


def kept_bits(pruned: Bool[Tensor, "*shape"]) -> Int8[Tensor, "*shape"]:
    """Make a mask for ``clear_bits``, once for several tensors: all bits set where kept, none where pruned."""
    return pruned.view(torch.int8) - 1


@torch.no_grad()
def clear_bits(tensor: Shaped[Tensor, "*shape"], kept: Int8[Tensor, "*shape"]) -> Tensor:
    """Do the same as ``zero_where``, with a mask from ``kept_bits``."""
    # This runs in every training step and in the solver's innermost loops. On CPUs masked_fill_ takes 12 times as
    # long, since it branches at each entry.
    return tensor.view(_INTEGERS[tensor.element_size()]).bitwise_and_(kept).view(tensor.dtype)


@torch.no_grad()
def count_unless_zero(tensor: Shaped[Tensor, "*shape"], pruned: Bool[Tensor, "*shape"]) -> Int64[Tensor, ""]:
    """Count the pruned entries that are not exactly +0, such as -0 and NaN. The count is on the tensor's device.

    Examples:
        >>> count_unless_zero(torch.tensor([-0.0, 2.0, 0.0]), torch.tensor([True, False, True]))
        tensor(1)
    """
    return ((tensor.view(_INTEGERS[tensor.element_size()]) != 0) & pruned).count_nonzero()


@torch.no_grad()
def missing_zeros(tensor: Shaped[Tensor, "*shape"], number: int) -> Int64[Tensor, ""]:
    """Count how many of a number of zeros are not there any more; -0 is none. The count is on the tensor's device.

    Examples:
        >>> missing_zeros(torch.tensor([-0.0, 2.0, 0.0]), 2)
        tensor(1)
    """
    zeros = (tensor.view(_INTEGERS[tensor.element_size()]) == 0).count_nonzero()
    return (number - zeros).clamp(min=0)


def effective(
    weight: Float[Tensor, "rows cols"],
    down: Float[Tensor, "rank cols"],
    up: Float[Tensor, "rows rank"],
    *,
    with_weight: bool = True,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "rows cols"]:
    """The weight with what adapters add to it, or only the latter: (out_features, in_features).

    ``down`` is lora_A, and ``up`` is lora_B, scaled. Entries are sums in at least float32, rounded once to ``dtype`` if
    that is given.

    Examples:
        >>> weight = torch.tensor([[1.0, 0.0]])
        >>> effective(weight, down=torch.tensor([[2.0, 3.0]]), up=torch.tensor([[1.0]]))
        tensor([[3., 0.]])
    """
    exact = torch.promote_types(torch.promote_types(weight.dtype, up.dtype), torch.float32)
    whole = torch.empty(weight.shape, dtype=dtype or exact, device=weight.device)
    up, down = up.to(exact), down.to(exact)
    step = max(1, _ENTRIES_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        part = up[start : start + step] @ down
        if with_weight:
            part += rows
        whole[start : start + step] = zero_where(part, rows == 0)
    return whole
