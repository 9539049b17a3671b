"""ThanosPruningCallback: when what happens. The algebra, the placement of parameters and the files are elsewhere."""

from __future__ import annotations

import inspect
import signal
import uuid
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import rich
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from thanos_lightning.allocation import Allocation
from thanos_lightning.arguments import (
    CalibrationOptions,
    check_name,
    check_whole,
    described,
    differences,
    refuse_unused,
)
from thanos_lightning.census import take_census
from thanos_lightning.checkpoints import CALLBACK_KEY, CHECKPOINT_FORMAT, NOTE_KEY, training_note
from thanos_lightning.collecting import Collected, Collector, loss_scale
from thanos_lightning.companions import (
    BestScores,
    callbacks_of,
    check_companions,
    check_trainer,
    hold_back_stopping,
    release_stopping,
    replace_callbacks,
    restart_averages,
    saved_checkpoint,
)
from thanos_lightning.enforcement import MaskEnforcer, share_masks
from thanos_lightning.forecast import Calibration, describe, forecast, tokens_per_batch
from thanos_lightning.masks import LayerMask
from thanos_lightning.planning import (
    Planner,
    check_allocation,
    check_steps,
    check_trained,
    default_allocation,
    scheduled_events,
    steps_of,
)
from thanos_lightning.progress import Terminated, ends_on_sigterm, hidden
from thanos_lightning.pruning import check_weights, hold_zeros, prune_window
from thanos_lightning.report.data import Clock, EventReport, PruningReport
from thanos_lightning.report.recorder import LossRecorder
from thanos_lightning.report.tables import print_event, print_outcome, print_summary
from thanos_lightning.saving import save_whole
from thanos_lightning.schedule import SparsitySchedule
from thanos_lightning.sharding import ParameterAccess, check_strategy, choose_access, guard_resume
from thanos_lightning.sharding.loading import explain_loading
from thanos_lightning.sharding.replicated import ReplicatedAccess
from thanos_lightning.solver import NM, Pattern, parse_pattern
from thanos_lightning.solver.layer import SolverOptions
from thanos_lightning.surveying import LayerSurvey, survey_window
from thanos_lightning.targets import (
    IGNORED,
    PrunableLayer,
    TargetOverride,
    assign_patterns,
    check_expressions,
    check_overrides,
    find_targets,
    uncalled_layers,
)
from thanos_lightning.windows import Window, check_ahead, check_begun, reasons

