"""What each block of a model gets and gives in the forwards of a calibration set, in 16 bits on the CPU."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from thanos_lightning.collect.inputs import Seen
from thanos_lightning.plan.options import TOKENS_PER_STEP
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import Failures


class Reference(NamedTuple):
    """Stands for a tensor in `HiddenStates.others`."""

    digest: str


@dataclass(frozen=True)
class Call:
    """One call of a block, with one batch of sequences."""

    inputs: Tensor  # the hidden states that the block got: (batch, length, width), float16 or bfloat16
    outputs: Tensor  # those that it gave: (batch, length, any width); empty until it has returned
    args: tuple[Any, ...]  # its other positional arguments, with a `Reference` for each tensor
    kwargs: Mapping[str, Any]  # its keyword arguments likewise
    keyword: str | None  # name of the argument that has the hidden states; None if it is the first positional one
    counted: Reference | None  # of the mask of tokens that count, (batch, length); None if all do
    dtype: torch.dtype  # of the hidden states in the model
    computes_in: torch.dtype | None  # the 16-bit dtype of matrix products, None for float32


def parts_of(shape: tuple[int, ...]) -> list[slice]:
    """The sequences of each step on a batch of hidden states of this shape, (batch, length, width)."""
    number, *length, _ = shape
    together = max(1, TOKENS_PER_STEP // max(1, math.prod(length)))
    return [slice(first, first + together) for first in range(0, number, together)]


class _RefusedError(Exception):
    """A block can't be called again with what it got."""


