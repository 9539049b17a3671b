"""The feed-forward blocks of a model, found by what its layers do to each other and not by their names.

A block has channels: channel i is column i of its `down` layer, and row i of each layer before it (gate, up). All
that a channel owns can be removed, and the model computes what it computed with zeros in its place.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from thanos_lightning.layers.lora import base_of
from thanos_lightning.layers.targets import PrunableModule, prunable_modules
from thanos_lightning.ranks.view import whole_shape

# Largest error, beside that of the last bits, of what a down layer gets in another order, over the largest number there
_TOLERANCE = 1e-5
TOKENS = 6  # at each of them another row of a layer is tried; attention mixes them, unlike a feed-forward block


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block: down(f(up_1(x), up_2(x), …)) for a function f that treats each channel alone.

    A LightningModule can name the blocks of its model that the callback does not find, by a method `feed_forwards`.
    "channels" prunes them, and `reorder` gives their channels another order.

    Args:
        down: Name of the layer whose column i is channel i.
        ups: Names of the layers whose row i is channel i. A fused layer has several rows for it: i, width + i, …

    Examples:
        >>> class Module(nn.Module):
        ...     def feed_forwards(self):
        ...         return [FeedForward(down=f"blocks.{i}.out", ups=[f"blocks.{i}.up"]) for i in range(4)]
    """

    down: str
    ups: Sequence[str]


def find_feed_forwards(model: nn.Module, run: Callable[[], Any]) -> list[FeedForward]:
    """Find the feed-forward blocks of a model, in the order in which they are called.

    In a first forward each layer gives some number between 1 and 2 in place of each output, so that no gate hides
    another layer. In the others, one for each kind of layer (alike but for the numbers in their names), layers give the
    same again, but for some entries of this kind, at one row for each token. Their effect ends at the next layers, and
    shows which columns of which inputs they reach. Layers that are called twice, or with fewer than `TOKENS` tokens in
    a sequence, are left out. The model is in eval mode, and `run` runs it on always the same input.
    """
    layers = prunable_modules(model)
    calls: list[_Call] = []
    with torch.no_grad():
        with _hooked(layers, partial(_record, calls)):
            whole = run()
        kinds: dict[str, set[str]] = {}
        for call in calls:
            kinds.setdefault(kind_of(call.name), set()).add(call.name)
        several = {name for name, number in Counter(call.name for call in calls).items() if number > 1}
        ups: dict[str, list[str]] = {}
        for names in kinds.values():
            replay = _Replay(calls, names)
            with _hooked(layers, replay.hook):
                again = run()
            if not (names & several) and _same(whole, again):
                for down, up in replay.pairs():
                    ups.setdefault(down, []).append(up)
    order = [call.name for call in calls]
    return [FeedForward(down, tuple(ups[down])) for down in order if down in ups]


def check_feed_forwards(
    model: nn.Module, blocks: Sequence[FeedForward], run: Callable[[], Any], *, found: bool = False
) -> None:
    """Prove on an input that nothing else in the model reads the channels of the blocks.

    Half of the channels are zero where the down layers read them. Then whatever the up layers give for these must not
    change what the model computes, so that the model without them computes the same as with zeros. The model and `run`
    are as in `find_feed_forwards`. `found` says whether the blocks were found, or declared by a user.

    Raises:
        ValueError: If something changes, if a block has a layer that the model lacks or that another block has, or if
            the model returns nothing to compare. The message names the block.
    """
    layers = prunable_modules(model)
    mend = "take another pattern, or name blocks in feed_forwards() without it" if found else "correct feed_forwards()"
    users = Counter(name for block in blocks for name in (block.down, *block.ups))
    for block in blocks:
        if (why := _misfit(block, layers, users)) is not None:
            raise ValueError(f"{why}: {mend}")
    if blocks and not _is_proven(layers, blocks, run):
        wrong = next((block for block in blocks if not _is_proven(layers, [block], run)), blocks[0])
        raise ValueError(
            f"channels of the feed-forward block of {wrong.down} are read elsewhere, too, or not one by one (a norm "
            f"over channels, or rows in another order), so that they can't be taken out: {mend}"
        )


