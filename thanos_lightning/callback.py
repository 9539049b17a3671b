"""ThanosPruningCallback: when what happens. The algebra, the placement of parameters and the files are elsewhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

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
from thanos_lightning.calibration import (
    InputStatistics,
    count_dataloader,
    gather_states,
    load_own_states,
    loss_of,
    token_mask,
)
from thanos_lightning.checkpoints import CALLBACK_KEY, CHECKPOINT_FORMAT, NOTE_KEY, training_note
from thanos_lightning.companions import (
    callbacks_of,
    check_averaging,
    forget_best,
    hold_back_stopping,
    release_stopping,
    replace_callbacks,
    restart_averages,
    warn_of_no_best,
)
from thanos_lightning.enforcement import MaskEnforcer, share_masks
from thanos_lightning.gradients import OutputGradients, output_weights
from thanos_lightning.masks import LayerMask
from thanos_lightning.planning import (
    Progression,
    Window,
    changes,
    check_ahead,
    check_begun,
    check_progression,
    plan_windows,
    split_by_memory,
    turns,
)
from thanos_lightning.pruning import PruningError, assign_owners, prune_window
from thanos_lightning.report import Clock, EventReport, PruningReport, event_progress, print_event, print_summary
from thanos_lightning.rewarming import Rewarming
from thanos_lightning.schedule import Event, SparsitySchedule
from thanos_lightning.sharding import ParameterAccess, check_strategy, choose_access, guard_resume
from thanos_lightning.solver import NM, HessianAccumulator, Pattern, Unstructured, parse_pattern
from thanos_lightning.solver.layer import SolverOptions
from thanos_lightning.surveying import MOST_SURVEYED, LayerSurvey, allocate, survey_window
from thanos_lightning.targets import PrunableLayer, TargetOverride, assign_patterns, find_targets

_ORDERED: dict[Progression, Progression] = {"least-loss-first": "front-to-back"}


class ThanosPruningCallback(Callback):
    """Prunes layers while the model is trained, on a schedule, and keeps the zeros from then on.

    Before each event of the schedule the second moments of the layers' inputs are accumulated from the training
    batches; at the event each layer is pruned by the block-wise second-order solver of Thanos (arXiv 2504.05346);
    after every later optimizer step the pruned weights and their moments are exactly 0. Masks are nested: what was
    pruned stays pruned.

    Args:
        pattern: "2:4" (any N:M, at most N nonzeros in M), "unstructured" or "structured".
        sparsity: Final fraction of zeros, for "unstructured" and "structured".
        outlier_fraction: Fraction of the rows that stay dense at the end, for N:M and "structured".
        schedule: When to prune, and how much by then.
        targets: Globs or `re:` expressions of module names; each must match a Linear or Conv1D layer.
        ignore: Layers to leave out, in the same words.
        overrides: Other patterns for some of the targets.
        method: "thanos", "sparsegpt", "wanda" or "magnitude".
        block_size: Columns pruned jointly.
        damping: Added to the Hessian's diagonal, relative to its mean.
        saliency: What "thanos" chooses by: "wanda", "obs" or "balanced".
        admm_steps: Steps after the method that improve mask and weights together. saliency="wanda", admm_steps=0 and
            refine_steps=0 are the paper's algorithm, and the defaults of `prune`; those here differ from it on purpose.
        refine_steps: Conjugate-gradient steps on the kept weights after that.
        output_weights: How much the error of each output of a layer counts, against its other outputs and in an
            allocation against those of other layers. "gradients": as much as the training loss feels it, by the mean
            square of its gradient there over the same batches (the diagonal of K-FAC's output factor, arXiv
            1503.05671). "uniform": all alike, as in the papers. None is "gradients" for "thanos", else "uniform".
        calibration_steps: Optimizer steps whose batches are accumulated before an event, at most; a window never
            reaches back past the event before.
        calibration_dataloader: Prune on these batches instead of training batches, run at the event. "datamodule" asks
            the datamodule, or the LightningModule, for `calibration_dataloader()`. Batches go through
            `pl_module(**batch)`, or `calibration_step(batch)` where the module has one. Where output weights are
            wanted, that has to return the loss, and a backward is run that leaves parameters' gradients alone; not
            under ZeRO-3, where all outputs count alike then.
        attention_mask_key: Where a batch keeps the mask of real tokens; None counts every token.
        hessian_memory_gib: Memory for the second moments. Layers are split into windows that fit, front to back, each
            collected after the earlier ones are pruned. None holds all at once.
        progression: How the model becomes sparser over events. "within-layers": all layers together, by single weights
            where they are unstructured, by rows where they are N:M (the fraction of dense rows falls to its final
            value), by columns where they are structured. "levels": N:M goes through the patterns that keep more, as 3:4
            is on the way to 2:4. "front-to-back", "back-to-front" and "least-loss-first": layers take turns, each
            pruned at once to its end.
        allocation: Layers of unequal sparsity, together as sparse as the pattern asks for; "uniform" makes all alike.
            None is `Allocation("loss")` for "unstructured" with output weights, where the layers can be looked at
            before the first event and the schedule begins below what a layer may get; else "uniform". It and
            "least-loss-first" look at all layers before that event, which takes calibration steps of their own; where
            there are too few for both, half of those before the event.
        rewarm_steps: Optimizer steps after each event in which the learning rates rise from a fraction to what the
            schedulers ask for.
        moments: What of the optimizers' moments of the weights that are kept: "keep", or "clear", which forgets the
            directions (first moments), but not the scales.
        verify_every_n_steps: Count the zeros every so many optimizer steps, and raise if one came back. 0 never counts.
        monitor: Metric of the validation loop to measure before the first event, after the last one, and at the end.
            Validation is run for it at these steps where it hasn't just been.

    Raises:
        ValueError: For an argument that can't be right, naming it and the mend. What depends on the model or the
            Trainer is checked before the first training batch.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from thanos_lightning import SparsitySchedule, ThanosPruningCallback
        >>> pruning = ThanosPruningCallback("2:4", schedule=SparsitySchedule(10, 30, 10), calibration_steps=5)
        >>> trainer = Trainer(max_steps=50, callbacks=[pruning], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        pattern: str = "2:4",
        sparsity: float | None = None,
        schedule: SparsitySchedule = SparsitySchedule(0.1, 0.5, 0.1),
        targets: str | Sequence[str] = ("*",),
        ignore: str | Sequence[str] = ("lm_head",),
        *,
        outlier_fraction: float | None = None,
        overrides: Sequence[TargetOverride] = (),
        method: Literal["thanos", "sparsegpt", "wanda", "magnitude"] = "thanos",
        block_size: int = 128,
        damping: float = 0.01,
        saliency: Literal["wanda", "obs", "balanced"] = "balanced",
        admm_steps: int = 8,
        refine_steps: int = 2,
        output_weights: Literal["gradients", "uniform"] | None = None,
        calibration_steps: int = 8,
        calibration_dataloader: str | Iterable[Any] | None = None,
        attention_mask_key: str | None = "attention_mask",
        hessian_memory_gib: float | None = None,
        progression: Progression = "within-layers",
        allocation: Allocation | Literal["uniform"] | None = None,
        rewarm_steps: int = 0,
        moments: Literal["keep", "clear"] = "keep",
        verify_every_n_steps: int = 100,
        monitor: str | None = None,
    ) -> None:
        self.pattern: Pattern = parse_pattern(pattern, sparsity, outlier_fraction)
        self.schedule = schedule
        self.targets = targets
        self.ignore = ignore
        self.overrides = tuple(overrides)
        for other in self.overrides:
            other.parsed()
        self.options = SolverOptions(method, block_size, damping, saliency, admm_steps, refine_steps)
        if calibration_steps < 1:
            raise ValueError(f"calibration_steps is {calibration_steps}: give at least one optimizer step")
        self.calibration_steps = calibration_steps
        if isinstance(calibration_dataloader, str) and calibration_dataloader != "datamodule":
            raise ValueError(f"calibration_dataloader is {calibration_dataloader!r}: give a dataloader or 'datamodule'")
        if isinstance(calibration_dataloader, Iterator):
            raise ValueError(
                "calibration_dataloader is an iterator, which the first event would use up: give a list or a DataLoader"
            )
        self.calibration_dataloader = calibration_dataloader
        if output_weights not in (None, "gradients", "uniform"):
            raise ValueError(f"output_weights is {output_weights!r}: choose 'gradients', 'uniform' or None")
        if output_weights == "gradients" and not self.options.needs_statistics:
            raise ValueError(f"output_weights is 'gradients', but method {method!r} looks at no batches: leave it out")
        self.output_weights = output_weights
        self.attention_mask_key = attention_mask_key
        if hessian_memory_gib is not None and not hessian_memory_gib > 0:
            raise ValueError(
                f"hessian_memory_gib is {hessian_memory_gib}: give a size > 0, or None to hold all at once"
            )
        self.hessian_memory_gib = hessian_memory_gib
        if progression not in get_args(Progression):
            known = ", ".join(map(repr, get_args(Progression)))
            raise ValueError(f"progression is {progression!r}: choose one of {known}")
        self.progression: Progression = progression
        if not (allocation in (None, "uniform") or isinstance(allocation, Allocation)):
            raise ValueError(f"allocation is {allocation!r}: give an Allocation, 'uniform' or None")
        self.allocation = allocation
        if self._needs_survey and not self.options.needs_statistics:
            what = "allocation" if isinstance(allocation, Allocation) else "least-loss-first"
            raise ValueError(
                f"method {method!r} reports no losses, and {what} needs them: choose 'thanos', 'sparsegpt' or 'wanda'"
            )
        if isinstance(allocation, Allocation):
            self._check_allocation(allocation)
        if rewarm_steps < 0:
            raise ValueError(f"rewarm_steps is {rewarm_steps}: give a number of optimizer steps ≥ 0")
        self.rewarm_steps = rewarm_steps
        if moments not in ("keep", "clear"):
            raise ValueError(f"moments is {moments!r}: choose 'keep' or 'clear'")
        self.moments = moments
        if verify_every_n_steps < 0:
            raise ValueError(f"verify_every_n_steps is {verify_every_n_steps}: give a number ≥ 0 (0 never counts)")
        self.verify_every_n_steps = verify_every_n_steps
        self.monitor = monitor

        self._reset()

    def _reset(self) -> None:
        """Forget everything about earlier trainings."""
        self.report = PruningReport()
        self._optimizer_steps = 0
        self._optimizer_steps_seen = 0  # at the end of the last batch
        self._windows_done = 0
        self._applied: dict[str, Pattern] = {}
        self._forgets_masks = False  # of a training before, unless a checkpoint is loaded
        self._warned_of_no_mask = False
        self._measured: tuple[int, float] | None = None  # optimizer steps, value of the monitored metric
        self._restored: dict[str, Any] | None = None  # a state that has been loaded and not been used yet
        # below: made at the start of each fit
        self._layers: dict[str, PrunableLayer] = {}
        self._final_patterns: dict[str, Pattern] = {}
        self._lacks_gradients = False
        self._windows: list[Window] = []
        self._surveys: dict[str, LayerSurvey] = {}
        self._statistics: InputStatistics | None = None
        self._gradients: OutputGradients | None = None
        self._calibrated: tuple[InputStatistics, OutputGradients | None] | None = None  # of weights as they are
        self._access: ParameterAccess | None = None
        self._enforcer: MaskEnforcer | None = None
        self._handles: list[RemovableHandle] = []
        self._held_back: list[EarlyStopping] = []
        self._clock = Clock()

    # What the Trainer calls, in its order

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            if trainer.global_step > 0:  # the same Trainer goes on
                self._restored = self.state_dict()
                # the engine of the fit before, and masks on the device, must not wait beside the new ones
                self._access = self._enforcer = self._statistics = self._gradients = None
            else:
                has_pruned = bool(self._applied)
                self._reset()
                self._forgets_masks = has_pruned
            check_averaging(trainer)
            check_strategy(trainer.strategy)
            if isinstance(trainer.strategy, DeepSpeedStrategy):
                guard_resume(trainer.strategy)
                self._check_zero_stage_3(trainer.strategy)
            else:
                self._lacks_gradients = False
            if getattr(pl_module, "_compiler_ctx", None) is not None:
                raise MisconfigurationException(
                    "the LightningModule is compiled (torch.compile): the statistics of its layers can't be collected. "
                    "Pass the uncompiled module to fit, and compile the exported model"
                )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = find_targets(pl_module, self.targets, self.ignore)
        self._final_patterns = assign_patterns(self._layers, self.pattern, self.overrides)
        check_progression(self.progression, self._final_patterns)
        self._check_initial()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._access = choose_access(trainer.strategy, self._layers)
        self._enforcer = MaskEnforcer(self._layers, self._access)
        self._warned_of_no_mask = False
        if self._forgets_masks and self._restored is None:
            raise MisconfigurationException(
                "this ThanosPruningCallback has pruned in another training, and a new Trainer would lose its zeros: to "
                "go on, pass ckpt_path to fit or use the same Trainer; for another model, make a new callback"
            )
        if self._restored is not None:
            self._restore_masks(share_masks(self._restored["masks"], self._access))
        elif trainer.global_step > 0:  # a checkpoint from before the callback was added
            self._optimizer_steps = self._optimizer_steps_seen = self._steps_without_state(trainer)
        self._windows = self._plan(trainer)
        begun = self._windows_done
        if self._restored is not None:
            begun += self._restored["collected"] is not None
            check_begun(self._windows[:begun], self._restored["windows"][:begun])
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
            if self.rewarm_steps:
                self._handles += Rewarming(self._rewarmed).attach(optimizer)
            self._handles.append(optimizer.register_step_post_hook(self._post_step(counts=optimizer is counting)))
        self._statistics = self._gradients = self._calibrated = None
        if self._restored is not None and self._restored["collected"] is not None:
            self._collect(self._windows[self._windows_done])
            assert self._statistics is not None
            gradients = load_own_states(self._statistics, self._restored["collected"], self._require_access())
            if self._gradients is not None:
                self._gradients.load(gradients)
        self._restored = None
        if self._windows_done < len(self._windows):
            self._held_back = hold_back_stopping(trainer)
        self._clock = Clock(self.report.summary)
        self._advance(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._statistics is not None:
            self._statistics.begin(partial(self._counted, batch))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        # what runs the model after the training step (other callbacks' samples, probes) is no training token
        if self._statistics is not None and pl_module.automatic_optimization:
            self._statistics.end()

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
        if self._statistics is not None:
            self._statistics.end()
        self._clock.tick()
        enforcer = self._require_enforcer()
        before, now = self._optimizer_steps_seen, self._optimizer_steps
        if now != before:
            self._optimizer_steps_seen = now
            self._advance(trainer, pl_module)
            every = self.verify_every_n_steps
            if every and now // every > before // every:  # a batch may take several steps
                enforcer.verify()
        pl_module.log("sparsity/total", enforcer.sparsity())

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._statistics is not None:  # a batch that the module skipped has no end
            self._statistics.end()

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
            warn_of_no_best(trainer, self._windows[-1].end_step)
        self._clock.tick()
        if trainer.is_global_zero:
            self._write_report(trainer)
            print_summary(self.report, enforcer.sparsity())

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # again, after every callback's on_train_end has had its last write
        if self._enforcer is not None:  # there was something left to train
            self._enforcer.verify()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
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
        return CALLBACK_KEY

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plain values. While a window is open under DDP, all ranks must call it.

        They are the same on all ranks, but for two things. The sums of an open window: rank 0, which writes the
        checkpoint, has those of all ranks, and the others have their own. And where each rank writes a file of its own
        (ZeRO-3), it has its own sums and its share of the masks: each mask is in one of the files.
        """
        if self._restored is not None:  # loaded, and not yet used
            return self._restored
        collected = None
        if self._statistics is not None:
            gradients = {} if self._gradients is None else self._gradients.sums
            collected = gather_states(self._statistics, gradients, self._require_access())
        return {
            "format": CHECKPOINT_FORMAT,
            "optimizer_steps": self._optimizer_steps,
            "windows": [window.state() for window in self._windows],
            "windows_done": self._windows_done,
            "masks": {} if self._enforcer is None else self._masks_state(self._enforcer, self._require_access()),
            "collected": collected,
            "report": self.report.state(),
            "measured": self._measured,
            "surveys": {name: survey.state() for name, survey in self._surveys.items()},
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
        self._surveys = {name: LayerSurvey(**state) for name, state in state_dict["surveys"].items()}

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what verification needs to read the moments, and an export to rebuild the Hugging Face model."""
        stepped = [] if self._access is None else self._access.numbered_parameters()  # none before a training
        checkpoint[NOTE_KEY] = training_note(pl_module, stepped, self._layers)

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

    def _restore_masks(self, masks: Iterable[tuple[str, dict[str, Any]]]) -> None:
        by_parameter = {layer.parameter_name: name for name, layer in self._layers.items()}
        for parameter_name, state in masks:
            name = by_parameter.get(parameter_name)
            if name is None:
                raise MisconfigurationException(
                    f"the checkpoint has a mask for {parameter_name}, which is no target in this model: resume with "
                    "the model, targets and ignore that it was trained with"
                )
            mask, layer = LayerMask.from_state(state), self._layers[name]
            if mask.keep.shape != (layer.rows, layer.cols):
                raise MisconfigurationException(
                    f"the checkpoint's mask for {parameter_name} has shape {tuple(mask.keep.shape)}, the layer has "
                    f"{(layer.rows, layer.cols)}: resume with the model that it was trained with"
                )
            self._applied[name] = mask.pattern
            self._require_enforcer().set_mask(name, mask.keep)

    def _steps_without_state(self, trainer: Trainer) -> int:
        """The optimizer steps behind a checkpoint that has no state of this callback."""
        if len(trainer.optimizers) > 1:
            raise MisconfigurationException(
                "the checkpoint has no pruning state, and with several optimizers its steps can't be counted: load its "
                "weights, and fit without ckpt_path"
            )
        return trainer.global_step

    # Plan

    @property
    def _needs_survey(self) -> bool:
        return isinstance(self.allocation, Allocation) or self.progression == "least-loss-first"

    @property
    def _allocation(self) -> Allocation | None:
        """What is asked for, or the default, None where all layers are alike."""
        if self.allocation is None and isinstance(self.pattern, Unstructured) and self._weights_outputs:
            default = Allocation("loss")
            lowest, _ = default.limits(self.pattern.sparsity)
            begins_below = self.schedule.initial < lowest or not self.schedule.initial
            return (
                default
                if begins_below and self.pattern.sparsity < MOST_SURVEYED and not self._lacks_gradients
                else None
            )
        return self.allocation if isinstance(self.allocation, Allocation) else None

    @property
    def _weights_outputs(self) -> bool:
        wanted = self.output_weights or ("gradients" if self.options.method == "thanos" else "uniform")
        return wanted == "gradients"

    def _check_allocation(self, allocation: Allocation) -> None:
        if isinstance(self.pattern, NM) and not self.pattern.outlier_fraction:
            raise ValueError(
                f"{self.pattern.name} in all rows of all layers leaves nothing to allocate: give the outlier_fraction "
                "of the rows of all layers together that are to stay dense"
            )
        lowest, highest = allocation.limits(self.pattern.sparsity)
        if self.schedule.initial >= lowest and self.schedule.initial > 0:
            raise ValueError(
                f"the schedule starts at sparsity {self.schedule.initial}, but the allocation may give a layer as "
                f"little as {lowest}: give a smaller initial, or a larger lowest"
            )
        if not lowest <= self.pattern.sparsity <= highest:
            closest = lowest if self.pattern.sparsity < lowest else highest
            raise ValueError(
                f"a sparsity of {self.pattern.sparsity} can't be met where each layer's is between {lowest} and "
                f"{highest}: the closest is {closest}. Widen the allocation's limits, or ask for that"
            )

    def _check_initial(self) -> None:
        for name, pattern in self._final_patterns.items():
            if self.schedule.initial >= pattern.sparsity:
                raise ValueError(
                    f"the schedule starts at sparsity {self.schedule.initial}, not below the final {pattern.sparsity} "
                    f"of layer {name}: give a smaller initial"
                )

    def _plan(self, trainer: Trainer) -> list[Window]:
        """All windows, as far as they are known: those behind a survey follow when it is complete."""
        events = self._events(trainer)
        if not self._needs_survey and self._allocation is None:
            return self._plan_pruning(events, self._final_patterns)
        first = events[0].step
        needed = len(split_by_memory(list(self._layers.values()), self.hessian_memory_gib))
        step = first - min(first // 2, needed * self.calibration_steps) if self._collects_in_training else first
        in_turns = self.progression in ("front-to-back", "back-to-front", "least-loss-first")
        has_room = step >= needed and first - step >= (1 if in_turns else needed)
        if self._collects_in_training and not has_room:
            if not self._needs_survey or trainer.fast_dev_run:  # type: ignore[attr-defined]
                rank_zero_info(
                    f"{first} optimizer step(s) are too few to look at the layers before the first event: all are "
                    "pruned alike"
                )
                return self._plan_pruning(events, self._final_patterns)
            raise MisconfigurationException(
                f"the first event is at optimizer step {first}, which leaves too few to look at the layers before, in "
                f"{needed} window(s): start the schedule later (start_step), give a calibration_dataloader, or leave "
                "out allocation and least-loss-first"
            )
        survey = plan_windows(
            [(Event(step, 0.0), self._final_patterns)],
            self._layers,
            calibration_steps=self.calibration_steps if self._collects_in_training else 0,
            budget_gib=self.hessian_memory_gib,
            surveys=True,
        )
        if not self._needs_survey and not self._surveys_from(survey[0].start_step):
            rank_zero_info("the training goes on too late to look at the layers before the first event: all are alike")
            return self._plan_pruning(events, self._final_patterns)
        if len(self._surveys) < len(self._layers):
            self._plan_pruning(events, self._final_patterns, since=step)  # refuses what can't be before the training
            return survey
        final = self._final_patterns
        if self._allocation is not None:
            shared = [name for name, its in final.items() if its == self.pattern]
            unknown = [name for name in shared if self._surveys[name].weighted_losses is None]
            if not unknown or self.allocation is not None:
                final = allocate(self._allocation, self._surveys, self._layers, final, self.pattern)
            else:
                rank_zero_warn(
                    f"it is not known what {len(unknown)} layer(s), such as {unknown[0]}, would lose, since no "
                    "gradient has reached their outputs: all layers are pruned alike. allocation='uniform' is without "
                    "this warning"
                )
        return [*survey, *self._plan_pruning(events, final, since=step)]

    def _surveys_from(self, step: int) -> bool:
        """Whether layers are, or were, looked at in windows that start there; a training may go on behind it."""
        restored = self._restored
        if restored is not None and (restored["windows_done"] or restored["collected"] is not None):
            return bool(restored["windows"][0][-1] == "surveys")
        return bool(self._surveys) or step >= self._optimizer_steps

    def _plan_pruning(self, events: list[Event], final: dict[str, Pattern], since: int = 0) -> list[Window]:
        sizes = {name: layer.rows * layer.cols for name, layer in self._layers.items()}
        losses = {
            name: min(survey.losses.items(), key=lambda item: abs(item[0] - final[name].sparsity))[1]
            for name, survey in self._surveys.items()
            if name in final
        }
        # before the layers were looked at, any order does to see that all events fit
        progression = self.progression if self._surveys else _ORDERED.get(self.progression, self.progression)
        order = turns(progression, final, losses)
        windows = plan_windows(
            changes(events, final, self.progression, sizes, order),
            self._layers,
            calibration_steps=self.calibration_steps if self._collects_in_training else 0,
            budget_gib=self.hessian_memory_gib if self.options.needs_statistics else None,
            since=since,
        )
        steps = [window.end_step - window.start_step for window in windows]
        if self._collects_in_training and min(steps, default=0) < self.calibration_steps:
            rank_zero_info(
                f"calibration_steps is {self.calibration_steps}, but some windows have only {min(steps)} optimizer "
                "step(s) since the event before"
            )
        return windows

    @property
    def _collects_in_training(self) -> bool:
        return self.options.needs_statistics and self.calibration_dataloader is None

    def _events(self, trainer: Trainer) -> list[Event]:
        total = trainer.estimated_stepping_batches
        known = math.isfinite(total) and total > 0
        schedule = self.schedule
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            rank_zero_info(f"fast_dev_run: everything is pruned at once, at optimizer step {int(total)}")
            schedule = SparsitySchedule(int(total), int(total), 1)
        if schedule.has_fractions:
            if not known:
                raise MisconfigurationException(
                    "the schedule has fractions of the training, but the number of optimizer steps is not known: set "
                    "the Trainer's max_steps, or give the schedule in optimizer steps (whole numbers)"
                )
            if not trainer.lightning_module.automatic_optimization:
                raise MisconfigurationException(
                    "the schedule has fractions of the training, but under manual optimization the number of optimizer "
                    "steps is not known: give the schedule in optimizer steps (whole numbers)"
                )
            schedule = schedule.resolve(int(total))
        events = schedule.events()
        if not known:
            return events
        inside = [event for event in events if event.step <= total]
        if not inside:
            raise MisconfigurationException(
                f"the schedule's first event is at optimizer step {events[0].step}, but the training has {int(total)} "
                "steps: nothing would be pruned. Start the schedule earlier (start_step) or raise max_steps"
            )
        if inside[-1].step >= total and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"the schedule's last event is at optimizer step {inside[-1].step}, the last of the training: no step "
                "is left in which the model could recover. End the schedule earlier (end_step) or raise max_steps"
            )
        if len(inside) < len(events):
            rank_zero_warn(
                f"the schedule's last event is at optimizer step {events[-1].step}, but the training has {int(total)} "
                "steps: the final sparsity will not be reached"
            )
        return events

    def _counting_optimizer(self, access: ParameterAccess) -> Optimizer:
        """The optimizer whose steps are the steps of the schedule: the first one that updates a target."""
        for optimizer in access.optimizers:
            if access.stepped_by(optimizer, self._layers):
                return optimizer
        return access.optimizers[0]

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
                if not window.surveys and self.monitor is not None and not self.report.events:
                    self.report.summary.dense = self._measure(trainer)
                with self._clock.event():
                    (self._survey if window.surveys else self._prune)(window, trainer, pl_module)
                self._windows_done += 1
                if self._windows_done == len(self._windows):
                    forget_best(trainer)
                    release_stopping(trainer, self._held_back)
            else:
                if self._statistics is None and window.end_step > window.start_step <= self._optimizer_steps:
                    self._collect(window)
                return
        if self.monitor is not None and self.report.summary.pruned is None and self.report.events:
            self.report.summary.pruned = self._measure(trainer)

    def _collect(self, window: Window) -> None:
        self._statistics = self._new_statistics(window)
        self._statistics.start()
        if self._wants_gradients(window):
            self._gradients = OutputGradients(self._statistics.layers)
            self._gradients.start()

    def _wants_gradients(self, window: Window) -> bool:
        """Whether outputs of a layer, or layers, are to be held against each other by the loss's gradients."""
        compete = (self._allocation is not None and window.surveys) or any(
            not isinstance(pattern, NM) or pattern.outlier_fraction for pattern in window.patterns.values()
        )
        return self._weights_outputs and bool(compete)

    def _new_statistics(self, window: Window) -> InputStatistics:
        several = self._require_access().world_size > 1
        return InputStatistics({name: self._layers[name] for name in window.patterns}, keeps_errors=several)

    def _survey(self, window: Window, trainer: Trainer, pl_module: LightningModule) -> None:
        accumulators = self._accumulators(window, trainer, pl_module)
        assert accumulators is not None, "refused where a method has no statistics"
        self._surveys |= survey_window(
            window,
            self._layers,
            accumulators,
            access=self._require_access(),
            options=self.options,
            several_levels=self._allocation is not None,
            output_weights=self._take_output_weights(window),
        )
        if window.is_last:
            self._windows = self._plan(trainer)
        following = self._windows[self._windows_done + 1 :]
        if following and following[0].end_step > self._optimizer_steps:
            self._calibrated = None

    def _prune(self, window: Window, trainer: Trainer, pl_module: LightningModule) -> None:
        access, enforcer = self._require_access(), self._require_enforcer()
        if not self._applied and (tell := getattr(pl_module, "on_before_pruning", None)) is not None:
            tell()
        accumulators = self._accumulators(window, trainer, pl_module)
        owners = assign_owners({name: self._layers[name] for name in window.patterns}, access.world_size)
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with event_progress(
            window.event.step, sum(owner == access.rank for owner in owners.values()), enabled=shown
        ) as on_solved:
            layers = prune_window(
                window,
                self._layers,
                accumulators,
                access=access,
                enforcer=enforcer,
                options=self.options,
                output_weights=self._take_output_weights(window),
                on_solved=on_solved,
            )
        self._applied.update(window.patterns)
        self._measured = None  # of the weights before
        restart_averages(trainer, pl_module)
        if self.moments == "clear":
            enforcer.clear_directions(window.patterns)
        if not self.report.events or self.report.events[-1].step != window.event.step:
            self.report.events.append(EventReport(window.event.step, window.event.sparsity(self.pattern.sparsity)))
        event = self.report.events[-1]
        event.layers.extend(layers)
        if window.is_last:
            self._finish_event(event, trainer)

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

    def _accumulators(
        self, window: Window, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, HessianAccumulator] | None:
        if not self.options.needs_statistics:
            return None
        if self.calibration_dataloader is not None:
            return self._run_calibration(window, trainer, pl_module)
        statistics, self._statistics = self._statistics, None
        if statistics is None:
            raise PruningError(
                f"the event at optimizer step {window.event.step} is due, but its statistics were not collected: "
                "several events fell into one batch. Space the events further apart (every_n_steps)"
            )
        statistics.stop()
        self.report.summary.collecting_seconds += statistics.seconds
        statistics.raise_kept(self._require_access())
        return statistics.accumulators

    def _take_output_weights(self, window: Window) -> dict[str, torch.Tensor]:
        """What the window's gradients say; empty where none are wanted."""
        gradients, self._gradients = self._gradients, None
        if gradients is None:
            return {}
        gradients.stop()
        steps = max(1, window.end_step - window.start_step)  # windows of one survey are held against each other
        found = {name: one / steps for name, one in output_weights(gradients.total(self._require_access())).items()}
        if missing := [name for name in window.patterns if name not in found]:
            rank_zero_warn(
                f"no gradient has reached the outputs of {len(missing)} layer(s), such as {missing[0]}: their outputs "
                "count alike. (None does where a layer and all that its input comes from is frozen, or where the "
                "module returns no loss for a calibration batch: give the batches labels, or let calibration_step "
                "return the loss. output_weights='uniform' is without this warning)"
            )
        return found

    def _check_zero_stage_3(self, strategy: DeepSpeedStrategy) -> None:
        # after a backward that ends at the outputs, DeepSpeed would keep the weights gathered while they are solved
        self._lacks_gradients = strategy.zero_stage_3 and self.calibration_dataloader is not None
        if self._lacks_gradients and self.output_weights == "gradients":
            raise MisconfigurationException(
                "output_weights is 'gradients', but under ZeRO-3 there are none on a calibration_dataloader: leave the "
                "dataloader out to have those of the training batches, or take output_weights='uniform'"
            )

    def _run_calibration(
        self, window: Window, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, HessianAccumulator]:
        access = self._require_access()
        if self._calibrated is not None:  # for the survey, at this very step
            statistics, self._gradients = self._calibrated
            self._calibrated = None
            return {name: one for name, one in statistics.accumulators.items() if name in window.patterns}
        statistics = self._new_statistics(window)
        backward = None
        if self._lacks_gradients:
            if self._wants_gradients(window) and not self._applied:
                rank_zero_warn(
                    "under ZeRO-3 there are no gradients on a calibration_dataloader: errors at all outputs count "
                    "alike, and unstructured layers are pruned alike unless an allocation is given. Leave it out to "
                    "have those of the training batches"
                )
        elif self._wants_gradients(window):
            gradients = self._gradients = OutputGradients(statistics.layers)
            gradients.start(of_training=False)

            def backward(output: Any, counts: bool) -> None:
                loss = loss_of(output)
                if loss is not None:
                    gradients.backward(loss, counts=counts)
                elif self.output_weights is not None:
                    raise MisconfigurationException(
                        "output_weights is 'gradients', but for a calibration batch the module returns no loss "
                        f"({type(output).__name__}): give the batches labels, or let calibration_step return the loss"
                    )

        try:
            counted = count_dataloader(
                statistics,
                self._calibration_batches(trainer, pl_module),
                trainer,
                pl_module,
                access,
                attention_mask_key=self.attention_mask_key,
                backward=backward,
            )
        finally:
            if self._gradients is not None:
                self._gradients.stop()
        if not sum(access.gather(counted)):
            raise PruningError("calibration_dataloader gave no batch: give one that isn't empty")
        statistics.raise_kept(access)
        if window.surveys and self.hessian_memory_gib is None:
            self._calibrated = (statistics, self._gradients)
        return statistics.accumulators

    def _calibration_batches(self, trainer: Trainer, pl_module: LightningModule) -> Iterable[Any]:
        if not isinstance(self.calibration_dataloader, str):
            assert self.calibration_dataloader is not None
            return self.calibration_dataloader
        for holder in (getattr(trainer, "datamodule", None), pl_module):
            if (make := getattr(holder, "calibration_dataloader", None)) is not None:
                batches: Iterable[Any] = make()
                return batches
        raise MisconfigurationException(
            "calibration_dataloader is 'datamodule', but neither the datamodule nor the LightningModule has a method "
            "calibration_dataloader(): add one, pass a dataloader, or None to use the training batches"
        )

    def _counted(self, batch: Any) -> torch.Tensor | None:
        if self.attention_mask_key is None:
            return None
        counted = token_mask(batch, self.attention_mask_key)
        if counted is None and not self._warned_of_no_mask:
            self._warned_of_no_mask = True
            rank_zero_warn(
                f"the batches have no {self.attention_mask_key!r}, so every token counts, padding too. Name the mask "
                "in attention_mask_key, or set it to None to say that there is no padding"
            )
        return counted

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

    def _write_report(self, trainer: Trainer) -> None:
        path = Path(trainer.default_root_dir) / "pruning_report.json"
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

    def _rewarmed(self) -> float:
        """What the learning rates of the next step are multiplied by."""
        if not self.report.events:
            return 1.0
        since = self._optimizer_steps - self.report.events[-1].step
        return min(1.0, (since + 1) / (self.rewarm_steps + 1))

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._statistics is not None:
            self._statistics.stop()  # but kept: a checkpoint may be saved after the fit
        if self._gradients is not None:
            self._gradients.stop()
