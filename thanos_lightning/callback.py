"""ThanosPruningCallback connects the Trainer's hooks to the pruning code."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from thanos_lightning.checkpoints.deepspeed_files import NOTE_KEY
from thanos_lightning.checkpoints.folders import first_free
from thanos_lightning.checkpoints.format import CALLBACK_KEY, exported_size, require_shapes, training_note
from thanos_lightning.checkpoints.huggingface import uncast_buffers
from thanos_lightning.checkpoints.names import why_not_exported
from thanos_lightning.checkpoints.resume import guard_resume
from thanos_lightning.checkpoints.save import save_whole
from thanos_lightning.event.channels import Width, choose_targets, proven_blocks, with_reordered
from thanos_lightning.event.experts import route_as_saved
from thanos_lightning.fit.lightning_private import after_configure_model, note_sigterm, saves_shards
from thanos_lightning.fit.other_callbacks import Farewell, call_last, check_companions, check_trainer, saved_checkpoint
from thanos_lightning.fit.past import Past
from thanos_lightning.fit.run import PruningRun
from thanos_lightning.layers.lora import prepare_adapters, warn_of_adapters
from thanos_lightning.layers.targets import IGNORED, Layer, find_targets, uncalled_layers
from thanos_lightning.layers.wrappers import compile_in_place
from thanos_lightning.plan.allocation import Allocation
from thanos_lightning.plan.options import (
    MULTIPLE_OF,
    CalibrationOptions,
    PruningOptions,
    TargetOverride,
    asked_pattern,
    assign_patterns,
    default_schedule,
)
from thanos_lightning.plan.schedule import SparsitySchedule, check_trained
from thanos_lightning.ranks.choice import check_strategy
from thanos_lightning.ranks.starting import announce_builds, explain_configuring
from thanos_lightning.ranks.talk import Ranks
from thanos_lightning.report.data import PruningReport
from thanos_lightning.report.progress import Terminated
from thanos_lightning.report.tables import print_outcome
from thanos_lightning.solver import Pattern
from thanos_lightning.solver.layer import SolverOptions


class ThanosPruningCallback(Callback):
    """Prunes layers on a schedule while the model trains, and keeps the pruned weights at zero.

    Before each event of the schedule, the callback accumulates the second moments of the layers' inputs over training
    batches, or over a calibration set. At the event, the block-wise second-order solver of Thanos (arXiv 2504.05346)
    prunes each layer. After every later optimizer step, the pruned weights and their optimizer moments are exactly 0.
    Masks are nested: a pruned weight stays pruned. A model that is already pruned keeps its zeros, too.

    Args:
        pattern: "2:4" (any N:M, at most N nonzeros in M), "unstructured", "structured", or what an export takes out of
            the model (docs/guide): "channels", whole channels of feed-forward blocks, or "experts", whole experts.
        sparsity: Final fraction of zeros, or of the channels or experts that go. Leave it out for N:M.
        parameters: In place of sparsity for "channels": the most weights that the model may have at the end.
        file_gib: In place of sparsity for "channels": the most GiB that the weights of an export may take. They are in
            float32, unless the training itself has weights of 16 bits without float32 masters.
        outlier_fraction: Fraction of the rows that stay dense at the end, for N:M and "structured".
        schedule: When to prune, and to which sparsity. None prunes once before the first step if `calibration.batches`
            is given, which was measured best, and otherwise at 10, 20, 30 and 40 % of the training (docs/guide). All
            layers become sparser at every event: unstructured layers by single weights, N:M layers by rows (the
            fraction of dense rows falls to its final value), structured layers and channels by columns, mixtures by
            experts.
        targets: Globs or `re:` expressions of module names. Each must match a Linear or Conv1D layer, or a matrix of an
            expert, such as "…experts.7.down_proj".
        ignore: Globs or `re:` expressions of layers to leave out. Each except "lm_head" must match a module.
        overrides: Other patterns for some of the targets.
        multiple_of: "channels" keeps a multiple of this number in each block, the one nearest to what the sparsity asks
            for: hardware multiplies such matrices fast.
        reorder: Give the channels of each feed-forward block an order in which N:M loses less, at an event before the
            first step. The model computes what it computed.
        solver: Options of the solver. The paper's algorithm has saliency="wanda", admm_steps=0 and refine_steps=0.
            The defaults differ from it on purpose.
        calibration: Options of the calibration: which batches, how many, and how much an error at each output counts.
        allocation: How layers share the zeros. None is `Allocation("loss")` if output weights are used and a
            sensitivity scan fits before the first event. Otherwise, and for N:M in all rows, None is
            `Allocation("uniform")`. (The default leaves out layers that no gradient reaches, with a warning: they get
            the pattern's own sparsity.) The scan looks at all layers before the first event prunes any, on the batches
            of that event. Under calibration.memory_gib, the scan takes calibration steps of its own. If the steps
            before the event are too few for both, the scan takes half of them.
        verify_every_n_steps: Optimizer steps between two checks that all pruned weights and their moments are zero. The
            first step after an event is checked, too. 0 checks only at the end of the training.
        monitor: Metric of the validation loop to measure before the first event, after the last event, and at the end.
            The callback runs validation at these steps if none has just run.

    Raises:
        ValueError: If an argument can't be right. The message names the argument and the fix. The callback checks
            whatever depends on the model or the Trainer before the first training batch.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from thanos_lightning import SparsitySchedule, ThanosPruningCallback
        >>> pruning = ThanosPruningCallback("2:4", schedule=SparsitySchedule(10, 30, 10))
        >>> trainer = Trainer(max_steps=50, callbacks=[pruning], logger=False, enable_checkpointing=False)
    """

    # More than eight parameters: each is a key of the recipes
    def __init__(
        self,
        pattern: str = "2:4",
        sparsity: float | None = None,
        schedule: SparsitySchedule | None = None,
        targets: str | Sequence[str] = ("*",),
        ignore: str | Sequence[str] = IGNORED,
        *,
        parameters: float | None = None,
        file_gib: float | None = None,
        outlier_fraction: float | None = None,
        overrides: Sequence[TargetOverride] = (),
        multiple_of: int = MULTIPLE_OF,
        reorder: bool = True,
        solver: SolverOptions = SolverOptions(),
        calibration: CalibrationOptions = CalibrationOptions(),
        allocation: Allocation | None = None,
        verify_every_n_steps: int = 100,
        monitor: str | None = None,
    ) -> None:
        self.options = PruningOptions(
            asked_pattern(pattern, sparsity, outlier_fraction, parameters, file_gib),
            parameters=parameters,
            file_gib=file_gib,
            schedule=default_schedule(calibration) if schedule is None else schedule,
            targets=targets,
            ignore=ignore,
            overrides=overrides,
            multiple_of=multiple_of,
            reorder=reorder,
            solver=solver,
            calibration=calibration,
            allocation=allocation,
            verify_every_n_steps=verify_every_n_steps,
            monitor=monitor,
        )
        self.monitor = monitor  # progress bars look for a callback's metric under this name
        self._is_set_up = False
        self._past = Past()
        self._restored: dict[str, Any] | None = None  # a loaded state that no fit has used yet
        self._forgets_masks = False  # True: this fit loses the masks of an earlier one unless it resumes
        # These are made at the start of a fit, and kept after the fit for checkpoints
        self._layers: dict[str, Layer] = {}
        self._final: dict[str, Pattern] = {}
        self._run: PruningRun | None = None
        self._farewell: Farewell | None = None  # of this fit

    @property
    def report(self) -> PruningReport:
        """The report of the training so far, which `pruning_report.json` holds, too."""
        return self._past.report

    # Hooks, in the order in which the Trainer calls them

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_trainer(trainer)
        self._is_set_up = True

        def prepare(module: LightningModule) -> None:
            compile_in_place(module)  # before strategies and checkpoints use the names
            prepare_adapters(module, trainer.strategy)

        prepare(pl_module)
        after_configure_model(pl_module, prepare)
        guard_resume(trainer.strategy)
        if stage != "fit":
            return
        if trainer.global_step > 0:  # the same Trainer continues its training
            self._restored = self.state_dict()
        else:
            self._forgets_masks = bool(self._past.patterns)
            self._past, self._restored = Past(), None
        # Free the previous fit's engine and its masks on the device before the new ones are made
        self._run = None
        check_companions(trainer, self)
        check_strategy(trainer.strategy)
        save_whole(trainer.strategy, shards=saves_shards(trainer.strategy))
        note_sigterm(trainer)
        self._farewell = Farewell(trainer)
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            announce_builds()  # such as that of DeepSpeedCPUAdam

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        options = self.options
        uncast_buffers(pl_module)  # which the strategy has just cast
        prepare_adapters(pl_module, trainer.strategy)  # a module's own setup may have put them on
        self._layers = find_targets(pl_module, options.targets, options.ignore)
        if uncalled := uncalled_layers(pl_module, options.targets, options.ignore):
            rank_zero_info(
                f"{len(uncalled)} layer(s) of torch's MultiheadAttention stay dense, such as {uncalled[0]}: it reads "
                "their weights, and its in_proj_weight, without calling a layer whose inputs could be collected"
            )
        warn_of_adapters(pl_module, self._layers)
        self._final = assign_patterns(self._layers, options.pattern, options.overrides)
        if (why := why_not_exported(pl_module, self._layers)) is not None:
            from thanos_lightning.lm import CausalLM  # slow to import

            if (
                isinstance(pl_module, CausalLM) and "model" in pl_module.hparams
            ):  # which has no model given as an object
                raise MisconfigurationException(f"the pruned model could not be exported: {why}")
            rank_zero_warn(f"an export will refuse what is trained here: {why}")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        options, find = self.options, partial(proven_blocks, trainer, pl_module)
        dense = exported_size(pl_module, self._layers, of_deepspeed=isinstance(trainer.strategy, DeepSpeedStrategy))
        width = Width(options.multiple_of, options.size, dense)
        targets = choose_targets(pl_module, self._layers, self._final, width, find)
        options = options.with_pattern(targets.final)
        if options.reorders and self._restored is None and trainer.global_step == 0:
            targets = with_reordered(targets, trainer, pl_module)
        run = PruningRun(options, self._past, targets, trainer, pl_module)
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
        self._running.begin_batch(batch, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        # Other callbacks may run the model after the training step (samples, probes): these tokens must not count
        if pl_module.automatic_optimization:
            self._running.collector.end()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In manual optimization, the user clips gradients before on_before_optimizer_step runs
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
        self._running.collector.end()  # Lightning calls no on_train_batch_end for a skipped batch

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._as_trained(trainer, pl_module)
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
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._as_trained(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._as_trained(trainer, pl_module)

    def _as_trained(self, trainer: Trainer, module: LightningModule) -> None:
        """Outside of a fit, let the model compute as it does in a fit."""
        if trainer.state.fn != "fit":
            uncast_buffers(module)
        if self._restored is not None:  # a checkpoint was loaded, and no fit knows yet which experts it lacks
            route_as_saved(module, self._restored["masks"], Ranks(trainer.global_rank, trainer.world_size))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._running.end()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is None:  # no training step was left to run
            check_trained(trainer)
            return
        self._run.enforcer.verify()  # again: other callbacks may write weights in on_train_end
        if trainer.is_global_zero:
            is_exportable = "architecture" in training_note(pl_module, [], self._run.masked)
            export = first_free(Path("exported")) if is_exportable else None
            print_outcome(saved_checkpoint(trainer), self._run.report_path, export=export)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Terminated) and trainer.strategy.launcher is not None:
            # As Lightning does, end the ranks that it started: they may run for long before they notice that this rank
            # is gone
            trainer.strategy.launcher.kill(signal.SIGTERM)
        if (mend := explain_configuring(trainer.strategy, exception)) is not None:
            rank_zero_warn(mend)
        is_in_event = self._run is not None and self._run.is_in_event
        if self._run is not None:
            self._run.stop()
        if trainer.state.fn == "fit" and self._farewell is not None:
            call_last(trainer, self._farewell, saves=not is_in_event)

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
        """The checkpoint's key for the state. Subclasses share the key, so export and verification find the state."""
        # Trainer() refuses two callbacks with one key. Until setup, keys differ, so that setup can name the fix
        return CALLBACK_KEY if self._is_set_up else f"{CALLBACK_KEY} {id(self)}"

    @override
    def state_dict(self) -> dict[str, Any]:
        """The state as plain values. All ranks must call it in the cases that `PruningRun.state` lists."""
        if self._restored is not None:
            return self._restored
        return self._past.state(self.options) if self._run is None else self._run.state()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._past = Past.of_state(state_dict)
        self._restored = state_dict

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        require_shapes(checkpoint)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add a note: verification reads the moments by it, and export rebuilds the Hugging Face model from it."""
        if self._run is None:  # no fit has begun
            checkpoint[NOTE_KEY] = training_note(pl_module, [], self._layers)
        else:
            checkpoint[NOTE_KEY] = training_note(pl_module, self._run.access.numbered_parameters(), self._run.masked)