def _misfit(block: FeedForward, layers: Mapping[str, PrunableModule], users: Mapping[str, int]) -> str | None:
    """Why layers of such names and shapes can't be a block, if they can't."""
    for name in (block.down, *block.ups):
        if name not in layers:
            return f"the feed-forward block of {block.down} names {name!r}, no Linear or Conv1D layer of the model"
        if users[name] > 1:
            return f"layer {name} is in two feed-forward blocks, and can lose channels of one"
    width, rows = width_of(layers[block.down], dim=1), {up: width_of(layers[up], dim=0) for up in block.ups}
    if not rows or any(number % width for number in rows.values()):
        return (
            f"the feed-forward block of {block.down} has {width} channels, and its ups have other numbers of rows "
            f"({rows})"
        )
    return None


def in_any_order(model: nn.Module, blocks: Sequence[FeedForward], run: Callable[[], Any]) -> list[FeedForward]:
    """Those of the blocks that compute the same whatever order their channels have.

    Nothing else may read the channels, as in `check_feed_forwards`, and what is between the layers must treat them
    alike: if the up layers give their outputs in another order, each down layer must get what it got, in that order.
    (The gate of an attention fails: what it gates keeps its order.) The down layer then goes on with what it got
    before, so that no block disturbs another, and the model must give the same. If it returns nothing to compare, a
    ValueError is raised.
    """
    layers = prunable_modules(model)
    users = Counter(name for block in blocks for name in (block.down, *block.ups))
    kinds: dict[str, list[FeedForward]] = {}
    for block in blocks:
        if _misfit(block, layers, users) is None:
            kinds.setdefault(kind_of(block.down), []).append(block)
    proven = [block for kind in kinds.values() for block in kind]
    if proven and not _is_proven(layers, proven, run):
        proven = [block for kind in kinds.values() if _is_proven(layers, kind, run) for block in kind]
    unlike = _unlike_channels(layers, proven, run)
    return [block for block in blocks if block in proven and block.down not in unlike]


