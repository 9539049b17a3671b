"""Second moments of the layers' inputs: which tokens count, and which layers share them."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from thanos_lightning.arguments import number_of_batches
from thanos_lightning.progress import open_phase
from thanos_lightning.sharding import ParameterAccess
from thanos_lightning.sharding.kept import KeptError
from thanos_lightning.solver import HessianAccumulator
from thanos_lightning.stopwatch import Stopwatch
from thanos_lightning.targets import PrunableLayer

# How much each output counts is known from fewer tokens than how inputs go together, and a backward takes twice as long
# as a forward. How outputs go together is not: with joined rows the perplexity after pruning was 4 % lower by the
# gradients of every batch.
BATCHES_PER_BACKWARD = {"alone": 4, "joined": 1}


def token_mask(batch: Any, key: str = "attention_mask") -> Tensor | None:
    """The mask of the tokens that count, from anywhere in a batch: bool (batch, length), or None where it has none.

    It lies on the CPU: from a device it is copied, once, since what follows from it is asked on the host.

    Args:
        batch: Mappings, lists and tuples, nested as a dataloader gives them.
        key: Name of the mask in a mapping: 1 or True for a token that counts.

    Raises:
        ValueError: If there are several masks, or one that is not of the shape (batch, length), or additive.

    Examples:
        >>> token_mask({"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])})
        tensor([[ True, False]])
    """
    masks = list(_find(batch, key))
    if not masks:
        return None
    if len(masks) > 1:
        raise ValueError(
            f"the batch has {len(masks)} masks named {key!r}, which does not show which tokens a layer sees: give the "
            "callback calibration.batches with one, or calibration.attention_mask_key=None to count every token"
        )
    mask = torch.as_tensor(masks[0]).cpu()
    if mask.dim() != 2 or bool((mask < 0).any()):
        raise ValueError(
            f"the batch's {key!r} has shape {tuple(mask.shape)} and dtype {mask.dtype}: to tell padding from tokens it "
            "must be (batch, length), 1 for a token and 0 for padding. Name another key in attention_mask_key, or None "
            "to count every token"
        )
    return mask.bool()


def has_text(batch: Any) -> bool:
    """Whether a batch is a language model's, of which some tokens may be padding."""
    return next(_find(batch, "input_ids"), None) is not None


def _find(batch: Any, key: str) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        for name, value in batch.items():
            if name == key and value is not None:
                yield value
            else:
                yield from _find(value, key)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _find(value, key)


def _version(tensor: Tensor) -> int | None:
    """Changes when the tensor is written to; None where nobody counts (torch.inference_mode)."""
    return None if tensor.is_inference() else tensor._version


class _Seen:
    """What a layer was called with, to tell whether another layer is called with the same.

    The memory counts, not the tensor: DeepSpeed gives each module another view of its input. It is not kept alive, so
    that checkpointing can free it; but while this object lives, its address is not given to other memory.
    """

    def __init__(self, inputs: Tensor) -> None:
        self._storage: Any = StorageWeakRef(inputs.untyped_storage())  # type: ignore[no-untyped-call]
        self._place = self._place_of(inputs)
        self._version = _version(inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Seen:
        return self  # of a copied module's hooks: two owners of one weak reference would free it twice

    @staticmethod
    def _place_of(inputs: Tensor) -> tuple[Any, ...]:
        return inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype

    def is_of(self, inputs: Tensor) -> bool:
        """Whether this tensor is the same memory, which nobody has written to since."""
        return (
            self._version is not None
            and self._version == _version(inputs)
            and self._place == self._place_of(inputs)
            and not self._storage.expired()
            and self._storage == StorageWeakRef(inputs.untyped_storage())  # type: ignore[no-untyped-call]
        )


class _Counted:
    """Which tokens of a batch count, as numbers of rows: to select by them, a device is not waited for.

    Args:
        mask: Bool (batch, length), on the CPU.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        self._mask = mask
        self._rows: dict[tuple[torch.device, bool], Tensor] = {}
        self.all = bool(mask.all())

    def rows(self, device: torch.device, *, sequence_first: bool = False) -> Tensor:
        """The numbers of the rows that count, of inputs whose leading dimensions are flat: int64, on the device."""
        key = (device, sequence_first)
        if key not in self._rows:
            rows = (self._mask.T if sequence_first else self._mask).flatten().nonzero().squeeze(1)
            self._rows[key] = rows.to(device, non_blocking=True)
        return self._rows[key]


@dataclass
class _Statistics:
    """One accumulator and what is needed to tell whether another layer sees the same inputs."""

    accumulator: HessianAccumulator
    updates: int = 0
    last: _Seen | None = None

    def saw(self, inputs: Tensor) -> bool:
        return self.last is not None and self.last.is_of(inputs)

    def update(self, inputs: Tensor, counted: Tensor | None) -> None:
        """Count the rows of these numbers, or all."""
        if counted is not None:
            inputs = inputs.reshape(-1, inputs.shape[-1]).index_select(0, counted)
        self.accumulator.update(inputs)
        self.updates += 1
        self.last = _Seen(inputs)

    def fork(self) -> _Statistics:
        """Statistics of their own for a layer that shared these."""
        forked = HessianAccumulator(len(self.accumulator.triangle), device=self.accumulator.triangle.device)
        forked.merge(self.accumulator)
        return _Statistics(forked, self.updates)


@dataclass
class InputStatistics:
    """Accumulates Σ x xᵀ and the number of tokens for a window of layers, by forward hooks.

    The hooks exist between `start` and `stop` and count only inside `counting`. A forward that runs inside a backward
    (activation checkpointing recomputes) counts nothing: its tokens were counted before. Layers that are called with
    the same tensor (q, k, v; gate, up) share one accumulator.

    Args:
        layers: Name -> layer of the window.
        kept: With more than one rank, an error in a rank's own batch must not end its forward, in which the others
            wait for it. It is kept here, and nothing is counted any more.
        stopwatch: What the hooks have taken.

    Examples:
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
    kept: KeptError = field(default_factory=lambda: KeptError(keeps=False))
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    _by_layer: dict[str, _Statistics] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)
    _handles: list[RemovableHandle] = field(default_factory=list)
    _is_counting: bool = False
    _counted: _Counted | None = None

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

    def begin(self, counted: Tensor | Callable[[], Tensor | None] | None = None) -> None:
        """Count the forwards from now on.

        Args:
            counted: Bool (batch, length), True = the token counts; None counts all. Or what finds it in the batch, of
                which an error is kept like those of the hooks.
        """
        with self.kept.keeping():
            mask = counted() if callable(counted) else counted
            self._counted = None if mask is None else _Counted(mask.cpu())
        self._is_counting = self.kept.error is None

    def end(self) -> None:
        """Stop counting."""
        self._is_counting, self._counted = False, None
        for name, seen in self._seen.items():
            if seen < self._by_layer[name].updates:
                self._part(name)

    def _part(self, name: str) -> None:
        """Give a layer that shared its inputs until now statistics of its own."""
        warnings.warn(
            f"layer {name} no longer sees the inputs of another layer that it shared statistics with: they are counted "
            "apart from here on, and up to one batch was counted for a layer that did not see it",
            stacklevel=2,
        )
        self._by_layer[name] = self._by_layer[name].fork()
        self._seen[name] = self._by_layer[name].updates

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
        with self.kept.keeping(), self.stopwatch.running(inputs.device):
            self._count(name, inputs)
        self._is_counting = self.kept.error is None

    def _count(self, name: str, inputs: Tensor) -> None:
        own = self._by_layer.get(name)
        if own is None:
            # a leader that has counted more than this input has tokens that this layer never saw
            own = next((other for other in self._by_layer.values() if other.updates == 1 and other.saw(inputs)), None)
            if own is None:
                own = _Statistics(HessianAccumulator(self.layers[name].cols, device=inputs.device))
                own.update(inputs, self._rows_that_count(name, inputs))
            self._by_layer[name] = own
        elif self._seen[name] == own.updates:
            own.update(inputs, self._rows_that_count(name, inputs))
        elif not own.saw(inputs):  # a layer that shared these inputs has come first, with others
            self._part(name)
            own = self._by_layer[name]
            own.update(inputs, self._rows_that_count(name, inputs))
        self._seen[name] = own.updates

    def _rows_that_count(self, name: str, inputs: Tensor) -> Tensor | None:
        """Their numbers, on the device of the inputs; None for all."""
        counted, leading = self._counted, inputs.shape[:-1]
        if counted is None or counted.all:
            return None
        shape = counted.shape
        alike = leading == shape or (len(leading) == 1 and len(inputs) == shape.numel())
        if alike or (len(leading) > 2 and leading[0] == shape[0] and leading.numel() == shape.numel()):
            return counted.rows(inputs.device)
        if leading == shape[::-1]:
            return counted.rows(inputs.device, sequence_first=True)
        if leading == shape[:1]:
            return None  # one vector a sequence (a pooled layer)
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
        """The sums so far, as plain values: what `load_state` reads."""
        leaders: dict[int, str] = {}
        for name, statistics in self._by_layer.items():
            leaders.setdefault(id(statistics), name)
        return {
            "leader": {name: leaders[id(statistics)] for name, statistics in self._by_layer.items()},
            "sums": {
                name: {
                    "sum": self._by_layer[name].accumulator.triangle.to("cpu", copy=True),
                    "num_tokens": self._by_layer[name].accumulator.num_tokens,
                    "updates": self._by_layer[name].updates,
                }
                for name in leaders.values()
            },
        }

    def load_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the sum of several `state`s of the same layers: what several processes counted, or one."""
        if any(state["leader"] != states[0]["leader"] for state in states):
            states = [_unshared(state) for state in states]
        loaded: dict[str, _Statistics] = {}
        leaders: dict[str, str] = {}
        for state in states:
            leaders |= state["leader"]
            for name, saved in state["sums"].items():
                layer = self.layers[name]
                part = HessianAccumulator.of_sum(
                    saved["sum"].to(layer.parameter.device, copy=True), saved["num_tokens"]
                )
                if name not in loaded:
                    loaded[name] = _Statistics(part)
                else:
                    loaded[name].accumulator.merge(part)
                loaded[name].updates += saved["updates"]
        self._by_layer = {name: loaded[leader] for name, leader in leaders.items()}
        self._seen = {name: statistics.updates for name, statistics in self._by_layer.items()}


def _unshared(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same counts, with sums of its own for each layer."""
    return {
        "leader": {name: name for name in state["leader"]},
        "sums": {name: state["sums"][leader] for name, leader in state["leader"].items()},
    }


def gather_states(
    statistics: InputStatistics, gradients: Mapping[str, Tensor], access: ParameterAccess
) -> list[dict[str, Any] | None]:
    """The states that a checkpoint of this rank has to keep. All ranks must call it.

    Where rank 0 writes for all, it gets the states of all ranks. Sums travel one by one: all together would be too much
    for a device.

    Args:
        statistics: Of this rank.
        gradients: Its sums of squared gradients, by layer.
        access: Tells the ranks.

    Returns:
        `InputStatistics.state` by rank, with the gradients; None where another rank has it.
    """
    own = statistics.state()
    own["gradients"] = {name: one.to("cpu", copy=True) for name, one in gradients.items()}
    if access.world_size == 1:
        return [own]
    if access.saves_every_rank:
        return [own if rank == access.rank else None for rank in range(access.world_size)]
    small = {name: {**entry, "sum": tuple(entry["sum"].shape)} for name, entry in own["sums"].items()}
    shapes = {name: tuple(one.shape) for name, one in own["gradients"].items()}
    states = access.gather({"leader": own["leader"], "sums": small, "gradients": shapes})
    for rank, state in enumerate(states):
        for name, shape in state["gradients"].items():
            mine = own["gradients"][name] if rank == access.rank else None
            state["gradients"][name] = access.to_first(mine, source=rank, shape=shape)
        for name, entry in state["sums"].items():
            mine = own["sums"][name]["sum"] if rank == access.rank else None
            entry["sum"] = access.to_first(mine, source=rank, shape=entry["sum"])
    return [state if access.rank in (0, rank) else None for rank, state in enumerate(states)]


def load_own_states(
    statistics: InputStatistics, states: Sequence[Mapping[str, Any] | None], access: ParameterAccess
) -> dict[str, Tensor]:
    """Go on from this rank's part of what `gather_states` returned, under any number of ranks.

    Returns:
        The sums of squared gradients, by layer, on the CPU.

    Raises:
        MisconfigurationException: If another number of ranks wrote it, each its own part.
    """
    if len(states) == access.world_size:
        own = states[access.rank : access.rank + 1]
    else:
        own = states[access.rank :: access.world_size]  # sums are sums, whoever adds them
    kept = [state for state in own if state is not None]
    if len(kept) < len(own):
        raise MisconfigurationException(
            f"the checkpoint was written by {len(states)} ranks while statistics were collected, each its own part, "
            f"and {access.world_size} resume it: run `thanos-lightning reshard` on it first"
        )
    if kept:
        statistics.load_states(kept)
    gradients: dict[str, Tensor] = {}
    for state in kept:
        for name, one in state.get("gradients", {}).items():
            gradients[name] = gradients[name] + one if name in gradients else one
    return gradients


def count_dataloader(
    statistics: InputStatistics,
    batches: Iterable[Any],
    trainer: Trainer,
    module: LightningModule,
    access: ParameterAccess,
    *,
    attention_mask_key: str | None,
    backward: Callable[[Any, bool], None] | None = None,
    joins_outputs: bool = False,
) -> int:
    """Run the module on the batches of a calibration set, in evaluation mode, and count them.

    Args:
        statistics: What counts; its hooks are added and removed here.
        batches: The calibration batches. Rank r takes batches r, r + world_size, … of those that it is given.
        trainer: Its strategy moves the batches, its precision is that of the forward.
        module: Called as `calibration_step(batch)` where it has one; else a mapping goes through `module(**batch)`, and
            any other batch through `training_step(batch, 0)`, whose logging is dropped.
        access: Tells the ranks.
        attention_mask_key: Where the mask of real tokens is in a batch.
        backward: Called with what the module returned for a batch, and whether it counts: one batch in four, whatever
            the number of ranks, or each if outputs are joined. Where one rank has such a batch all call it, since a
            backward may take all. The other batches, and without it all, run without gradients.
        joins_outputs: Whether products of outputs are wanted.

    Returns:
        The number of batches that this rank counted.

    Raises:
        MisconfigurationException: If the module can't be called with a batch, naming `calibration_step`, the mend.
    """
    num_batches = seen = 0
    per_backward = BATCHES_PER_BACKWARD["joined" if joins_outputs else "alone"]
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    statistics.start()
    try:
        phase_of = open_phase("Calibrating", number_of_batches(batches), "batches")
        with phase_of as phase, _all_called(), _checkpointing(module):
            for batch, is_own, in_round in _rounds(batches, access):
                on_device = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))
                find = partial(token_mask, on_device, attention_mask_key) if attention_mask_key else None
                counting = statistics.counting(find) if is_own else nullcontext()
                numbers = range(seen, seen + in_round)
                differentiated = [number for number in numbers if number % per_backward == 0]
                differentiates = backward is not None and bool(differentiated)
                with torch.set_grad_enabled(differentiates), trainer.precision_plugin.forward_context(), counting:
                    output = _forward(module, on_device)
                if backward is not None and differentiates:
                    backward(output, is_own and seen + access.rank in differentiated)
                del output
                num_batches += is_own
                seen += in_round
                phase.advance(in_round)
    finally:
        statistics.stop()
        for part, mode in modes:
            part.training = mode
    return num_batches