@dataclass
class HiddenStates:
    """Records the calls of blocks, by hooks, during the forwards inside `recording`."""

    blocks: Mapping[str, nn.Module]  # by name
    steps: int  # of training that the recorded batches are wanted for; further batches are not recorded
    failures: Failures = field(default_factory=Failures)  # keeps an error of a hook while other ranks would wait
    calls: dict[str, dict[int, Call]] = field(default_factory=dict)  # block -> number of the batch -> its call
    others: dict[str, Tensor] = field(default_factory=dict)  # other tensors that blocks got, on the CPU, by digest
    refused: dict[str, str] = field(default_factory=dict)  # block that can't be called again -> the reason
    _hooks: ExitStack = field(default_factory=ExitStack)
    _number: int | None = None  # of the batch
    _counted: Reference | None = None
    _begun: dict[str, Call] = field(default_factory=dict)
    _known: dict[int, tuple[Tensor, Reference]] = field(default_factory=dict)  # by id, within a batch
    _last: tuple[Seen, Tensor] | None = None  # the last output, and its copy

    def start(self) -> None:
        """Add the hooks."""
        for name, block in self.blocks.items():
            self._hooks.enter_context(block.register_forward_pre_hook(partial(self._before, name), with_kwargs=True))
            self._hooks.enter_context(block.register_forward_hook(partial(self._after, name)))

    def stop(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    @contextmanager
    def recording(self, number: int, counted: Callable[[], Tensor | None] | None, ranks: int = 1) -> Iterator[None]:
        """Record the forward of a batch, unless the batches so far are enough for this rank's share of the steps.

        `counted` returns the mask of tokens that count, bool (batch, length), or None for all.
        """
        of_blocks = [sum(len(parts_of(call.inputs.shape)) for call in calls.values()) for calls in self.calls.values()]
        if max(of_blocks, default=0) * ranks < self.steps and self.failures.error is None:
            with self.failures.catching():
                mask = None if counted is None else counted()
                self._counted = None if mask is None or bool(mask.all()) else self._reference(mask)
            self._number = number
        try:
            yield
        finally:
            self._number, self._counted, self._last = None, None, None
            self._begun.clear()
            self._known.clear()

    # Hooks

    def _is_recording(self, name: str) -> bool:
        return self._number is not None and name not in self.refused and self.failures.error is None

    @contextmanager
    def _refusing(self, name: str) -> Iterator[None]:
        with self.failures.catching():
            try:
                yield
            except _RefusedError as why:
                self.refused[name] = str(why)
                self.calls.pop(name, None)

    def _before(self, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_recording(name):
            return
        with self._refusing(name):
            if name in self._begun or self._number in self.calls.get(name, {}):
                raise _RefusedError("is called more than once in a forward")
            keyword = None if args else next(iter(kwargs), None)
            hidden = args[0] if args else kwargs.get(keyword or "")
            if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.ndim < 3:
                raise _RefusedError(f"gets no hidden states (batch, length, width) first, but {_said(hidden)}")
            if hidden.is_inference():
                raise _RefusedError("is called under torch.inference_mode, whose tensors can't be trained on")
            last = self._last  # what one block gives is what the next one gets
            self._begun[name] = Call(
                args=tuple(self._plain("", value) for value in args[1:]),
                kwargs={key: self._plain(key, value) for key, value in kwargs.items() if key != keyword},
                inputs=last[1] if last is not None and last[0].is_of(hidden) else _stored(hidden),
                outputs=torch.empty(0, device="cpu"),
                keyword=keyword,
                counted=self._counted,
                dtype=hidden.dtype,
                computes_in=_computes_in(hidden),
            )

    def _after(self, name: str, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._is_recording(name) or name not in self._begun:
            return
        with self._refusing(name):
            call = self._begun.pop(name)
            hidden, shape = first_of(output), call.inputs.shape
            if not isinstance(hidden, Tensor) or hidden.shape[:-1] != shape[:-1]:
                raise _RefusedError(f"gives no hidden states (batch, length, width) first, but {_said(hidden)}")
            if self._counted is not None and self.others[self._counted.digest].shape != shape[:2]:
                raise _RefusedError(f"gets {tuple(shape[:2])} hidden states, of which no mask says which count")
            outputs = _stored(hidden)
            self._last = Seen(hidden), outputs
            assert self._number is not None
            self.calls.setdefault(name, {})[self._number] = replace(call, outputs=outputs)

    def _plain(self, name: str, value: Any) -> Any:
        """The value with a reference for each tensor."""
        if isinstance(value, Tensor):
            return self._reference(value)
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            return value
        if isinstance(value, Cache):
            return None  # it was empty before this forward, which doesn't read what it writes
        if type(value) in (tuple, list):
            return type(value)(self._plain(name, entry) for entry in value)
        if type(value) is dict:
            return {key: self._plain(key, entry) for key, entry in value.items()}
        raise _RefusedError(f"gets {f'{name}=' if name else ''}{_said(value)}")

    def _reference(self, tensor: Tensor) -> Reference:
        if id(tensor) not in self._known:
            copy = tensor.detach().to("cpu", copy=True).contiguous()
            described = f"{copy.dtype} {tuple(copy.shape)}".encode()
            data = copy.reshape(-1).view(torch.uint8).numpy().tobytes()
            reference = Reference(hashlib.sha256(described + data).hexdigest())
            self.others.setdefault(reference.digest, copy)
            self._known[id(tensor)] = tensor, reference  # with the tensor, so that no other one gets its id
        return self._known[id(tensor)][1]


def first_of(output: Any) -> Any:
    """The hidden states in a block's output."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _stored(hidden: Tensor) -> Tensor:
    dtype = torch.float16 if hidden.dtype == torch.float16 else torch.bfloat16
    return hidden.detach().to("cpu", dtype, copy=True)


def _computes_in(hidden: Tensor) -> torch.dtype | None:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype if hidden.dtype in (torch.float16, torch.bfloat16) else None


@dataclass(frozen=True)
class SharedStates:
    """The calls that all ranks have recorded."""

    # block -> batch, in order -> the rank that recorded it, and the call, whose hidden states are on the meta device
    outlines: Mapping[str, Mapping[int, tuple[int, Call]]]
    others: Mapping[str, Tensor]  # all tensors that calls refer to
    refused: Mapping[str, str]  # blocks that can't be called again -> the reason

    @classmethod
    def of(cls, states: HiddenStates, access: ParameterAccess) -> SharedStates:
        """Tell all ranks what each has recorded. All ranks must call it, and get the same."""
        recorded = {
            name: {
                number: replace(call, inputs=call.inputs.to("meta"), outputs=call.outputs.to("meta"))
                for number, call in calls.items()
            }
            for name, calls in states.calls.items()
        }
        shapes = {digest: tensor.to("meta") for digest, tensor in states.others.items()}
        by_rank = access.gather((recorded, shapes, states.refused))
        refused = {name: why for *_, of_rank in reversed(by_rank) for name, why in of_rank.items()}
        outlines: dict[str, Mapping[int, tuple[int, Call]]] = {}
        for name in states.blocks:
            if name not in refused:
                calls = {
                    number: (rank, outline)
                    for rank, (of_rank, *_) in enumerate(by_rank)
                    for number, outline in of_rank.get(name, {}).items()
                }
                outlines[name] = dict(sorted(calls.items()))
        others = dict(states.others)
        described = {digest: tensor for _, of_rank, _ in by_rank for digest, tensor in of_rank.items()}
        for digest in sorted(described):
            holders = [rank for rank, (_, of_rank, _) in enumerate(by_rank) if digest in of_rank]
            if len(holders) < access.world_size:
                tensor = others.setdefault(digest, torch.empty_like(described[digest], device="cpu"))
                access.broadcast(tensor, holders[0])
        return cls(outlines, others, refused)


def collect_calls(
    name: str, states: HiddenStates, shared: SharedStates, owner: int, access: ParameterAccess
) -> list[Call] | None:
    """Return all calls of a block on its owner, in order of batches, and forget this rank's own. All must call it."""
    recorded = states.calls.pop(name, {})
    calls = []
    for number, (rank, outline) in shared.outlines[name].items():
        call = recorded.get(number, outline)
        inputs, outputs = (
            access.send(tensor, source=rank, destination=owner, shape=tensor.shape, dtype=tensor.dtype)
            for tensor in (call.inputs, call.outputs)
        )
        if access.rank == owner:
            assert inputs is not None
            assert outputs is not None
            calls.append(replace(call, inputs=inputs.cpu(), outputs=outputs.cpu()))
    return calls if access.rank == owner else None
