"""ThanosPruningCallback: which of the Trainer's hooks calls what."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from thanos_lightning.checkpoints.format import CALLBACK_KEY, NOTE_KEY, training_note
from thanos_lightning.checkpoints.resume import guard_resume
from thanos_lightning.checkpoints.save import save_whole
from thanos_lightning.events.past import Past
from thanos_lightning.events.run import PruningRun
from thanos_lightning.models.targets import IGNORED, PrunableLayer, find_targets, uncalled_layers
from thanos_lightning.plan.allocation import Allocation
from thanos_lightning.plan.options import CalibrationOptions, PruningOptions
from thanos_lightning.plan.patterns import TargetOverride, assign_patterns
from thanos_lightning.plan.schedule import SparsitySchedule
from thanos_lightning.plan.training_steps import check_trained
from thanos_lightning.report.data import PruningReport
from thanos_lightning.report.progress import Terminated
from thanos_lightning.report.tables import print_outcome
from thanos_lightning.sharding.choice import check_strategy
from thanos_lightning.sharding.loading import explain_loading
from thanos_lightning.solver import Pattern, parse_pattern
from thanos_lightning.solver.layer import SolverOptions
from thanos_lightning.training.lightning_private import is_compiled, saves_shards
from thanos_lightning.training.other_callbacks import check_companions, check_trainer, saved_checkpoint


class ThanosPruningCallback(Callback):
    """Prunes layers while the model is trained, on a schedule, and keeps the zeros from then on.

    Before each event of the schedule the second moments of the layers' inputs are accumulated from the training
    batches; at the event each layer is pruned by the block-wise second-order solver of Thanos (arXiv 2504.05346);
    after every later optimizer step the pruned weights and their moments are exactly 0. Masks are nested: what was
    pruned stays pruned, the zeros of a model that comes pruned included.

    Args:
        pattern: "2:4" (any N:M, at most N nonzeros in M), "unstructured" or "structured".
        sparsity: Final fraction of zeros, for "unstructured" and "structured".
        outlier_fraction: Fraction of the rows that stay dense at the end, for N:M and "structured".
        schedule: When to prune, and how much by then. None is once before the first step where there are
            `calibration.batches`, which was measured best; else at 10, 20, 30 and 40 % of the training
            (docs/guide). From event to event all layers become sparser together: by single weights where they are
            unstructured, by rows where they are N:M (the fraction of dense rows falls to its final value), by columns
            where they are structured.
        targets: Globs or `re:` expressions of module names; each must match a Linear or Conv1D layer.
        ignore: Layers to leave out, in the same words; each but "lm_head" must match something.
        overrides: Other patterns for some of the targets.
        solver: How a layer is solved. saliency="wanda", admm_steps=0 and refine_steps=0 are the paper's algorithm; the
            defaults differ from it on purpose.
        calibration: On what: which batches, how many, and how much an error at each output counts.
        allocation: Layers of unequal sparsity, together as sparse as the pattern asks for; "uniform" makes all alike.
            None is `Allocation("loss")` with output weights, where the layers can be looked at before the first event;
            else, and for N:M in all rows, "uniform". (It leaves out layers that no gradient reaches, with a warning:
            they get the pattern's own sparsity.) An allocation looks at all layers before that event prunes any, on the
            batches that it prunes on. Under calibration.memory_gib that takes calibration steps of their own; where
            there are too few for both, half of those before the event.
        verify_every_n_steps: Count the zeros every so many optimizer steps, and raise if one came back. 0 never counts.
        monitor: Metric of the validation loop to measure before the first event, after the last one, and at the end.
            Validation is run for it at these steps where it hasn't just been.

    Raises:
        ValueError: For an argument that can't be right, naming it and the mend. What depends on the model or the
            Trainer is checked before the first training batch.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from thanos_lightning import SparsitySchedule, ThanosPruningCallback
        >>> pruning = ThanosPruningCallback("2:4", schedule=SparsitySchedule(10, 30, 10))
        >>> trainer = Trainer(max_steps=50, callbacks=[pruning], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        pattern: str = "2:4",
        sparsity: float | None = None,
        schedule: SparsitySchedule | None = None,
        targets: str | Sequence[str] = ("*",),
        ignore: str | Sequence[str] = IGNORED,
        *,
        outlier_fraction: float | None = None,
        overrides: Sequence[TargetOverride] = (),
        solver: SolverOptions = SolverOptions(),
        calibration: CalibrationOptions = CalibrationOptions(),
        allocation: Allocation | Literal["uniform"] | None = None,
        verify_every_n_steps: int = 100,
        monitor: str | None = None,
    ) -> None:
        self.options = PruningOptions.checked(
            parse_pattern(pattern, sparsity, outlier_fraction),
            schedule=schedule,
            targets=targets,
            ignore=ignore,
            overrides=overrides,
            solver=solver,
            calibration=calibration,
            allocation=allocation,
            verify_every_n_steps=verify_every_n_steps,
            monitor=monitor,
        )
        self.monitor = monitor  # under the name that other callbacks have for it: a progress bar shows it
        self._is_set_up = False
        self._past = Past()
        self._restored: dict[str, Any] | None = None  # a state that has been loaded and not been used yet
        self._forgets_masks = False  # of a training before, unless a checkpoint is loaded
        # made at the start of a fit, and kept after it for checkpoints
        self._layers: dict[str, PrunableLayer] = {}
        self._final: dict[str, Pattern] = {}
        self._run: PruningRun | None = None

    @property
    def report(self) -> PruningReport:
        """What has been done so far; `pruning_report.json` has the same."""
        return self._past.report

    # What the Trainer calls, in its order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_trainer(trainer)
        self._is_set_up = True
        if stage != "fit":
            return
        if trainer.global_step > 0:  # the same Trainer goes on
            self._restored = self.state_dict()
        else:
            self._forgets_masks = bool(self._past.patterns)
            self._past, self._restored = Past(), None
        # the engine of the fit before, and masks on the device, must not wait beside the new ones
        self._run = None
        check_companions(trainer, self)
        check_strategy(trainer.strategy)
        save_whole(trainer.strategy, shards=saves_shards(trainer.strategy))
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            guard_resume(trainer.strategy)
        if is_compiled(pl_module):
            raise MisconfigurationException(
                "the LightningModule is compiled (torch.compile): the statistics of its layers can't be collected. "
                "Pass the uncompiled module to fit, and compile the exported model"
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        options = self.options
        self._layers = find_targets(pl_module, options.targets, options.ignore)
        if uncalled := uncalled_layers(pl_module, options.targets, options.ignore):
            rank_zero_info(
                f"{len(uncalled)} layer(s) of torch's MultiheadAttention stay dense, such as {uncalled[0]}: it reads "
                "their weights, and its in_proj_weight, without calling a layer whose inputs could be collected"
            )
        self._final = assign_patterns(self._layers, options.pattern, options.overrides)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = PruningRun(self.options, self._past, self._layers, self._final, trainer, pl_module)
        if self._forgets_masks and self._restored is None:
            raise MisconfigurationException(
                "this ThanosPruningCallback has pruned in another training, and a new Trainer would lose its zeros: to "
                "go on, pass ckpt_path to fit or use the same Trainer; for another model, make a new callback"
            )
        self._run, restored = run, self._restored
        self._restored = None
        run.begin(restored)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._running.begin_batch(batch)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        # what runs the model after the training step (other callbacks' samples, probes) is no training token
        if pl_module.automatic_optimization:
            self._running.collector.end()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # in manual optimization the user clips before the optimizer step that the next hook sees
        if not pl_module.automatic_optimization:
            self._running.enforcer.mask_gradients()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._running.enforcer.mask_gradients(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._running.end_batch(outputs)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running.collector.end()  # a batch that the module skipped has no end

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None and trainer.state.fn == "fit":
            self._run.begin_validation()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is None or trainer.state.fn != "fit":
            return
        value = None
        if (monitor := self.options.monitor) is not None:
            if monitor not in trainer.callback_metrics:
                raise MisconfigurationException(
                    f"monitor is {monitor!r}, which validation does not log. It logs: "
                    f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}"
                )
            value = float(trainer.callback_metrics[monitor])
        self._run.end_validation(value)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running.end()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is None:  # there was nothing left to train
            check_trained(trainer)
            return
        self._run.enforcer.verify()  # again, after every callback's on_train_end has had its last write
        if trainer.is_global_zero:
            is_exportable = "architecture" in training_note(pl_module, [], self._layers)
            print_outcome(saved_checkpoint(trainer), self._run.report_path, is_exportable=is_exportable)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Terminated) and trainer.strategy.launcher is not None:
            # as Lightning does for the ranks that it has started; others may work for long before they miss this one
            trainer.strategy.launcher.kill(signal.SIGTERM)
        if (mend := explain_loading(trainer.strategy, exception)) is not None:
            rank_zero_warn(mend)
        if self._run is not None:
            self._run.stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._run is not None:
            self._run.stop()

    @property
    def _running(self) -> PruningRun:
        assert self._run is not None, "made in on_train_start"
        return self._run

    # State

    @property
    @override
    def state_key(self) -> str:
        """Where a checkpoint keeps the state; the same for subclasses, so that export and verification find it."""
        # Lightning compares keys when a Trainer is made: two of us must get as far as being refused in our words
        return CALLBACK_KEY if self._is_set_up else f"{CALLBACK_KEY} {id(self)}"

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plain values. While a window is open under DDP, all ranks must call it: see `PruningRun.state`."""
        if self._restored is not None:  # loaded, and not yet used
            return self._restored
        return self._past.state(self.options) if self._run is None else self._run.state()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._past = Past.of_state(state_dict)
        self._restored = state_dict

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what verification needs to read the moments, and an export to rebuild the Hugging Face model."""
        stepped = [] if self._run is None else self._run.access.numbered_parameters()  # none before a training
        checkpoint[NOTE_KEY] = training_note(pl_module, stepped, self._layers)