def _rounds(batches: Iterable[Any], access: ParameterAccess) -> Iterator[tuple[Any, bool, int]]:
    """Rounds in which every rank runs a batch: this rank's, whether it counts, and how many do, on any rank.

    Rank r takes batches r, r + world_size, … of its dataloader. Where it has none left and others have, which may be
    since theirs are longer, it is given another one, uncounted: of sharded parameters, a forward takes all ranks. All
    ranks must go through it.

    Raises:
        ValueError: On all ranks, if the dataloader of one has nothing, and others have.
        RuntimeError: On all ranks, if the dataloader of one fails.
    """
    kept = KeptError(keeps=access.world_size > 1)
    iterator = iter(batches)
    spare: Any = None
    while True:
        one_each: list[Any] = []
        with kept.keeping():
            one_each = list(itertools.islice(iterator, access.world_size))
        kept.raise_everywhere(access)
        spare = one_each[0] if one_each else spare
        told = access.gather((len(one_each), spare is not None))
        in_round = max(number for number, _ in told)
        if not in_round:
            return
        if poor := [rank for rank, (_, has_one) in enumerate(told) if not has_one]:
            raise ValueError(
                f"calibration.batches has no batch on rank {poor[0]}, and {in_round} or more on another: give "
                "all ranks the same one"
            )
        is_own = access.rank < len(one_each)
        yield one_each[access.rank] if is_own else spare, is_own, in_round


