"""Low-rank matrices that are added to a weight where it is not 0."""

import torch
from jaxtyping import Float
from torch import Tensor

from thanos_lightning.solver.zeros import zero_where


def effective(
    weight: Float[Tensor, "rows cols"],
    down: Float[Tensor, "rank cols"],
    up: Float[Tensor, "rows rank"],
    *,
    with_weight: bool = True,
) -> Float[Tensor, "rows cols"]:
    """The weight with what adapters add to it, or only the latter: (out_features, in_features), at least float32.

    ``down`` is lora_A, and ``up`` is lora_B, scaled.

    Examples:
        >>> weight = torch.tensor([[1.0, 0.0]])
        >>> effective(weight, down=torch.tensor([[2.0, 3.0]]), up=torch.tensor([[1.0]]))
        tensor([[3., 0.]])
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, up.dtype), torch.float32)
    whole = up.to(dtype) @ down.to(dtype)
    if with_weight:
        whole += weight
    return zero_where(whole, weight == 0)
