"""Second moments of the layers' inputs: which tokens count, which layers share them, which are held at one time."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thanos_lightning.schedule import Event
from thanos_lightning.solver import HessianAccumulator, Pattern
from thanos_lightning.targets import PrunableLayer


def token_mask(batch: Any, key: str = "attention_mask") -> Tensor | None:
    """The mask of the tokens that count, from a batch: bool (batch, length), or None where all of them do.

    Raises:
        ValueError: If the batch has a mask that is not of the shape (batch, length).

    Example:
        >>> token_mask({"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])})
        tensor([[ True, False]])
    """
    mask = batch.get(key) if isinstance(batch, Mapping) else None
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(
            f"the batch's {key!r} has shape {tuple(mask.shape)}: to tell padding from tokens it must be "
            "(batch, length). Name another key in attention_mask_key, or None to count every token"
        )
    counted: Tensor = mask.bool()
    return counted


@dataclass
class _Statistics:
    """One accumulator and what is needed to tell whether another layer sees the same inputs."""

    accumulator: HessianAccumulator
    updates: int = 0
    # weak: the collector must not keep activations alive that checkpointing wants freed
    last_input: weakref.ref[Tensor] | None = None
    last_version: int = -1

    def saw(self, inputs: Tensor) -> bool:
        return self.last_input is not None and self.last_input() is inputs and self.last_version == inputs._version

    def update(self, inputs: Tensor, counted: Tensor | None) -> None:
        self.accumulator.update(inputs, counted)
        self.updates += 1
        self.last_input, self.last_version = weakref.ref(inputs), inputs._version


@dataclass
class InputStatistics:
    """Accumulates Σ x xᵀ and the number of tokens for a window of layers, by forward hooks.

    The hooks exist between `start` and `stop` and count only inside `counting`. A forward that runs inside a backward
    (activation checkpointing recomputes) counts nothing: its tokens were counted before. Layers that are called with
    the same tensor (q, k, v; gate, up) share one accumulator.

    Args:
        layers: Name -> layer of the window.

    Example:
        >>> from thanos_lightning.targets import find_targets
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> statistics = InputStatistics(find_targets(model))
        >>> statistics.start()
        >>> with statistics.counting():
        ...     _ = model(torch.ones(3, 8))
        >>> statistics.stop()
        >>> statistics.accumulators["0"].num_tokens
        3
    """

    layers: Mapping[str, PrunableLayer]
    _by_layer: dict[str, _Statistics] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)
    _is_counting: bool = False
    _counted: Tensor | None = None

    def start(self) -> None:
        """Add the hooks."""
        for name, layer in self.layers.items():
            for module in layer.modules:
                self._handles.append(module.register_forward_pre_hook(partial(self._hook, name), with_kwargs=True))

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def begin(self, counted: Tensor | None = None) -> None:
        """Count the forwards from now on.

        Args:
            counted: Bool (batch, length), True = the token counts; None counts all.
        """
        self._is_counting, self._counted = True, counted

    def end(self) -> None:
        """Stop counting."""
        self._is_counting, self._counted = False, None

    @contextmanager
    def counting(self, counted: Tensor | None = None) -> Iterator[None]:
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
        own = self._by_layer.get(name)
        if own is None:
            # a leader that has counted more than this input has tokens that this layer never saw
            own = next((other for other in self._by_layer.values() if other.updates == 1 and other.saw(inputs)), None)
            if own is None:
                own = _Statistics(HessianAccumulator(self.layers[name].cols, device=inputs.device))
                own.update(inputs, self._rows_that_count(name, inputs))
            self._by_layer[name] = own
        elif self._seen[name] < own.updates:  # a layer with the same inputs has come first
            if not own.saw(inputs):
                warnings.warn(
                    f"layer {name} has stopped sharing its inputs with another layer: its statistics start again here",
                    stacklevel=2,
                )
                own = self._by_layer[name] = _Statistics(
                    HessianAccumulator(self.layers[name].cols, device=inputs.device)
                )
                own.update(inputs, self._rows_that_count(name, inputs))
        else:
            own.update(inputs, self._rows_that_count(name, inputs))
        self._seen[name] = own.updates

    def _rows_that_count(self, name: str, inputs: Tensor) -> Tensor | None:
        counted = self._counted
        if counted is None or inputs.shape[:-1] == counted.shape:
            return counted
        if inputs.shape[:-1].numel() == counted.numel():
            return counted.reshape(inputs.shape[:-1])
        if inputs.shape[:-1].numel() == counted.shape[0] or bool(counted.all()):
            return None  # one vector a sequence (a pooled layer), or nothing to leave out
        raise ValueError(
            f"the inputs of layer {name} have shape {tuple(inputs.shape)}, which does not show which of the "
            f"{tuple(counted.shape)} tokens of the attention mask they are, so padding would count. Pack sequences "
            f"without padding, set attention_mask_key to None to count every token, or add {name!r} to ignore"
        )

    @property
    def accumulators(self) -> dict[str, HessianAccumulator]:
        """Layer name -> accumulator. Layers with the same inputs have the same object; unused layers are missing."""
        return {name: self._by_layer[name].accumulator for name in self.layers if name in self._by_layer}

    def state(self) -> dict[str, Any]:
        """The sums so far, as plain values: what `load_state` reads."""
        leaders: dict[int, str] = {}
        for name, statistics in self._by_layer.items():
            leaders.setdefault(id(statistics), name)
        return {
            "leader": {name: leaders[id(statistics)] for name, statistics in self._by_layer.items()},
            "sums": {
                name: {
                    "sum": self._by_layer[name].accumulator.sum.cpu(),
                    "num_tokens": self._by_layer[name].accumulator.num_tokens,
                    "updates": self._by_layer[name].updates,
                }
                for name in leaders.values()
            },
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of the same layers."""
        loaded: dict[str, _Statistics] = {}
        for name, saved in state["sums"].items():
            layer = self.layers[name]
            accumulator = HessianAccumulator(layer.cols, device=layer.parameter.device)
            accumulator.sum.copy_(saved["sum"])
            accumulator.num_tokens = saved["num_tokens"]
            loaded[name] = _Statistics(accumulator, updates=saved["updates"])
        self._by_layer = {name: loaded[leader] for name, leader in state["leader"].items()}
        self._seen = {name: statistics.updates for name, statistics in self._by_layer.items()}


def count_dataloader(
    statistics: InputStatistics,
    batches: Iterable[Any],
    forward: Any,
    *,
    rank: int = 0,
    world_size: int = 1,
    attention_mask_key: str | None = "attention_mask",
) -> int:
    """Count the batches of a calibration set, without gradients.

    Args:
        statistics: What counts; its hooks are added and removed here.
        batches: The calibration batches. Rank r takes batches r, r + world_size, …
        forward: Called with each batch: moves it to the device and runs the model.
        rank: This rank.
        world_size: Number of ranks that share the batches.
        attention_mask_key: Where the mask of real tokens is in a batch.

    Returns:
        The number of batches that this rank counted.
    """
    num_batches = 0
    statistics.start()
    try:
        for batch in itertools.islice(batches, rank, None, world_size):
            counted = token_mask(batch, attention_mask_key) if attention_mask_key else None
            with torch.no_grad(), statistics.counting(counted):
                forward(batch)
            num_batches += 1
    finally:
        statistics.stop()
    return num_batches


@dataclass(frozen=True)
class Window:
    """The layers whose Hessians are held at one time, and when.

    Attributes:
        event: The event that the window belongs to.
        patterns: Layer name -> what to prune the layer to, front to back.
        start_step: Optimizer steps taken when collecting starts. Equal to `end_step` where nothing is collected from
            training batches.
        end_step: Optimizer steps taken when the window is pruned.
        is_last: Whether the event is complete after it.
    """

    event: Event
    patterns: Mapping[str, Pattern]
    start_step: int
    end_step: int
    is_last: bool


def hessian_bytes(layer: PrunableLayer) -> int:
    """Memory of a layer's accumulator: in_features² fp32 numbers."""
    return 4 * layer.cols**2


def split_by_memory(layers: Sequence[PrunableLayer], budget_gib: float | None) -> list[list[PrunableLayer]]:
    """Split layers, front to back, into groups whose Hessians fit a budget.

    Which layers share their inputs is known only after a forward, so each layer is counted in full: a bound from above.

    Raises:
        ValueError: If one layer alone is over the budget, naming it and what it takes.
    """
    if budget_gib is None:
        return [list(layers)]
    budget = budget_gib * 2**30
    groups: list[list[PrunableLayer]] = [[]]
    held = 0
    for layer in layers:
        needed = hessian_bytes(layer)
        if needed > budget:
            raise ValueError(
                f"the Hessian of layer {layer.name} takes {needed / 2**30:.3g} GiB, more than hessian_memory_gib = "
                f"{budget_gib}: raise it, or add {layer.name!r} to ignore"
            )
        if held + needed > budget and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(layer)
        held += needed
    return groups


def plan_windows(
    work: Sequence[tuple[Event, Mapping[str, Pattern]]],
    layers: Mapping[str, PrunableLayer],
    *,
    calibration_steps: int,
    budget_gib: float | None = None,
) -> list[Window]:
    """Place each event's windows before its step, one after the other, the last one ending at it.

    A window never reaches back past the event before: its statistics would be those of weights that are gone.

    Args:
        work: Events in order, and what each prunes.
        layers: Name -> layer.
        calibration_steps: Optimizer steps that a window collects, at most; 0 where nothing is collected in training.
        budget_gib: Memory for the Hessians of a window.

    Returns:
        The windows in order of time.

    Raises:
        ValueError: If an event has more windows than there are steps before it.
    """
    windows: list[Window] = []
    before = 0
    for event, patterns in work:
        groups = split_by_memory([layers[name] for name in patterns], budget_gib)
        available = event.step - before
        length = min(calibration_steps, available // len(groups))
        if calibration_steps and not length:
            raise ValueError(
                f"the event at optimizer step {event.step} needs statistics from {len(groups)} window(s) of at least "
                f"one step each, but there are {available} since {'the last event' if before else 'the start'}: start "
                "or space the events later (start_step, every_n_steps), raise hessian_memory_gib, or give a "
                "calibration_dataloader"
            )
        for index, group in enumerate(groups):
            end = event.step - (len(groups) - 1 - index) * length
            windows.append(
                Window(
                    event=event,
                    patterns={layer.name: patterns[layer.name] for layer in group},
                    start_step=end - length,
                    end_step=end,
                    is_last=index == len(groups) - 1,
                )
            )
        before = event.step
    return windows
