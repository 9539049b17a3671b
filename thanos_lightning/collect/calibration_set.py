"""Runs a module on the batches of a calibration set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from thanos_lightning.collect.statistics import Statistics
from thanos_lightning.plan.options import number_of_batches, ranks_sharing
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import failing_together
from thanos_lightning.report.progress import open_phase

# A backward takes as long as a forward, or longer. The weights of single outputs need fewer tokens than the input
# moments, so one batch in four suffices.
_BATCHES_PER_BACKWARD = 4
_OWN_STEP, _TRAINING_STEP = "calibration_step(batch)", "training_step(batch, 0)"


def count_dataloader(
    statistics: Statistics,
    batches: Iterable[Any],
    trainer: Trainer,
    module: LightningModule,
    access: ParameterAccess,
    *,
    counted: Callable[[Any], Tensor | None],
    loss_in: Callable[[Any], Tensor | None],
) -> int:
    """Run the module on a calibration set in evaluation mode, and return how many batches this rank counted.

    The module is called as `calibration_step(batch)` if it has this method. Otherwise a mapping goes through
    `module(**batch)`, and any other batch through `training_step(batch, 0)` without logging. Rank r counts batches r,
    r + world_size, … of its own `batches`, and `counted` finds the mask of a batch's tokens, as for
    `InputStatistics.counting`.

    If `statistics` have gradients, those of one batch in four count, whatever the number of ranks. `loss_in` finds the
    loss in the module's output for such a batch; without a loss it returns None on all ranks. If the gradients of one
    rank count, all ranks differentiate, because a backward may need all. Other batches run without gradients.

    Raises:
        MisconfigurationException: If the module can't be called with a batch. The fix is to add `calibration_step`.
    """
    num_batches = 0
    gradients, states = statistics.gradients, statistics.states
    with (
        ExitStack() as hooks,
        open_phase("Calibrating", number_of_batches(batches), "batches") as phase,
        _evaluating(module),
    ):
        hooks.callback(statistics.stop)
        statistics.start(module, of_training=False)
        for batch, number, numbers in _rounds(batches, access):
            differentiated = [] if gradients is None else [n for n in numbers if n % _BATCHES_PER_BACKWARD == 0]
            on_device = _on_device(batch, trainer)
            mask = partial(counted, on_device)
            with ExitStack() as contexts:
                contexts.enter_context(torch.set_grad_enabled(bool(differentiated)))
                contexts.enter_context(trainer.precision_plugin.forward_context())
                if number is not None:
                    statistics.look_for_nan(on_device, f"calibration batch {number}")
                    contexts.enter_context(statistics.inputs.counting(mask))
                if number is not None and states is not None:
                    contexts.enter_context(states.recording(number, mask, access.world_size))
                output = _forward(module, on_device)
            if gradients is not None and differentiated and (loss := loss_in(output)) is not None:
                gradients.backward(loss, counts=number in differentiated)
            output = loss = None  # what they were computed from would stay in memory
            num_batches += number is not None
            phase.advance(len(numbers))
    return num_batches


def try_batch(
    batches: Iterable[Any], trainer: Trainer, module: LightningModule, access: ParameterAccess, *, gradients: bool
) -> list[Any]:
    """Run the module on a first batch, before the training, and return its output in a list. All ranks must call it.

    The list is empty where that could change the training: if the batch would go through `training_step`, or if it may
    not come again, being in no sequence and no map-style data set.

    Raises:
        MisconfigurationException: As `count_dataloader`.
        PruningError: On all of several ranks, if the data set of one of them raises an error.
    """
    found: list[Any] = []
    with failing_together(access):
        found = _glance(batches)
    if not all(access.gather(bool(found))):
        return []
    (batch,) = found
    if _way(module, batch)[1] == _TRAINING_STEP:
        return []
    on_device = _on_device(batch, trainer)
    with _evaluating(module), torch.set_grad_enabled(gradients), trainer.precision_plugin.forward_context():
        output = _forward(module, on_device)
    access.release()
    return [output]


def _on_device(batch: Any, trainer: Trainer) -> Any:
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def _glance(batches: Iterable[Any]) -> list[Any]:
    """The first batch, in a list, if reading it uses nothing up; else []."""
    if isinstance(batches, Sequence):
        return [batches[0]]
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return []
    size = batches.batch_size or 1
    try:
        samples = [batches.dataset[number] for number in range(size)]
    except (LookupError, TypeError):  # it is smaller, or a sampler gives other keys than numbers
        return []
    is_alone = batches.batch_size is None and batches.batch_sampler is None
    return [batches.collate_fn(samples[0] if is_alone else samples)]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and each of its parts back into its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Run a module in evaluation mode, as a calibration set needs it: every layer is called, checkpointing stays on."""
    is_fast = torch.backends.mha.get_fastpath_enabled()  # a kernel that reads weights without calling their layers
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluation_mode(module), _checkpointing(module):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)


