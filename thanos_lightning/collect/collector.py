"""Collects the moments for a window: from training batches during it, or from a calibration set at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from thanos_lightning.collect.calibration_set import count_dataloader, loss_of, try_batch
from thanos_lightning.collect.hidden_states import HiddenStates
from thanos_lightning.collect.inputs import InputStatistics
from thanos_lightning.collect.outputs import OutputGradients
from thanos_lightning.collect.statistics import Statistics
from thanos_lightning.collect.tokens import has_text, token_mask
from thanos_lightning.layers.blocks import Block
from thanos_lightning.layers.targets import Layer
from thanos_lightning.plan.options import CalibrationOptions
from thanos_lightning.plan.windows import Window
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.owners import assign_owners
from thanos_lightning.ranks.talk import PruningError
from thanos_lightning.solver import HessianAccumulator


@dataclass(frozen=True)
class Moments:
    """Second moments of the inputs of a window's layers, and of the loss's gradients at their outputs."""

    owners: Mapping[str, int]  # layer -> the rank that gathers its sums and weight and solves it; alike on all ranks
    # layer -> the second moments of its inputs on this rank; None if none are collected. The dict is emptied while the
    # ranks add up the moments, to free memory
    accumulators: dict[str, HessianAccumulator] | None = None
    # layer -> how much an error at each output counts, (out_features,), the same on all ranks; equally if it is missing
    output_weights: Mapping[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0  # training time that collecting has taken
    # what the window's blocks got and gave on this rank; None if no block is trained
    states: HiddenStates | None = None
    # whether accumulators are kept for the event after a scan, so that emptying the dict frees nothing
    stay: bool = False


class Collector:
    """Collects the moments of one window after another during a training. `layers` are those of all windows.

    Without memory_gib, the statistics of a sensitivity scan are kept for the event at the same step. With
    output_weights, a calibration batch without a loss is an error where a window collects gradients. `blocks` are
    trained at an event, on the calibration set, for `block_steps` steps.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        access: ParameterAccess,
        options: CalibrationOptions,
        blocks: Mapping[str, Block],
        block_steps: int,
    ) -> None:
        self._layers, self._access, self._options = layers, access, options
        self._keeps_scan = options.memory_gib is None
        self._blocks, self._block_steps = blocks, block_steps
        self._open: Statistics | None = None
        self._of_scan: Statistics | None = None  # of a scan, valid until the weights change
        self._has_warned = False

    @property
    def statistics(self) -> InputStatistics | None:
        """The input statistics of the open window, or None without one."""
        return None if self._open is None else self._open.inputs

    def try_batch(self, trainer: Trainer, module: LightningModule, *, gradients: bool) -> None:
        """Refuse before the training what a later event would refuse of the calibration set. All ranks must call it.

        Raises:
            MisconfigurationException: As `take`.
        """
        if self._options.batches is None:
            return
        with isolate_rng():  # the training draws what it would have drawn
            for output in try_batch(self.batches(trainer, module), trainer, module, self._access, gradients=gradients):
                if gradients:
                    self._loss(output)

    # In the training

    def open(self, window: Window, module: LightningModule) -> None:
        """Begin to collect from training batches: inputs, and what output weights need, if the window says so."""
        self._open = self._new(window)
        self._open.start(module, of_training=True)

    def begin(self, batch: Any, number: int, loss_scale: Callable[[], float | Tensor] = lambda: 1.0) -> None:
        """Count the forwards of this training batch, the epoch's batch `number`, from now on.

        `loss_scale` returns the factor on the batch's loss before the backward.
        """
        if self._open is not None:
            self._open.look_for_nan(batch, f"training batch {number}")
            self._open.inputs.begin(partial(self._counted, batch))
            if self._open.gradients is not None:
                self._open.gradients.begin(loss_scale())

    def end(self) -> None:
        """Stop counting forwards."""
        if self._open is not None:
            self._open.inputs.end()

    def stop(self) -> None:
        """Remove all hooks. The sums of an open window stay, since a checkpoint may be saved after a fit."""
        self.forget_scan()
        if self._open is not None:
            self._open.stop()

    def state(self) -> list[dict[str, Any] | None] | None:
        """Return the open window's `Statistics.gather_states`, or None without a window. All ranks must call it."""
        return None if self._open is None else self._open.gather_states()

    def load(self, states: Sequence[Mapping[str, Any] | None]) -> None:
        """Continue from a saved `state` of the open window."""
        assert self._open is not None
        self._open.load(states)

    def _counted(self, batch: Any) -> Tensor | None:
        if (key := self._options.attention_mask_key) is None:
            return None
        counted = token_mask(batch, key)
        if counted is None and not self._has_warned and has_text(batch):
            self._has_warned = True
            rank_zero_warn(
                f"the batches have no {key!r}, so every token counts, padding too. Name the mask "
                "in attention_mask_key, or set it to None to say that there is no padding"
            )
        return counted

    # At the end of a window

    def take(self, window: Window, trainer: Trainer, module: LightningModule) -> Moments:
        """Return the moments of a window that ends now. All ranks must call it.

        Raises:
            PruningError: If nothing was collected, the calibration set is empty, or one of several ranks has failed.
            MisconfigurationException: If a promised calibration set is missing, or gives no loss where one is needed.
        """
        statistics, self._of_scan, seconds = self._of_scan, None, 0.0
        if statistics is None and self._options.batches is not None:
            statistics = self._calibrate(window, trainer, module)
        elif statistics is None:
            statistics = self._close(window)
            seconds = statistics.seconds()
        if window.scans and self._keeps_scan:
            self._of_scan = statistics
        layers = self._layers_of(window)
        accumulators = statistics.inputs.accumulators
        return Moments(
            assign_owners(layers, self._access.world_size),
            {name: accumulator for name, accumulator in accumulators.items() if name in layers},
            self._output_weights(window, statistics.gradients),
            seconds,
            states=None if window.scans else statistics.states,
            stay=self._of_scan is not None,
        )

    def forget_scan(self) -> None:
        """Drop the statistics kept from a scan, because the weights will change before the event."""
        self._of_scan = None

    def _close(self, window: Window) -> Statistics:
        statistics, self._open = self._open, None
        if statistics is None:
            raise PruningError(
                f"the event at optimizer step {window.event.step} is due, but its statistics were not collected: "
                "several events fell into one batch. Space the events further apart (every_n_steps)"
            )
        statistics.stop()
        statistics.refuse_nan()
        if statistics.gradients is not None:
            # A scan compares the layers of several windows, so their sums become means.
            statistics.gradients.divide(window.end_step - window.start_step)
        return statistics

    def _calibrate(self, window: Window, trainer: Trainer, module: LightningModule) -> Statistics:
        statistics = self._new(window)
        counted = count_dataloader(
            statistics,
            self.batches(trainer, module),
            trainer,
            module,
            self._access,
            counted=self._counted,
            loss_in=self._loss,
        )
        if not sum(self._access.gather(counted)):
            raise PruningError("calibration.batches gave no batch: give one that isn't empty")
        statistics.refuse_nan()
        return statistics

    def _layers_of(self, window: Window) -> dict[str, Layer]:
        return {name: self._layers[name] for name in window.patterns}

    def _new(self, window: Window) -> Statistics:
        is_for_event = self._keeps_scan or not window.scans
        blocks = {
            name: block.module
            for name, block in self._blocks.items()
            if is_for_event and not window.patterns.keys().isdisjoint(block.layers)
        }
        return Statistics(
            self._layers_of(window),
            self._access,
            gradients=window.gradients,
            blocks=blocks,
            block_steps=self._block_steps,
        )

    def _output_weights(self, window: Window, gradients: OutputGradients | None) -> dict[str, Tensor]:
        if gradients is None:
            return {}
        weights = gradients.weights(self._access)
        if missing := [name for name in window.patterns if name not in weights]:
            rank_zero_warn(
                f"no gradient has reached the outputs of {len(missing)} layer(s), such as {missing[0]}: their outputs "
                "count alike. (That is so if a layer and all that its input comes from are frozen, or if the "
                "module returns no loss for a calibration batch: give the batches labels, or let calibration_step "
                "return the loss. calibration.output_weights='uniform' avoids this warning)"
            )
        return weights

    def _loss(self, output: Any) -> Tensor | None:
        """The loss for a calibration batch; None if a rank has none, which is an error if it is needed."""
        loss = loss_of(output)
        if all(self._access.gather(loss is not None)):  # a backward of sharded parameters needs all ranks
            return loss
        if self._options.output_weights is not None:
            raise MisconfigurationException(
                "output_weights asks for gradients, but for a calibration batch the module returns no loss "
                f"({type(output).__name__}): give the batches labels, or let calibration_step return the loss"
            )
        return None

    def batches(self, trainer: Trainer, module: LightningModule) -> Iterable[Any]:
        """Return the batches of the calibration set.

        Raises:
            MisconfigurationException: If neither the datamodule nor the module has a promised calibration set.
        """
        if not isinstance(self._options.batches, str):
            assert self._options.batches is not None
            return self._options.batches
        for holder in (getattr(trainer, "datamodule", None), module):
            if callable(make := getattr(holder, "calibration_dataloader", None)):
                batches: Iterable[Any] = make()
                return batches
        raise MisconfigurationException(
            "calibration.batches is 'datamodule', but neither the datamodule nor the LightningModule has a method "
            "calibration_dataloader(): add one, give batches, or None to use the training batches"
        )


def loss_scale(trainer: Trainer) -> float | Tensor:
    """Return the factor on the loss before the backward in fp16 training; 1 in other precisions."""
    if (scaler := getattr(trainer.precision_plugin, "scaler", None)) is not None:
        # Unlike get_scale(), scale() does not make the host wait for the device.
        scale: Tensor = scaler.scale(torch.ones((), device=trainer.strategy.root_device))
        return scale
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    return float(getattr(getattr(engine, "optimizer", None), "loss_scale", None) or 1.0)
