"""Mixtures of experts: an experts module with the router beside it, and routers that choose among some experts only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thanos_lightning.models.experts import layout_of, matrices_of
from thanos_lightning.models.stack import class_of
from thanos_lightning.sharding.view import whole_shape


@dataclass(frozen=True)
class Mixture:
    """Experts and their router."""

    name: str  # fully qualified, of the experts
    experts: nn.Module  # the module with the matrices of all experts
    router_name: str  # fully qualified
    router: nn.Module  # chooses experts for each token; some of its parameters and buffers have a row for each
    # Whether the router gives logits, each token's shares, and the numbers of its experts. Otherwise it gives the
    # shares of all experts, and logits, as Llama 4's does
    gives_numbers: bool

    @property
    def size(self) -> int:
        """Number of experts."""
        return _size(self.experts)

    @property
    def weights(self) -> int:
        """Number of weights in the matrices of one expert."""
        return sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices_of(self.experts).values()) // self.size

    @property
    def top_k(self) -> int:
        """How many experts each token goes to."""
        return int(self.router.top_k)  # type: ignore[arg-type]

    @property
    def groups(self) -> int:
        """How many equal groups the router divides the experts into, as DeepSeek's does."""
        return int(getattr(self.router, "num_group", None) or 1)

    @property
    def open_groups(self) -> int:
        """From how many groups the experts of a token may come."""
        return int(getattr(self.router, "topk_group", None) or 1)

    @property
    def lacks_experts(self) -> bool:
        """Whether the router has been made to choose among some experts only."""
        own = vars(self.router).get("forward")
        return isinstance(own, partial) and own.func is _route

    @property
    def of_router(self) -> list[str]:
        """Names of the router's parameters and buffers that have a row for each expert."""
        return [name for name, value in _tensors(self.router) if whole_shape(value)[:1] == (self.size,)]

    @property
    def of_experts(self) -> list[str]:
        """Names of the experts' parameters, and buffers, that have an entry for each expert."""
        return [name for name, value in _tensors(self.experts) if whole_shape(value)[:1] == (self.size,)]

    def check(self, number: int) -> None:
        """Raise ValueError if the router can't choose among so many experts, or gives something else than others."""
        whole = dict(_tensors(self.router))
        cut = {
            name: torch.empty(
                number if name in self.of_router else whole_shape(value)[0],
                *whole_shape(value)[1:],
                dtype=value.dtype,
                device="meta",
            )
            for name, value in whole.items()
        }
        try:
            hidden = torch.empty(2, whole_shape(whole["weight"])[1], dtype=whole["weight"].dtype, device="meta")
            given = torch.func.functional_call(_smaller(self.router, number), cut, (hidden,))
            shapes = [tuple(one.shape) for one in given]
        except Exception as error:  # whatever a model raises
            raise ValueError(
                f"the router {self.router_name} ({type(self.router).__name__}) can't choose among {number} of its "
                f"{self.size} experts ({error}): take another sparsity, or another pattern"
            ) from error
        logits, shares = (2, number), (2, self.top_k)
        if shapes != ([logits, shares, shares] if self.gives_numbers else [logits, logits]):
            raise ValueError(
                f"the router {self.router_name} ({type(self.router).__name__}) gives something else than known ones of "
                "transformers do, so none of its experts can be dropped: take another pattern"
            )


def find_mixtures(model: nn.Module) -> dict[str, Mixture]:
    """Find the mixtures of experts of a model whose router is known, by the name of the experts.

    The router is the one module beside the experts that has a `top_k` and a row of a parameter for each expert.
    """
    modules = dict(model.named_modules())
    found: dict[str, Mixture] = {}
    for name, experts in modules.items():
        layout = layout_of(experts)
        if layout is None or not name:
            continue
        size = _size(experts)
        parent = name.rpartition(".")[0]
        routers = {
            f"{parent}.{own}" if parent else own: child
            for own, child in modules[parent].named_children()
            if child is not experts
            and isinstance(getattr(child, "top_k", None), int)
            and any(whole_shape(value)[:1] == (size,) for _, value in _tensors(child))
        }
        if len(routers) == 1:
            ((router_name, router),) = routers.items()
            found[name] = Mixture(name, experts, router_name, router, layout.is_routed)
    return found


def keep_experts(mixture: Mixture, kept: Sequence[int]) -> None:
    """Let a router choose among these experts only from now on, as that of a model without the others does.

    Its output has the form that it had: experts keep their numbers, and those that went have logits of -inf.
    """
    router = mixture.router
    if mixture.lacks_experts:
        del vars(router)["forward"]
    if len(kept) < mixture.size:
        numbers = torch.tensor(kept, device=router.weight.device)  # type: ignore[arg-type]
        vars(router)["forward"] = partial(_route, mixture, _smaller(router, len(kept)), numbers, mixture.of_router)


def _route(
    mixture: Mixture, smaller: nn.Module, kept: Tensor, with_rows: Sequence[str], *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    own = dict(_tensors(mixture.router))  # read here, where whatever shards them has gathered them
    kept = kept.to(own[with_rows[0]].device)
    cut = {name: value.index_select(0, kept) if name in with_rows else value for name, value in own.items()}
    given = torch.func.functional_call(smaller, cut, args, kwargs)
    if mixture.gives_numbers:
        logits, shares, chosen = given
        return _widened(logits, kept, mixture.size, -torch.inf), shares, kept[chosen]
    shares, logits = given
    return _widened(shares, kept, mixture.size, 0.0), _widened(logits, kept, mixture.size, -torch.inf)


def _widened(values: Tensor, kept: Tensor, size: int, other: float) -> Tensor:
    return values.new_full((*values.shape[:-1], size), other).index_copy(-1, kept, values)


def _size(experts: nn.Module) -> int:
    down: Any = experts._parameters["down_proj"]
    return whole_shape(down)[0]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the module itself."""
    for name in (*module._parameters, *module._buffers):
        value = getattr(module, name)
        if value is not None:
            yield name, value


def _smaller(router: nn.Module, number: int) -> nn.Module:
    """A copy of a router for so many experts. It has no tensors of its own, and no hooks."""
    copy: Any = object.__new__(class_of(router))
    own = {name: value for name, value in vars(router).items() if name not in ("forward", "_compiled_call_impl")}
    vars(copy).update({**own, **vars(nn.Module()), "_modules": router._modules})
    copy.num_experts = number
    copy._parameters = dict.fromkeys(router._parameters)
    copy._buffers = dict.fromkeys(router._buffers)
    return copy  # type: ignore[no-any-return]