def _rounds(batches: Iterable[Any], access: ParameterAccess) -> Iterator[tuple[Any, int | None, range]]:
    """Yield rounds in which every rank runs one batch: the batch, its number if it counts, and all numbers that count.

    Rank r takes batches r, r + world_size, … of its dataloader, or all of them where a DistributedSampler shares them
    already. If it runs out before other ranks, whose dataloaders may be longer, it runs another batch without counting
    it: with sharded parameters, a forward needs all ranks. All ranks must iterate together.

    Raises:
        PruningError: On all ranks, if the dataloader of one of several raises an error.
        ValueError: On all ranks, if one rank's dataloader is empty while another's is not.
    """
    iterator = iter(batches)
    is_shared = ranks_sharing(batches) > 1
    begun = 0
    spare: Any = None
    while True:
        in_round: list[Any] = []
        with failing_together(access):
            in_round = list(itertools.islice(iterator, 1 if is_shared else access.world_size))
            in_round *= access.world_size if is_shared else 1
        spare = in_round[0] if in_round else spare
        by_rank = access.gather((len(in_round), spare is not None))
        length = max(number for number, _ in by_rank)
        if not length:
            return
        if poor := [rank for rank, (_, has_batch) in enumerate(by_rank) if not has_batch]:
            raise ValueError(
                f"calibration.batches has no batch on rank {poor[0]}, and {length} or more on another: give "
                "all ranks the same one"
            )
        number = begun + access.rank if access.rank < len(in_round) else None
        yield spare if number is None else in_round[access.rank], number, range(begun, begun + length)
        begun += length


@contextmanager
def _checkpointing(module: nn.Module) -> Iterator[None]:
    """Keep activation checkpointing on in evaluation mode, for modules that use it in training.

    transformers checkpoints in training mode only. Without checkpoints, a backward over a calibration batch would need
    more memory than the training has. Only non-reentrant checkpoints let a backward stop at layer outputs.
    """
    functions = {
        part: part._gradient_checkpointing_func
        for part in module.modules()
        if getattr(part, "gradient_checkpointing", False) and hasattr(part, "_gradient_checkpointing_func")
    }

    def evaluated(part: nn.Module, run: Callable[..., Any], *args: Any) -> Any:
        part.training = False  # turns off the part's own dropout
        try:
            return run(*args)
        finally:
            part.training = True

    def checkpointed(part: nn.Module, run: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(partial(evaluated, part, run), *args, use_reentrant=False)

    for part in functions:
        part.training = True
        part._gradient_checkpointing_func = partial(checkpointed, part)  # type: ignore[assignment]
    try:
        yield
    finally:
        for part, function in functions.items():
            part._gradient_checkpointing_func = function
            part.training = False


def _forward(module: LightningModule, batch: Any) -> Any:
    runs, call = _way(module, batch)
    try:
        return runs()
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # a ValueError of another kind is raised by a hook or by the model itself
        if call == _OWN_STEP or (isinstance(error, ValueError) and "unpack" not in str(error)):
            raise
        raise MisconfigurationException(
            f"a calibration batch is a {type(batch).__name__}, on which {call} of {type(module).__name__} fails "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0][:200]}): {_mend(module)}"
        ) from error


def _way(module: LightningModule, batch: Any) -> tuple[Callable[[], Any], str]:
    """The call that runs the module on a batch, and the name of what it calls."""
    step: Callable[[Any], Any] | None = getattr(module, "calibration_step", None)
    if step is not None:
        return partial(step, batch), _OWN_STEP
    if isinstance(batch, Mapping):
        return partial(module, **batch), "forward(**batch)"
    if not module.automatic_optimization:
        raise MisconfigurationException(
            f"a calibration batch is a {type(batch).__name__}, which goes through training_step, but under manual "
            f"optimization that would train: {_mend(module)}"
        )
    return partial(_training_step, module, batch), _TRAINING_STEP


def _mend(module: LightningModule) -> str:
    return (
        f"add a method calibration_step(self, batch) to {type(module).__name__}, which runs the model on a batch and "
        "returns the loss"
    )


def _training_step(module: LightningModule, batch: Any) -> Any:
    """Return the output of a training step on a batch, without logging."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    names = "forward", "log", "log_dict"
    replaced = {name: module.__dict__[name] for name in names if name in module.__dict__}

    def first_forward(*args: Any) -> Any:
        put_back("forward")
        return module.training_step(*args)

    def put_back(name: str) -> None:
        module.__dict__.pop(name, None)
        if name in replaced:
            module.__dict__[name] = replaced[name]

    # The step runs inside __call__, whose hooks gather the module's own sharded parameters.
    module.__dict__.update(dict.fromkeys(names, lambda *_, **__: None), forward=first_forward)
    try:
        return module(batch, 0) if takes_index else module(batch)
    finally:
        for name in names:
            put_back(name)


def loss_of(output: Any) -> Tensor | None:
    """Return the output itself or the `loss` in it, if that is a scalar that requires a gradient; None otherwise."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad else None