@contextmanager
def _checkpointing(module: nn.Module) -> Iterator[None]:
    """Let what checkpoints its activations in training do so now, too, although it is in evaluation mode.

    transformers does in training mode alone, and a backward over a calibration batch would keep all activations: more
    than the training has memory for. Not reentrant, since a backward that stops at outputs can't be otherwise.
    """
    parts = [
        part
        for part in module.modules()
        if getattr(part, "gradient_checkpointing", False) and hasattr(part, "_gradient_checkpointing_func")
    ]
    before = [part._gradient_checkpointing_func for part in parts]

    def evaluating(part: nn.Module, run: Callable[..., Any], *args: Any) -> Any:
        part.training = False  # else its own dropout would be at work
        try:
            return run(*args)
        finally:
            part.training = True

    def checkpointed(part: nn.Module, run: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(partial(evaluating, part, run), *args, use_reentrant=False)

    for part in parts:
        part.training = True
        part._gradient_checkpointing_func = partial(checkpointed, part)  # type: ignore[assignment]
    try:
        yield
    finally:
        for part, func in zip(parts, before, strict=True):
            part._gradient_checkpointing_func = func
            part.training = False


@contextmanager
def _all_called() -> Iterator[None]:
    """Let torch's attention call its layers: in evaluation mode it may read their weights in one fused kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _forward(module: LightningModule, batch: Any) -> Any:
    step = getattr(module, "calibration_step", None)
    if step is not None:
        return step(batch)
    runs, call = (
        (partial(module, **batch), "forward(**batch)")
        if isinstance(batch, Mapping)
        else (partial(_training_step, module, batch), "training_step(batch, 0)")
    )
    kind, of = type(batch).__name__, type(module).__name__
    add = f"add a method calibration_step(self, batch) to {of}, which runs the model on a batch and returns the loss"
    if not isinstance(batch, Mapping) and not module.automatic_optimization:
        raise MisconfigurationException(
            f"a calibration batch is a {kind}, which goes through training_step, but under manual optimization that "
            f"would train: {add}"
        )
    try:
        return runs()
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and "unpack" not in str(error):  # of a hook, or of the model itself
            raise
        raise MisconfigurationException(
            f"a calibration batch is a {kind}, on which {call} of {of} fails ({type(error).__name__}: {error}): {add}"
        ) from error


def _training_step(module: LightningModule, batch: Any) -> Any:
    """What a training step returns for a batch, without its logging."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    replaced = {name: module.__dict__[name] for name in ("forward", "log", "log_dict") if name in module.__dict__}

    def first_forward(*args: Any) -> Any:
        put_back("forward")
        return module.training_step(*args)

    def put_back(name: str) -> None:
        module.__dict__.pop(name, None)
        if name in replaced:
            module.__dict__[name] = replaced[name]

    # through __call__, whose hooks gather the module's own parameters where these are sharded
    module.__dict__.update(forward=first_forward, log=_ignore, log_dict=_ignore)
    try:
        return module(batch, 0) if takes_index else module(batch)
    finally:
        for name in ("forward", "log", "log_dict"):
            put_back(name)


def _ignore(*_: Any, **__: Any) -> None:
    pass


def loss_of(output: Any) -> Tensor | None:
    """A scalar that has a gradient, or such a one called loss in a model's output; None where there is none.

    Examples:
        >>> loss_of({"loss": torch.ones((), requires_grad=True)})
        tensor(1., requires_grad=True)
    """
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    return found if isinstance(found, Tensor) and found.ndim == 0 and found.requires_grad else None
