"""What a rank holds of a model while it trains it: formulas, from a Trainer's strategy without its ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from thanos_lightning.layers.lora import MaskedAdapter, base_of, shows_its_mask
from thanos_lightning.layers.targets import PRUNABLE
from thanos_lightning.ranks.view import View, numel_of

_MOMENTS = 2  # of AdamW, for each weight
# What DeepSpeed takes where its configuration says nothing
_BUCKET, _LIVE, _KEPT = "reduce_bucket_size", "stage3_max_live_parameters", "stage3_param_persistence_threshold"
_DEFAULTS = {_BUCKET: 5 * 10**8, _LIVE: 10**9, _KEPT: 10**5, "sub_group_size": 10**9}


@dataclass(frozen=True)
class Bytes:
    """Bytes of a training's parts."""

    weights: int = 0  # the model's copy
    gradients: int = 0  # whole, or this rank's part
    masters: int = 0  # in fp32, where the model's copy isn't one
    moments: int = 0  # of AdamW
    masks: int = 0  # a byte for each weight of the layers to prune
    copies: int = 0  # of weights, for a forward and its backward: what autocast keeps in 16 bits, or a rank gathers
    buckets: int = 0  # buffers in which ranks reduce gradients
    # buffers of gradients: whole before a rank has its part, or in fp32 for a step, whichever is more
    passing: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(vars(self).values())

    def without(self, *names: str) -> Bytes:
        """The same where some parts are not there."""
        return replace(self, **dict.fromkeys(names, 0))


@dataclass(frozen=True)
class Share:
    """What a rank holds, when, and where."""

    strategy: str  # in words
    bytes: Bytes  # all parts, on the rank that holds most
    in_pieces: bool  # whether the owner of a layer gets its weight from several ranks
    checkpoint: int  # bytes of one without sums, of all ranks together
    offloaded: tuple[str, ...] = ()  # the parts that are not on the device
    brief: tuple[str, ...] = ("copies",)  # the parts that are gone between two batches
    late: tuple[str, ...] = ("gradients", "moments")  # the parts that are not there before the first optimizer step

    def in_training(self) -> Bytes:
        """What is on the device while batches are trained, beside activations."""
        return self.bytes.without(*self.offloaded)

    def at_event(self, step: int) -> Bytes:
        """What an event after so many optimizer steps finds on the device."""
        return self.in_training().without(*self.brief, *(() if step else self.late))


