"""Second moments of the layers' inputs: which tokens count, and which layers share one sum."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from thanos_lightning.collect.tokens import CountedTokens
from thanos_lightning.layers.experts import ExpertMatrix, one_by_one
from thanos_lightning.layers.targets import Layer
from thanos_lightning.layers.wrappers import run_eagerly
from thanos_lightning.ranks.talk import Failures
from thanos_lightning.report.stopwatch import Stopwatch
from thanos_lightning.solver import HessianAccumulator


class Seen:
    """Identifies the input of a layer or block, to tell whether another one is called with the same input.

    It compares memory, not tensors, because DeepSpeed gives each module another view of its input. A weak reference
    lets checkpointing free the memory, but no other storage gets the same address while this object lives.
    """

    def __init__(self, inputs: Tensor) -> None:
        self._storage: Any = StorageWeakRef(inputs.untyped_storage())  # type: ignore[no-untyped-call]
        self._place = self._place_of(inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Seen:
        return self  # a copied module copies its hooks, and a second owner of the weak reference would free it twice

    @staticmethod
    def _place_of(inputs: Tensor) -> tuple[Any, ...] | None:
        """Which memory a tensor is, and its version; None under torch.inference_mode, which keeps no versions."""
        if inputs.is_inference():
            return None
        return inputs._version, inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype

    def is_of(self, inputs: Tensor) -> bool:
        """Whether this tensor is the same memory, and nothing has written to it since."""
        return (
            self._place is not None
            and self._place == self._place_of(inputs)
            and not self._storage.expired()
            and self._storage == StorageWeakRef(inputs.untyped_storage())  # type: ignore[no-untyped-call]
        )


@dataclass
class _Statistics:
    """An accumulator, and its latest inputs, by which a layer with the same inputs is found."""

    accumulator: HessianAccumulator
    updates: int = 0
    last: Seen | None = None

    def saw(self, inputs: Tensor) -> bool:
        return self.last is not None and self.last.is_of(inputs)

    @torch.no_grad()  # a recomputed forward skips this, and checkpoint() would miss tensors that autograd saved here
    def update(self, inputs: Tensor, counted: Tensor | None) -> None:
        """Count the rows with the indices `counted`, or all rows if it is None."""
        self.last = Seen(inputs)
        if counted is not None:
            inputs = inputs.reshape(-1, inputs.shape[-1]).index_select(0, counted)
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind) and inputs.dtype != torch.float64:
            inputs = inputs.to(torch.get_autocast_dtype(kind))  # as the layer rounds them before it multiplies
        self.accumulator.update(inputs)
        self.updates += 1

    def state(self) -> dict[str, Any]:
        triangle, num_tokens = self.accumulator.triangle, self.accumulator.num_tokens
        return {"sum": triangle.to("cpu", copy=True), "num_tokens": num_tokens, "updates": self.updates}


@dataclass
class InputStatistics:
    """Accumulates Σ x xᵀ and the number of tokens for a window of layers, by forward hooks.

    The hooks exist between `start` and `stop` and count only inside `counting`. A forward that runs inside a backward
    (activation checkpointing recomputes) counts nothing: its tokens were counted before. Layers that are called with
    the same tensor (q, k, v; gate, up) share one accumulator.

    With more than one rank, `failures` keeps the error of a hook: an error that is raised at once would leave the other
    ranks waiting in the forward. Nothing is counted after an error. `stopwatch` measures the time that the hooks take.
    """

    layers: Mapping[str, Layer]
    failures: Failures = field(default_factory=Failures)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    _by_layer: dict[str, _Statistics] = field(default_factory=dict)
    _latest: dict[int, _Statistics] = field(default_factory=dict)  # address of an input -> statistics begun with it
    _updates: dict[str, int] = field(default_factory=dict)  # layer -> updates of its statistics when it was last called
    _hooks: ExitStack = field(default_factory=ExitStack)
    _is_counting: bool = False
    _counted: CountedTokens | None = None

    def start(self, root: nn.Module | None = None) -> None:
        """Add the hooks. Compiled modules in `root` run as plain Python until `stop`: graphs ignore new hooks."""
        if root is not None:
            self._hooks.callback(run_eagerly(root))
        self._hooks.callback(one_by_one(module for layer in self.layers.values() for module in layer.modules))
        for name, layer in self.layers.items():
            for module in layer.modules:
                hook = module.register_forward_pre_hook(partial(self._hook, name), with_kwargs=True)
                self._hooks.enter_context(hook)

    def stop(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def begin(self, counted: Tensor | Callable[[], Tensor | None] | None = None) -> None:
        """Count the forwards from now on.

        `counted` is a mask, bool (batch, length), True = the token counts; None counts all tokens. A function that
        returns the mask is called here, and an error of the function is kept like an error of a hook.
        """
        with self.failures.catching():
            mask = counted() if callable(counted) else counted
            self._counted = None if mask is None else CountedTokens(mask.cpu())
        self._is_counting = self.failures.error is None

    def end(self) -> None:
        """Stop counting."""
        self._is_counting, self._counted = False, None
        for name, updates in self._updates.items():
            if updates < self._by_layer[name].updates:
                self._part(name)

    def _part(self, name: str) -> None:
        """Give a layer separate statistics when it stops sharing its inputs."""
        warnings.warn(
            f"layer {name} no longer gets the inputs of the layer with which it shared statistics: the inputs of both "
            "are counted apart from here on, and up to one batch was counted for a layer that did not get it",
            stacklevel=2,
        )
        shared = self._by_layer[name]
        accumulator = HessianAccumulator.of_sum(shared.accumulator.triangle.clone(), shared.accumulator.num_tokens)
        self._by_layer[name], self._updates[name] = _Statistics(accumulator, shared.updates), shared.updates

    @contextmanager
    def counting(self, counted: Tensor | Callable[[], Tensor | None] | None = None) -> Iterator[None]:
        """`begin` and `end` around a block."""
        self.begin(counted)
        try:
            yield
        finally:
            self.end()

    def _hook(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_counting or torch._C._current_graph_task_id() != -1:
            return
        inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
        tokens = None
        if isinstance(module, ExpertMatrix):
            tokens = args[3] if len(args) > 3 else kwargs["tokens"], kwargs["of"]
        with self.failures.catching(), self.stopwatch.running(inputs.device):
            self._count(name, inputs, tokens)
        self._is_counting = self.failures.error is None

    def _count(self, name: str, inputs: Tensor, tokens: tuple[Tensor, int] | None) -> None:
        if name not in self._by_layer:
            latest = self._latest.get(inputs.data_ptr())
            # A sum of more than this one input contains tokens that this layer never saw.
            if latest is None or latest.updates > 1 or not latest.saw(inputs):
                latest = _Statistics(HessianAccumulator(self.layers[name].cols, device=inputs.device))
                self._latest[inputs.data_ptr()] = latest
            self._by_layer[name], self._updates[name] = latest, 0
        elif self._updates[name] < self._by_layer[name].updates and not self._by_layer[name].saw(inputs):
            self._part(name)  # another layer has just added a different input to the shared sum
        statistics = self._by_layer[name]
        if self._updates[name] == statistics.updates:  # no other layer has added this input
            statistics.update(inputs, self._rows_that_count(name, inputs, tokens))
        self._updates[name] = statistics.updates

    def _rows_that_count(self, name: str, inputs: Tensor, tokens: tuple[Tensor, int] | None) -> Tensor | None:
        """Return the indices of the rows that count, on the inputs' device; None if all rows count.

        `tokens` is for experts alone: the expert's tokens, as indices into the mixture's tokens, and the number of the
        mixture's tokens.
        """
        counted, leading = self._counted, inputs.shape[:-1]
        if counted is None or counted.all:
            return None
        shape = counted.shape
        if tokens is not None and tokens[1] == shape.numel():
            return torch.isin(tokens[0], counted.rows(inputs.device)).nonzero().squeeze(1)
        leading = leading if tokens is None else torch.Size(tokens[1:])
        alike = leading == shape or (len(leading) == 1 and len(inputs) == shape.numel())
        if alike or (len(leading) > 2 and leading[0] == shape[0] and leading.numel() == shape.numel()):
            return counted.rows(inputs.device)
        if leading == shape[::-1]:
            return counted.rows(inputs.device, sequence_first=True)
        if leading == shape[:1]:
            return None  # one vector per sequence (a pooled layer)
        raise ValueError(
            f"the inputs of layer {name} have shape {tuple(inputs.shape)}, which does not show which of the "
            f"{tuple(shape)} tokens of the attention mask they are, so padding would count. Pack sequences "
            f"without padding, set attention_mask_key to None to count every token, or add {name!r} to ignore"
        )

    @property
    def accumulators(self) -> dict[str, HessianAccumulator]:
        """Layer name -> accumulator. Layers with the same inputs have the same object; unused layers are missing."""
        return {name: self._by_layer[name].accumulator for name in self.layers if name in self._by_layer}

    def state(self) -> dict[str, Any]:
        """Return the sums so far as plain values, for `load_states`."""
        leaders: dict[int, str] = {}
        leader = {name: leaders.setdefault(id(statistics), name) for name, statistics in self._by_layer.items()}
        return {"leader": leader, "sums": {name: self._by_layer[name].state() for name in leaders.values()}}

    def load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the sum of one or several `state`s of the same layers, one from each process."""
        if any(state["leader"] != states[0]["leader"] for state in states):
            states = [_unshared(state) for state in states]
        loaded: dict[str, _Statistics] = {}
        for state in states:
            for name, saved in state["sums"].items():
                triangle = saved["sum"].to(self.layers[name].parameter.device, copy=True)
                part = HessianAccumulator.of_sum(triangle, saved["num_tokens"])
                if name in loaded:
                    loaded[name].accumulator.merge(part)
                else:
                    loaded[name] = _Statistics(part)
                loaded[name].updates += saved["updates"]
        self._by_layer = {name: loaded[leader] for state in states for name, leader in state["leader"].items()}
        self._updates = {name: statistics.updates for name, statistics in self._by_layer.items()}


def _unshared(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same state with a separate sum for each layer."""
    return {
        "leader": {name: name for name in state["leader"]},
        "sums": {name: state["sums"][leader] for name, leader in state["leader"].items()},
    }