def _unlike_channels(
    layers: Mapping[str, PrunableModule], blocks: Sequence[FeedForward], run: Callable[[], Any]
) -> set[str]:
    """The down layers of the blocks that don't treat all channels alike, or are not called."""
    generator = torch.Generator().manual_seed(0)
    orders = {
        block.down: torch.randperm(width_of(layers[block.down], dim=1), generator=generator, device="cpu")
        for block in blocks
    }
    down_of = {up: block.down for block in blocks for up in block.ups}
    got: dict[str, Tensor] = {}
    unlike: set[str] = set()

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        got[name] = _first(args, kwargs).detach().clone()

    def exchange(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        order = orders[down_of[name]].to(output.device)
        return torch.cat([part[..., order] for part in torch.split(output, len(order), dim=-1)], dim=-1)

    def compare(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, now = got[name], _first(args, kwargs)
        expected = before[..., orders[name].to(before.device)]
        if now.shape != expected.shape or not _is_rounded_alike(now, expected):
            unlike.add(name)
        return _with_first(args, kwargs, before)

    downs, ups = {name: layers[name] for name in orders}, {name: layers[name] for name in down_of}
    with torch.no_grad():
        with _hooked(downs, note, before=True):
            one = run()
        called = {name: layers[name] for name in got}
        with _hooked(ups, exchange, first=True), _hooked(called, compare, before=True):
            other = run()
    return unlike | (downs.keys() - got.keys()) if _same(one, other) else set(downs)


def _is_rounded_alike(found: Tensor, expected: Tensor) -> bool:
    """Whether numbers are the same but for rounding: a processor may round a vector's numbers unlike its last ones."""
    last_bits = 4 * torch.finfo(expected.dtype).eps * expected.abs().float()
    bound = last_bits + _TOLERANCE * expected.abs().max().float()
    return bool(((found.float() - expected.float()).abs() <= bound).all())


def _is_proven(layers: Mapping[str, PrunableModule], blocks: Sequence[FeedForward], run: Callable[[], Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    chosen: dict[str, Bool[Tensor, " width"]] = {}
    for block in blocks:
        width = width_of(layers[block.down], dim=1)
        chosen[block.down] = torch.rand(width, generator=generator, device="cpu") < 0.5
        for up in block.ups:
            chosen[up] = chosen[block.down].repeat(width_of(layers[up], dim=0) // width)

    def without(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = _first(args, kwargs)
        return _with_first(args, kwargs, first.masked_fill(chosen[name].to(first.device), 0))

    def disturb(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return torch.where(chosen[name].to(output.device), output + 1 + output.abs(), output)

    downs = {block.down: layers[block.down] for block in blocks}
    ups = {up: layers[up] for block in blocks for up in block.ups}
    with torch.no_grad(), _hooked(downs, without, before=True):
        one = run()
        with _hooked(ups, disturb):
            other = run()
    if not _tensors(one):
        raise ValueError(
            "on a small input the module returns no tensor by which its feed-forward blocks could be proven: let its "
            "forward return the logits"
        )
    return _same(one, other)


def kind_of(name: str) -> str:
    """The name of a module without the numbers of what it is part of: layers of one kind are alike in it.

    Examples:
        >>> kind_of("model.layers.10.mlp.2")  # in a Sequential, another number is another kind
        'model.layers.#.mlp.2'
    """
    return re.sub(r"(?<![^.])\d+(?=[.])", "#", name)


def width_of(module: PrunableModule, dim: int) -> int:
    """The number of a layer's outputs (dim 0) or inputs (dim 1)."""
    return whole_shape(module.weight)[1 - dim if isinstance(base_of(module), Conv1D) else dim]


@dataclass
class _Call:
    """What a layer saw and gave in the first forward. A clone was given, which the model may change in place."""

    name: str
    inputs: Tensor
    output: Tensor


@contextmanager
def _hooked(
    layers: Mapping[str, nn.Module], hook: Callable[..., Any], *, before: bool = False, first: bool = False
) -> Iterator[None]:
    """Call a hook after each layer's forward, or before it: as the last of its hooks, or as the first."""
    with ExitStack() as stack:
        for name, module in layers.items():
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(partial(hook, name), prepend=first, with_kwargs=True).remove)
        yield


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer is called on."""
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    return first


def _with_first(args: tuple[Any, ...], kwargs: Mapping[str, Any], first: Tensor) -> tuple[tuple[Any, ...], Any]:
    """The arguments of a call with another tensor in the place of the first."""
    return ((first, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): first})


def _record(
    calls: list[_Call], name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    inputs = _first(args, kwargs)
    given = 1 + output.detach().sigmoid()
    calls.append(_Call(name, inputs.detach().clone(), given))
    return given.clone()


class _Replay:
    """Replaces outputs by the recorded ones, and those of one kind by others; notes which inputs differ then."""

    def __init__(self, calls: list[_Call], kind: Collection[str]) -> None:
        self._calls, self._kind = calls, kind
        self._next = 0
        self._is_alike = True  # whether the layers were called as in the first forward
        self._reached: dict[str, list[list[int]]] = {}  # layer -> (token, column) of the entries that differ

    def hook(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        call = self._calls[self._next] if self._next < len(self._calls) else None
        self._next += 1
        inputs = _first(args, kwargs)
        if call is None or call.name != name or call.inputs.shape != inputs.shape:  # a router chose other experts
            self._is_alike = False
            return output
        differs = (inputs != call.inputs).reshape(-1, inputs.shape[-1])
        if differs.any():
            self._reached[name] = differs.nonzero().tolist()
        changed = call.output.clone()
        if name in self._kind:
            flat = changed.view(-1, changed.shape[-1])
            for token, row in _tried(flat):
                flat[token, row] += 1
        return changed

    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of layers (down, up) of this kind; none unless each entry reaches one column of one layer only."""
        if not self._is_alike or self._next != len(self._calls):
            return []
        found: list[tuple[str, str]] = []
        last: _Call | None = None
        for call in self._calls:
            if (reached := self._reached.get(call.name)) is not None:
                width = call.inputs.shape[-1]
                is_short = call.inputs.ndim < 2 or call.inputs.shape[-2] < TOKENS
                if last is None or last.output.shape[-1] % width or is_short:
                    return []
                if sorted(reached) != sorted([token, row % width] for token, row in _tried(last.output)):
                    return []
                found.append((call.name, last.name))
                last = None
            if call.name in self._kind:
                last = call
        return found


def _tried(output: Tensor) -> list[tuple[int, int]]:
    """Entries (token, row): the first row, the last, and some between, so that a fused layer shows its order."""
    tokens, rows = output[..., 0].numel(), output.shape[-1]
    return list(enumerate([0, rows - 1, rows // 2, rows // 2 - 1, rows // 3, 2 * rows // 3][:tokens]))


def _same(one: Any, other: Any) -> bool:
    ours, theirs = _tensors(one), _tensors(other)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in what a model returns."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in fields(value)]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, (list, tuple)) else []