_AT_ONCE, _GRADUALLY = SparsitySchedule(at=[0]), SparsitySchedule(at=[0.1, 0.2, 0.3, 0.4])


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
        self.pattern: Pattern = parse_pattern(pattern, sparsity, outlier_fraction)
        self.targets = check_expressions("targets", targets)
        if not self.targets:
            raise ValueError("targets is []: give at least one glob, such as '*', or leave it out")
        self.ignore = check_expressions("ignore", ignore)
        self.overrides = check_overrides(overrides)
        for name, group, kind in (
            ("solver", solver, SolverOptions),
            ("calibration", calibration, CalibrationOptions),
        ):
            if not isinstance(group, kind):
                raise ValueError(f"{name} is {described(group)}: give {kind.__name__}(...)")
        self.solver, self.calibration = solver, calibration
        if schedule is None:
            schedule = _GRADUALLY if calibration.batches is None else _AT_ONCE
        if not isinstance(schedule, SparsitySchedule):
            raise ValueError(
                f"schedule is {schedule!r}: give a SparsitySchedule(start_step, end_step, every_n_steps), one with at, "
                "or None"
            )
        self.schedule = schedule
        if calibration.joins_rows and solver.admm_steps == solver.refine_steps == 0 and solver.needs_statistics:
            raise ValueError(
                "calibration.output_weights is 'full', but solver.admm_steps and refine_steps are 0, and only these "
                "steps join rows: give some, or take 'diagonal'"
            )
        if not (allocation in (None, "uniform") or isinstance(allocation, Allocation)):
            raise ValueError(f"allocation is {allocation!r}: give an Allocation, 'uniform' or None")
        self.allocation = allocation
        if isinstance(allocation, Allocation):
            if not solver.needs_statistics:
                raise ValueError(
                    f"method {solver.method!r} reports no losses, and allocation needs them: choose 'thanos', "
                    "'sparsegpt' or 'wanda'"
                )
            check_allocation(self.pattern)
        check_whole("verify_every_n_steps", verify_every_n_steps, 0)
        self.verify_every_n_steps = verify_every_n_steps
        check_name("monitor", monitor, "val/loss")
        self.monitor = monitor
        refuse_unused(solver, calibration, [self.pattern, *(other.parsed() for other in self.overrides)])

        self._is_set_up = False
        self._reset()

    def _reset(self) -> None:
        """Forget everything about earlier trainings."""
        self.report = PruningReport()
        self._optimizer_steps = 0
        self._optimizer_steps_seen = 0  # at the end of the last batch
        self._windows_done = 0
        self._applied: dict[str, Pattern] = {}
        self._forgets_masks = False  # of a training before, unless a checkpoint is loaded
        self._total_steps: int | None = None  # of a Trainer's first fit, of which the schedule has fractions
        self._measured: tuple[int, float] | None = None  # optimizer steps, value of the monitored metric
        self._restored: dict[str, Any] | None = None  # a state that has been loaded and not been used yet
        # below: made at the start of each fit
        self._layers: dict[str, PrunableLayer] = {}
        self._final_patterns: dict[str, Pattern] = {}
        self._windows: list[Window] = []
        self._schedule_in_steps: SparsitySchedule | None = None  # for a second fit, where it has fractions of the first
        self._surveys: dict[str, LayerSurvey] = {}
        self._planner: Planner | None = None
        self._collector: Collector | None = None
        self._access: ParameterAccess | None = None
        self._enforcer: MaskEnforcer | None = None
        self._handles: list[RemovableHandle] = []
        self._held_back: list[EarlyStopping] = []
        self._scores = BestScores()
        self._clock = Clock()
        self._recorder = LossRecorder(self.report.history)
        self._sparsity: torch.Tensor | None = None  # as it is logged

    # What the Trainer calls, in its order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_trainer(trainer)
        self._is_set_up = True
        if stage == "fit":
            if trainer.global_step > 0:  # the same Trainer goes on
                self._restored = self.state_dict()
                # the engine of the fit before, and masks on the device, must not wait beside the new ones
                self._access = self._enforcer = self._collector = None
            else:
                has_pruned = bool(self._applied)
                self._reset()
                self._forgets_masks = has_pruned
            check_companions(trainer, self)
            check_strategy(trainer.strategy)
            save_whole(trainer.strategy)
            if isinstance(trainer.strategy, DeepSpeedStrategy):
                guard_resume(trainer.strategy)
            if getattr(pl_module, "_compiler_ctx", None) is not None:
                raise MisconfigurationException(
                    "the LightningModule is compiled (torch.compile): the statistics of its layers can't be collected. "
                    "Pass the uncompiled module to fit, and compile the exported model"
                )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = find_targets(pl_module, self.targets, self.ignore)
        if uncalled := uncalled_layers(pl_module, self.targets, self.ignore):
            rank_zero_info(
                f"{len(uncalled)} layer(s) of torch's MultiheadAttention stay dense, such as {uncalled[0]}: it reads "
                "their weights, and its in_proj_weight, without calling a layer whose inputs could be collected"
            )
        self._final_patterns = assign_patterns(self._layers, self.pattern, self.overrides)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._access = choose_access(trainer.strategy, self._layers)
        check_steps(trainer, self._access)
        if self.calibration.output_weights in ("diagonal", "full") and self._lacks_gradients:
            raise MisconfigurationException(
                f"calibration.output_weights is {self.calibration.output_weights!r}, but under ZeRO-3 there are none "
                "on calibration.batches where DeepSpeed gathers modules as a whole, such as mixtures of experts "
                "(leaf_module in its configuration): leave the batches out to have those of the training, or take "
                "'uniform'"
            )
        check_weights(self._layers, self._access)
        self._enforcer = MaskEnforcer(self._layers, self._access)
        self._enforcer.begin()
        self._collector = self._new_collector(self._access)
        self._collector.check(trainer, pl_module)
        self._planner = self._new_planner()
        if self._forgets_masks and self._restored is None:
            raise MisconfigurationException(
                "this ThanosPruningCallback has pruned in another training, and a new Trainer would lose its zeros: to "
                "go on, pass ckpt_path to fit or use the same Trainer; for another model, make a new callback"
            )
        if self.schedule.has_fractions and self._total_steps is None:
            self._total_steps = steps_of(trainer)
        changed: dict[str, str] = {}
        if self._restored is not None:
            changed = differences(self._restored["arguments"], self._arguments())
            self._restore_masks(share_masks(self._restored["masks"], self._access), changed)
        else:
            self._hold_zeros()
            if trainer.global_step > 0:  # a checkpoint from before the callback was added
                self._optimizer_steps = self._optimizer_steps_seen = self._steps_without_state(trainer)
        self._windows = self._plan(trainer)
        if self._total_steps is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._schedule_in_steps = self.schedule.resolve(self._total_steps)
        begun = self._windows_done
        if self._restored is not None:
            begun += self._restored["collected"] is not None
            check_begun(self._windows[:begun], self._restored["windows"][:begun], changed)
        check_ahead(self._windows[begun:], self._optimizer_steps)
        if self.monitor is not None:
            self.report.summary.metric = self.monitor
            if not trainer.enable_validation:
                raise MisconfigurationException(
                    f"monitor is {self.monitor!r}, but the Trainer has no validation: give a validation dataloader, or "
                    "monitor=None"
                )
        counting = self._counting_optimizer(self._access)
        for optimizer in self._access.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._post_step(counts=optimizer is counting)))
        if self._restored is not None and self._restored["collected"] is not None:
            if self._restored.get("joins_rows", False) != self.calibration.joins_rows:
                raise MisconfigurationException(
                    "the checkpoint was saved while statistics were collected, and "
                    f"{changed['calibration.output_weights']}: resume with what it was trained with"
                )
            self._collect(self._windows[self._windows_done])
            self._collector.load(self._restored["collected"])
        if changed:
            said = "; ".join(changed.values())
            rank_zero_warn(f"from here on, other arguments of the callback count than before: {said}")
        parts = self._restored["event_parts"] if self._restored is not None else {}
        self._restored = None
        if self._windows_done < len(self._windows):
            self._held_back = hold_back_stopping(trainer)
        self._clock = Clock(self.report.summary, pl_module.device)
        self._clock.parts = dict(parts)
        self._recorder = LossRecorder(self.report.history)
        self._sparsity = None
        self._announce(trainer, pl_module)
        self._advance(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._scores.renewed(trainer, "step")
        if self._collector is not None:
            self._collector.begin(batch, partial(loss_scale, trainer))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        # what runs the model after the training step (other callbacks' samples, probes) is no training token
        if self._collector is not None and pl_module.automatic_optimization:
            self._collector.end()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # in manual optimization the user clips before the optimizer step that the next hook sees
        if self._enforcer is not None and not pl_module.automatic_optimization:
            self._enforcer.mask_gradients()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._enforcer is not None:
            self._enforcer.mask_gradients(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._collector is not None:
            self._collector.end()
        self._clock.tick()
        enforcer = self._require_enforcer()
        before, now = self._optimizer_steps_seen, self._optimizer_steps
        if now != before:
            self._optimizer_steps_seen = now
            self._recorder.add(now, outputs)
            self._advance(trainer, pl_module)
            every = self.verify_every_n_steps
            if every and now // every > before // every:  # a batch may take several steps
                enforcer.verify()
        if self._sparsity is None:  # a number would be copied to the device at each batch
            self._sparsity = torch.tensor(enforcer.sparsity(), device=pl_module.device)
        pl_module.log("sparsity/total", self._sparsity)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._collector is not None:  # a batch that the module skipped has no end
            self._collector.end()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.pause()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.go_on()
        if self.monitor is not None and not trainer.sanity_checking and trainer.state.fn == "fit":
            value = trainer.callback_metrics.get(self.monitor)
            if value is None:
                raise MisconfigurationException(
                    f"monitor is {self.monitor!r}, which validation does not log. It logs: "
                    f"{', '.join(sorted(trainer.callback_metrics)) or 'nothing'}"
                )
            self._measured = (self._optimizer_steps, float(value))
            self.report.history.metrics.append(self._measured)
            self._recorder.settle()
        if not trainer.sanity_checking:
            self._scores.renewed(trainer, "validation")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        enforcer = self._require_enforcer()
        enforcer.verify()
        if self.monitor is not None and self.report.events:
            self.report.summary.recovered = self._measure(trainer)
        missed = [window for window in self._windows[self._windows_done :] if window.is_last]
        if missed:
            events = [window for window in missed if not window.surveys]
            which = (
                f"{len(events)} pruning event(s), the last one at step {events[-1].end_step}"
                if events
                else "all events"
            )
            rank_zero_warn(
                f"training ended after {self._optimizer_steps} optimizer steps, before {which}: the final sparsity was "
                "not reached. (Steps that a "
                "gradient scaler skips, and those of other optimizers, do not count)"
            )
        elif self._windows:
            last = self._windows[-1].end_step
            self._scores.warn_of_none(trainer, last)
            # else it was said at the beginning, or is a fast_dev_run
            if self._optimizer_steps == last and trainer.estimated_stepping_batches != last:
                rank_zero_warn(
                    f"the training ended with its last event, at optimizer step {last}: no step was left in which the "
                    "model could recover. Train for longer, or end the schedule earlier (end_step)"
                )
        self._clock.tick()
        if trainer.is_global_zero:
            self._write_report(trainer)
            print_summary(self.report, enforcer.sparsity())

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enforcer is None:
            check_trained(trainer)
        # again, after every callback's on_train_end has had its last write
        if self._enforcer is not None:  # there was something left to train
            self._enforcer.verify()
            if trainer.is_global_zero:
                is_exportable = "architecture" in training_note(pl_module, [], self._layers)
                print_outcome(saved_checkpoint(trainer), self._report_path(trainer), is_exportable=is_exportable)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Terminated) and trainer.strategy.launcher is not None:
            # as Lightning does for the ranks that it has started; others may work for long before they miss this one
            trainer.strategy.launcher.kill(signal.SIGTERM)
        if (mend := explain_loading(trainer.strategy, exception)) is not None:
            rank_zero_warn(mend)
        release_stopping(trainer, self._held_back)
        self._remove_hooks()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        release_stopping(trainer, self._held_back)
        self._remove_hooks()

    # State

    @property
    @override
    def state_key(self) -> str:
        """Where a checkpoint keeps the state; the same for subclasses, so that export and verification find it."""
        # Lightning compares keys when a Trainer is made: two of us must get as far as being refused in our words
        return CALLBACK_KEY if self._is_set_up else f"{CALLBACK_KEY} {id(self)}"

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plain values. While a window is open under DDP, all ranks must call it.

        They are the same on all ranks, but for two things. The sums of an open window: rank 0, which writes the
        checkpoint, has those of all ranks, and the others have their own. And where each rank writes a file of its own
        (ZeRO-3), it has its own sums and its share of the masks: each mask is in one of the files.
        """
        if self._restored is not None:  # loaded, and not yet used
            return self._restored
        self._recorder.settle()
        return {
            "format": CHECKPOINT_FORMAT,
            "arguments": self._arguments(),
            "optimizer_steps": self._optimizer_steps,
            "windows": [window.state() for window in self._windows],
            "windows_done": self._windows_done,
            "masks": {} if self._enforcer is None else self._masks_state(self._enforcer, self._require_access()),
            "collected": None if self._collector is None else self._collector.state(),
            "joins_rows": self.calibration.joins_rows,
            "report": self.report.state(),
            "event_parts": dict(self._clock.parts),
            "measured": self._measured,
            "old_scores": self._scores.old,
            "surveys": {name: survey.state() for name, survey in self._surveys.items()},
            # where each rank writes a file, they tell by it whether they were written together
            "save": self._access.gather(uuid.uuid4().hex)[0] if self._access and self._access.saves_every_rank else "",
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("format") != CHECKPOINT_FORMAT:
            raise MisconfigurationException(
                f"the checkpoint's pruning state has format {state_dict.get('format')!r}, this version reads "
                f"{CHECKPOINT_FORMAT}: resume with the version of thanos_lightning that wrote it"
            )
        self._restored = state_dict
        self._optimizer_steps = self._optimizer_steps_seen = state_dict["optimizer_steps"]
        self._windows_done = state_dict["windows_done"]
        self.report = PruningReport.from_state(state_dict["report"])
        self._measured = state_dict["measured"] and tuple(state_dict["measured"])
        self._scores.old.update(state_dict["old_scores"])
        self._surveys = {name: LayerSurvey(**state) for name, state in state_dict["surveys"].items()}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what verification needs to read the moments, and an export to rebuild the Hugging Face model."""
        stepped = [] if self._access is None else self._access.numbered_parameters()  # none before a training
        checkpoint[NOTE_KEY] = training_note(pl_module, stepped, self._layers)

    def _arguments(self) -> dict[str, str]:
        """What is asked of the callback, in words that a resumed training compares with its own."""
        values = {**vars(self), "overrides": list(map(repr, self.overrides))}
        arguments: dict[str, str] = {}
        for name in inspect.signature(ThanosPruningCallback).parameters:
            if name in ("solver", "calibration"):
                arguments |= {f"{name}.{option}": described(value) for option, value in vars(values[name]).items()}
            elif name in values:
                arguments[name] = described(values[name])
        return arguments | ({} if self._total_steps is None else {"max_steps": described(self._total_steps)})

    def _masks_state(self, enforcer: MaskEnforcer, access: ParameterAccess) -> dict[str, Any]:
        masks = {}
        for number, name in enumerate(enforcer.masked):
            layer = self._layers[name]
            if access.saves_every_rank:
                keep = enforcer.collect_keep(name, owner=number % access.world_size)
            else:
                keep = enforcer.keep_mask(name)
            if keep is not None:
                masks[layer.parameter_name] = LayerMask(keep, self._applied[name], layer.transposed).state()
        return masks

    def _restore_masks(self, masks: Iterable[tuple[str, dict[str, Any]]], changed: Mapping[str, str]) -> None:
        by_parameter = {layer.parameter_name: name for name, layer in self._layers.items()}
        for parameter_name, state in masks:
            name = by_parameter.get(parameter_name)
            if name is None:
                raise MisconfigurationException(
                    f"the checkpoint has a mask for {parameter_name}, which is no target now{reasons(changed)}: resume "
                    "with the model, targets and ignore that it was trained with"
                )
            mask, layer = LayerMask.from_state(state), self._layers[name]
            if mask.keep.shape != (layer.rows, layer.cols):
                raise MisconfigurationException(
                    f"the checkpoint's mask for {parameter_name} has shape {tuple(mask.keep.shape)}, the layer has "
                    f"{(layer.rows, layer.cols)}: resume with the model that it was trained with"
                )
            self._applied[name] = mask.pattern
            self._require_enforcer().set_mask(name, mask.keep)

    def _hold_zeros(self) -> None:
        found = hold_zeros(self._layers, self._require_access(), self._require_enforcer())
        self._applied.update(found)
        if found:
            first, pattern = next(iter(found.items()))
            rank_zero_warn(
                f"{len(found)} target(s) are pruned already, such as {first} with {pattern.sparsity:.1%} zeros: these "
                "are kept from the first step on, and count towards the pattern. What the report calls dense is this "
                "model. (To train such a layer's zeros, add it to ignore)"
            )

    def _steps_without_state(self, trainer: Trainer) -> int:
        """The optimizer steps behind a checkpoint that has no state of this callback."""
        if len(trainer.optimizers) > 1:
            raise MisconfigurationException(
                "the checkpoint has no pruning state, and with several optimizers its steps can't be counted: load its "
                "weights, and fit without ckpt_path"
            )
        return trainer.global_step

    # Plan

    def _new_planner(self) -> Planner:
        if isinstance(self.allocation, Allocation):
            allocation: Allocation | None = self.allocation
        elif self.allocation is None and self._weights_outputs and not self._lacks_gradients:
            allocation = default_allocation(self.pattern)
        else:
            allocation = None
        return Planner(
            self.pattern,
            self._schedule_in_steps or self.schedule,
            allocation,
            gives_way=self.allocation is None,
            calibration_steps=self.calibration.steps if self._collects_in_training else 0,
            memory_gib=self.calibration.memory_gib if self.solver.needs_statistics else None,
            joins_rows=self.calibration.joins_rows,
        )

    def _plan(self, trainer: Trainer) -> list[Window]:
        restored, begun_with_survey = self._restored, None
        if restored is not None and (restored["windows_done"] or restored["collected"] is not None):
            begun_with_survey = bool(restored["windows"][0][-1] == "surveys")
        return self._require_planner().plan(
            trainer,
            self._layers,
            self._final_patterns,
            self._surveys,
            optimizer_steps=self._optimizer_steps,
            begun_with_survey=begun_with_survey,
        )

    @property
    def _weights_outputs(self) -> bool:
        wanted = self.calibration.output_weights or ("diagonal" if self.solver.method == "thanos" else "uniform")
        return wanted != "uniform"

    @property
    def _lacks_gradients(self) -> bool:
        return self.calibration.batches is not None and not self._require_access().can_differentiate

    @property
    def _collects_in_training(self) -> bool:
        return self.solver.needs_statistics and self.calibration.batches is None

    def _counting_optimizer(self, access: ParameterAccess) -> Optimizer:
        """The optimizer whose steps are the steps of the schedule: the first one that updates a target."""
        for optimizer in access.optimizers:
            if access.stepped_by(optimizer, self._layers):
                return optimizer
        return access.optimizers[0]

    def _announce(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what will be pruned, when, and what it will take."""
        census, planner, access = take_census(pl_module, self._layers), self._require_planner(), self._require_access()
        summary = self.report.summary
        summary.target_weights, summary.model_weights = census.target_weights, census.model_weights
        if census.share < 0.5:
            rank_zero_warn(
                f"only {census.share:.1%} of the model's weights are in the layers to prune, which can be Linear and "
                f"Conv1D; left out are {census.shares()}"
            )
        joined, needs = self.calibration.joins_rows, self.solver.needs_statistics
        with torch.random.fork_rng(devices=[]):  # which a training goes on with
            found = (
                self._require_collector().batches(trainer, pl_module) if self.calibration.batches is not None else None
            )
        if not trainer.is_global_zero:
            return
        number, tokens = tokens_per_batch(trainer.train_dataloader if found is None else found) if needs else (0, 0)
        if needs and found is None:
            steps = max((window.end_step - window.start_step for window in self._windows), default=0)
            number = steps * trainer.accumulate_grad_batches
        weighs = not self._lacks_gradients and any(map(self._wants_gradients, self._windows[:1]))
        calibration = Calibration(number, tokens, found is None, weighs, joined)
        surveyed = planner.to_survey(self._final_patterns) if any(w.surveys for w in self._windows) else {}
        outlook = forecast(
            self._layers,
            census,
            self.solver,
            calibration,
            trainer,
            memory_gib=self.calibration.memory_gib if needs else None,
            is_sharded=not isinstance(access, ReplicatedAccess),
            levels=max(map(len, surveyed.values()), default=0),
            events=len({window.event.step for window in self._windows}),
            pattern=self.pattern,
        )
        text = describe(
            census,
            self._final_patterns.values(),
            scheduled_events(self._schedule_in_steps or self.schedule, trainer),
            self.pattern,
            calibration,
            outlook,
            steps=steps_of(trainer),
            steps_taken=self._optimizer_steps,
        )
        rich.get_console().print(f"\n{text}\n", markup=False, highlight=False)

    # Steps

    def _post_step(self, *, counts: bool) -> Any:
        def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if counts and self._require_access().completes_step(optimizer):
                self._optimizer_steps += 1
            self._require_enforcer().enforce(optimizer)

        return after_step

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the windows that end here, and start to collect the one that begins here."""
        while self._windows_done < len(self._windows):
            window = self._windows[self._windows_done]
            if self._optimizer_steps >= window.end_step:
                # before a survey that the first event follows at once: a checkpoint of the validation has its sums
                is_first = not self.report.events and (not window.surveys or self.calibration.memory_gib is None)
                if is_first and self.monitor is not None:
                    self.report.summary.dense = self._measure(trainer)
                shown = trainer.progress_bar_callback is not None  # not where the user wants no bars
                with self._clock.event(), hidden(not shown), ends_on_sigterm():
                    (self._survey if window.surveys else self._prune)(window, trainer, pl_module)
                if not window.surveys:
                    self.report.events[-1].add(self._clock.take())
                if window.is_last and not window.surveys:
                    self._finish_event(self.report.events[-1], trainer)
                self._windows_done += 1
                if self._windows_done == len(self._windows):
                    self._scores.pruned(trainer)
                    release_stopping(trainer, self._held_back)
            else:
                is_open = self._require_collector().statistics is not None
                if not is_open and window.end_step > window.start_step <= self._optimizer_steps:
                    self._collect(window)
                return
        if self.monitor is not None and self.report.summary.pruned is None and self.report.events:
            self.report.summary.pruned = self._measure(trainer)

    def _new_collector(self, access: ParameterAccess) -> Collector:
        return Collector(
            self._layers,
            access,
            calibration=self.calibration.batches,
            attention_mask_key=self.calibration.attention_mask_key,
            keeps_survey=self.calibration.memory_gib is None,
            needs_gradients=self.calibration.output_weights is not None,
            joins_outputs=self.calibration.joins_rows,
        )

    def _collect(self, window: Window) -> None:
        self._require_collector().open(window, gradients=self._wants_gradients(window))

    def _collected(self, window: Window, trainer: Trainer, pl_module: LightningModule) -> Collected:
        collected = Collected()
        if self.solver.needs_statistics:
            wanted = self._wants_gradients(window)
            self._clock.now("calibrating")
            collected = self._require_collector().take(window, trainer, pl_module, gradients=wanted)
            self._clock.add("calibrating", collected.seconds)
            self.report.summary.collecting_seconds += collected.seconds
        # what a calibration set or a validation has left is in the way of what is solved next
        self._require_access().release()
        return collected

    def _wants_gradients(self, window: Window) -> bool:
        """Whether outputs of a layer, or layers, are to be held against each other by the loss's gradients."""
        compete = (
            self.calibration.joins_rows
            or (self._require_planner().allocation is not None and window.surveys)
            or any(not isinstance(pattern, NM) or pattern.outlier_fraction for pattern in window.patterns.values())
        )
        return self._weights_outputs and bool(compete)

    def _survey(self, window: Window, trainer: Trainer, pl_module: LightningModule) -> None:
        collected = self._collected(window, trainer, pl_module)
        assert collected.accumulators is not None, "refused where a method has no statistics"
        self._clock.now("scanning")
        self._surveys |= survey_window(
            window,
            self._layers,
            collected.accumulators,
            access=self._require_access(),
            options=self.solver,
            tried=self._require_planner().to_survey(window.patterns),
            output_weights=collected.output_weights,
            joins_rows=self.calibration.joins_rows,
            sums_stay=collected.stay,
        )
        if window.is_last:
            self._windows = self._plan(trainer)
        following = self._windows[self._windows_done + 1 :]
        if following and following[0].end_step > self._optimizer_steps:
            self._require_collector().forget_survey()

    def _prune(self, window: Window, trainer: Trainer, pl_module: LightningModule) -> None:
        access, enforcer = self._require_access(), self._require_enforcer()
        if not self.report.events and (tell := getattr(pl_module, "on_before_pruning", None)) is not None:
            tell()
        collected = self._collected(window, trainer, pl_module)
        self._clock.now("solving")
        layers = prune_window(
            window,
            self._layers,
            collected.accumulators,
            access=access,
            enforcer=enforcer,
            options=self.solver,
            output_weights=collected.output_weights,
            joins_rows=self.calibration.joins_rows,
            later={name for other in self._windows[self._windows_done + 1 :] for name in other.patterns},
            on_writing=lambda: self._clock.now("writing"),
        )
        self._applied.update({layer.name: window.patterns[layer.name] for layer in layers})
        self._sparsity = None
        self._measured = None  # of the weights before
        restart_averages(trainer, pl_module)
        if not self.report.events or self.report.events[-1].step != window.event.step:
            self.report.events.append(EventReport(window.event.step, window.event.sparsity(self.pattern.sparsity)))
        self.report.events[-1].layers.extend(layers)

    def _finish_event(self, event: EventReport, trainer: Trainer) -> None:
        sparsity = self._require_enforcer().sparsity()
        metrics = {
            "pruning/step": float(event.step),
            "pruning/relative_loss": event.relative_loss,
            "pruning/seconds": event.seconds,
            "sparsity/target": event.target,
            "sparsity/total": sparsity,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        if trainer.is_global_zero:
            print_event(event)
            self._write_report(trainer)

    def _measure(self, trainer: Trainer) -> float:
        """The monitored metric of the weights as they are, from the Trainer's own validation loop."""
        if self._measured is None or self._measured[0] != self._optimizer_steps:
            connector, callbacks = trainer._logger_connector, callbacks_of(trainer)
            first = connector._first_loop_iter
            # a validation that the user didn't ask for must not save a checkpoint or stop the training
            replace_callbacks(trainer, [one for one in callbacks if not isinstance(one, (Checkpoint, EarlyStopping))])
            trainer.validating = True  # the loops look here for which of them is active
            try:
                trainer.fit_loop.epoch_loop.val_loop.run()
            finally:
                trainer.training = True
                replace_callbacks(trainer, callbacks)
                connector._first_loop_iter = first
        if self._measured is None or self._measured[0] != self._optimizer_steps:
            raise MisconfigurationException(
                f"monitor is {self.monitor!r}, but validation ran without a batch: give a validation dataloader that "
                "isn't empty, or monitor=None"
            )
        return self._measured[1]

    def _report_path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "pruning_report.json"

    def _write_report(self, trainer: Trainer) -> None:
        self._recorder.settle()
        path = self._report_path(trainer)
        try:
            self.report.write(path)
        except OSError as error:  # one rank's full disk must not end a training of days
            rank_zero_warn(f"the report could not be written to {path} ({error})")

    # Parts that exist during a fit

    def _require_access(self) -> ParameterAccess:
        assert self._access is not None, "set in on_fit_start"
        return self._access

    def _require_enforcer(self) -> MaskEnforcer:
        assert self._enforcer is not None, "set in on_train_start"
        return self._enforcer

    def _require_collector(self) -> Collector:
        assert self._collector is not None, "set in on_train_start"
        return self._collector

    def _require_planner(self) -> Planner:
        assert self._planner is not None, "set in on_train_start"
        return self._planner

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._enforcer is not None:
            self._enforcer.end()
        if self._collector is not None:
            self._collector.stop()