def share_of(
    module: nn.Module, layers: Iterable[View], strategy: Strategy | None, ranks: int, *, autocasts: bool
) -> Share:
    """What each of so many ranks holds of a module that AdamW trains.

    The module's parameters have the dtype in which they are trained, and may be on the meta device. Under FSDP2 they
    are sharded. `layers` are all that get a mask. The strategy is a supported one; None for one device. `autocasts`
    says whether a forward multiplies by copies in 16 bits; not under DeepSpeed, whose model has 16 bits.
    """
    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    masks = sum(layer.rows * layer.cols for layer in layers if not shows_its_mask(layer))
    if isinstance(strategy, DeepSpeedStrategy):
        return _of_deepspeed(parameters, trained, masks, strategy, ranks)
    whole = _bytes(parameters) + _MOMENTS * _bytes(trained)
    gradients = _bytes(trained, local=True)
    groups = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if groups:
        members = [{id(parameter) for parameter in part.parameters()} for part in groups]
        nested = [set().union(*(inner for inner in members if inner < outer)) for outer in members]
        sizes = [
            sum(numel_of([p]) * p.element_size() for p in part.parameters() if id(p) not in inside)
            for part, inside in zip(groups, nested, strict=True)
        ]
        copies = sum(sorted(sizes)[-2:])  # one that computes, and one that is gathered meanwhile
    else:
        copies = _of_autocast(module) if autocasts else 0
    is_ddp = isinstance(strategy, DDPStrategy) and ranks > 1
    views = isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("gradient_as_bucket_view")
    of_rank = Bytes(
        weights=_bytes(parameters, local=True),
        gradients=gradients,
        moments=_MOMENTS * gradients,
        masks=masks // (ranks if groups else 1),
        copies=copies,
        buckets=gradients if is_ddp and not views else 0,
    )
    in_words = "FSDP2" if groups else "DDP" if is_ddp else "one device"
    return Share(in_words, of_rank, in_pieces=bool(groups), checkpoint=whole + masks // 8)


def _of_deepspeed(
    parameters: Sequence[nn.Parameter],
    trained: Sequence[nn.Parameter],
    masks: int,
    strategy: DeepSpeedStrategy,
    ranks: int,
) -> Share:
    zero = zero_of(strategy)
    known = {name: int(zero.get(name, default)) for name, default in _DEFAULTS.items()}
    stage = stage_of(strategy)
    size = parameters[0].element_size()
    has_masters = stage > 0 or size < 4
    weights, steps = numel_of(parameters), numel_of(trained)
    of_weights, of_gradients, of_masters = (ranks if stage >= least else 1 for least in (3, 2, 1))
    persistent = numel_of(parameter for parameter in parameters if numel_of([parameter]) <= known[_KEPT])
    stepped = -(-steps // of_masters)
    # A gradient is whole, and once more in what is reduced, before a rank has its part of it
    largest = max((numel_of([parameter]) for parameter in trained), default=0)
    reducing = largest + min(max(largest, known[_BUCKET]), steps) if stage == 3 else 0
    gathered = min(weights - persistent, known[_LIVE]) if stage == 3 else 0
    steps_elsewhere = _is_elsewhere(zero.get("offload_optimizer"))
    # gradients in fp32, of the masters that are stepped at one time
    in_a_step = min(stepped, known["sub_group_size"] if stage == 3 else stepped)
    in_a_step = in_a_step if has_masters and not steps_elsewhere else 0
    of_rank = Bytes(
        weights=size * (-(-weights // of_weights) + (persistent if stage == 3 else 0)),
        gradients=size * -(-steps // of_gradients),
        masters=4 * stepped if has_masters else 0,
        moments=4 * _MOMENTS * stepped,
        masks=-(-masks // of_masters),
        copies=size * gathered,
        buckets=size * known[_BUCKET] * (2 if stage < 3 and zero.get("overlap_comm") else 1) if stage else 0,
        passing=max(size * reducing, 4 * in_a_step),
    )
    offloaded: tuple[str, ...] = ()
    if steps_elsewhere:
        offloaded += ("gradients", "masters", "moments", "masks")
    if _is_elsewhere(zero.get("offload_param")):
        offloaded += ("weights",)
    return Share(
        f"DeepSpeed ZeRO-{stage}" if stage else "DeepSpeed without ZeRO",
        of_rank,
        in_pieces=stage > 0,
        checkpoint=(0 if stage == 3 else size * weights)
        + of_rank.masters // stepped * steps
        + 4 * _MOMENTS * steps
        + masks // 8,
        offloaded=offloaded,
        # Stage 3 keeps its gradients and its bucket from the beginning on
        brief=("copies", "passing", *(() if stage == 3 else ("gradients", "buckets"))),
        late=() if stage else ("moments",),
    )


def stage_of(strategy: DeepSpeedStrategy) -> int:
    """The stage of ZeRO."""
    return int(zero_of(strategy).get("stage", 0))


def zero_of(strategy: DeepSpeedStrategy) -> Mapping[str, Any]:
    """Its `zero_optimization`."""
    assert isinstance(strategy.config, dict), "Lightning reads files"
    zero: Mapping[str, Any] = strategy.config.get("zero_optimization", {})
    return zero


def _is_elsewhere(offload: dict[str, str] | None) -> bool:
    return offload is not None and offload.get("device", "none") != "none"


def _of_autocast(module: nn.Module) -> int:
    """Bytes of the copies in 16 bits that autocast keeps of wider weights until a forward's end.

    Layers with masked adapters make theirs anew in the backward, so that one is there at a time.
    """
    multiplied = {id(part.weight): part.weight for part in module.modules() if isinstance(part, PRUNABLE)}
    wide = {key: weight for key, weight in multiplied.items() if weight.element_size() > 2}
    adapted = {id(base_of(part).weight) for part in module.modules() if isinstance(part, MaskedAdapter)}
    one_by_one = [numel_of([weight]) for key, weight in wide.items() if key in adapted]
    return 2 * (numel_of(weight for key, weight in wide.items() if key not in adapted) + max(one_by_one, default=0))


def _bytes(parameters: Iterable[Tensor], *, local: bool = False) -> int:
    return sum((p.to_local() if local and isinstance(p, DTensor) else p).numel() * p.element_size() for p in parameters)
