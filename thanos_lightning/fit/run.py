"""The state of one fit: the plan, the open window with its statistics, and the masks in force."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from thanos_lightning.collect.collector import Collector, Moments, loss_scale
from thanos_lightning.enforcement import MaskEnforcer
from thanos_lightning.event.targets import Targets
from thanos_lightning.event.window import prune_window, scan_window
from thanos_lightning.fit.announce import announce, estimate_of
from thanos_lightning.fit.lightning_private import end_on_sigterm, has_sigterm, logged_step
from thanos_lightning.fit.memory import fitting, free_bytes
from thanos_lightning.fit.other_callbacks import (
    BestScores,
    hold_back_stopping,
    release_stopping,
    restart_averages,
    validate_quietly,
)
from thanos_lightning.fit.past import Past
from thanos_lightning.layers.blocks import find_blocks
from thanos_lightning.layers.experts import find_mixtures, keep_experts
from thanos_lightning.layers.lora import with_adapters
from thanos_lightning.layers.targets import Layer
from thanos_lightning.plan.options import PruningOptions, differences
from thanos_lightning.plan.planner import Planner
from thanos_lightning.plan.schedule import check_alike, scheduled_events, steps_of
from thanos_lightning.plan.windows import Window, check_ahead, check_begun
from thanos_lightning.ranks.access import ParameterAccess, tensors_of
from thanos_lightning.ranks.choice import choose_access
from thanos_lightning.ranks.owners import assign_owners
from thanos_lightning.report.data import Clock, EventReport, LossRecorder
from thanos_lightning.report.progress import Phase, ends_on_sigterm, hidden, shown
from thanos_lightning.report.tables import print_event, print_summary
from thanos_lightning.solver import Channels, Experts


class PruningRun:
    """One fit of a Trainer, made once its model and optimizers are set up.

    The run keeps `past`, the progress of the training, up to date. `layers` has all layers to solve, and `final` the
    pattern that each ends with unless an allocation changes it. `masked` has all that may get a mask: the layers, and
    the weights and biases that are pruned with them. Windows after a sensitivity scan join the plan, `windows`, when
    the scan is complete.

    Raises:
        MisconfigurationException: On all ranks, if the options do not suit the model or the Trainer.
        PruningError: On all ranks, if weights can't be pruned.
    """

    def __init__(
        self, options: PruningOptions, past: Past, targets: Targets, trainer: Trainer, module: LightningModule
    ) -> None:
        self._asked, self.past = options, past
        self.layers, self.final, self.targets = targets.layers, targets.final, targets
        self.masked = targets.masked
        self.trainer, self.module = trainer, module
        self.access = self._choose_access()
        check_alike(self.access.gather(steps_of(trainer)))
        if targets.coupled or targets.reordered or targets.keeps_order:
            self.access.release()  # what the search for feed-forward blocks left
        self.enforcer = MaskEnforcer(self.masked, self.access)
        self.enforcer.begin()
        self.blocks = targets.trainable(find_blocks(module, self.layers)) if options.block_steps else {}
        if (steps := options.calibration.block_steps) and not self.blocks:
            rank_zero_warn(
                f"calibration.block_steps is {steps}, but no block (an entry of an nn.ModuleList, such as a decoder "
                "layer) has two layers to prune and keeps its experts: leave it out"
            )
        self._take(options)
        if self.planner.schedule.has_fractions and past.total_steps is None:
            past.total_steps = steps_of(trainer)
        self.windows: list[Window] = []
        self._steps_seen = 0  # optimizer steps at the end of the last batch
        self._scores = BestScores(past.old_scores)
        self._held_back: list[EarlyStopping] = []
        self._hooks = ExitStack()
        self._clock = Clock()
        self._recorder = LossRecorder(past.report.history)
        self._sparsity: torch.Tensor | None = None  # the value to log
        self.is_in_event = False  # True: a checkpoint would mix states from before and after the event

    def _take(self, options: PruningOptions) -> None:
        self.options, schedule = options, options.schedule
        if self.past.total_steps is not None and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            schedule = schedule.resolve(self.past.total_steps)  # as in the fit before
        self.planner = Planner(options, schedule, self.access.can_differentiate)
        self.collector = Collector(self.layers, self.access, options.calibration, self.blocks, options.block_steps)

    def _choose_access(self) -> ParameterAccess:
        """The access to all that may be pruned and, if the strategy gives it, to what is only reordered."""
        ordered = {part.name: part for parts in self.targets.reordered.values() for part in parts}
        try:
            return choose_access(self.trainer.strategy, with_adapters({**ordered, **self.masked}))
        except MisconfigurationException as error:
            if not ordered:
                raise
            self.targets = replace(self.targets, reordered={}, keeps_order=str(error).partition(": ")[0])
            return choose_access(self.trainer.strategy, with_adapters(self.masked))

    # The beginning

    def begin(self, restored: Mapping[str, Any] | None) -> None:
        """Restore the earlier state, and prune what is due before the first batch. All ranks must call it.

        `restored` is the state of a checkpoint, or of the same Trainer's previous fit; None for a fresh training.
        """
        past, trainer = self.past, self.trainer
        changed: dict[str, str] = {}
        if restored is not None:
            changed = differences(restored["arguments"], past.arguments(self._asked))
            past.patterns.update(self.enforcer.restore(restored["masks"], restored["pruned"], changed))
        else:
            self._begin_anew()
        self._route()
        self._steps_seen = past.optimizer_steps
        self._plan_within_memory(restored)
        begun = past.windows_done
        if restored is not None:
            begun += restored["collected"] is not None
            check_begun(self.windows[:begun], restored["windows"][:begun], changed)
        check_ahead(self.windows[begun:], past.optimizer_steps)
        self._check_monitor()
        self._hook_optimizers()
        if restored is not None and restored["collected"] is not None:
            # The window in whose midst the checkpoint was saved
            self.collector.open(self.windows[past.windows_done], self.module)
            self.collector.load(restored["collected"])
        if changed:
            rank_zero_warn(
                f"these arguments differ from the checkpoint's and apply from now on: {'; '.join(changed.values())}"
            )
        if past.windows_done < len(self.windows):
            self._held_back = hold_back_stopping(trainer)
        past.report.summary.recovered = None  # of an earlier end, from which this training goes on
        self._clock = Clock(past.report.summary, self.module.device)
        if restored is not None:
            self._clock.parts = dict(restored["event_parts"])
        if restored is None and self.windows and self.windows[0].end_step > past.optimizer_steps:
            gradients = any(window.gradients for window in self.windows)
            self.collector.try_batch(trainer, self.module, gradients=gradients)
        if restored is None and trainer.is_global_zero and self.report_path.exists():
            rank_zero_info(f"{self.report_path} is of an earlier training, and will be replaced")
        announce(self)
        self._advance()
        if trainer.received_sigterm:
            raise SIGTERMException  # Lightning would train a batch first

    def _begin_anew(self) -> None:
        """Hold the zeros that the model has, and count the steps of a checkpoint without a state of the callback."""
        if lacking := [name for name, mixture in find_mixtures(self.module).items() if mixture.lacks_experts]:
            raise MisconfigurationException(
                f"another training has dropped experts of {lacking[0]}, and this training does not know which: go on "
                "with the callback and Trainer of the other one, or its checkpoint (ckpt_path), or train its export"
            )
        self._hold_zeros()
        if self.trainer.global_step > 0:
            self.past.optimizer_steps = _steps_without_state(self.trainer)

    def _check_monitor(self) -> None:
        if (monitor := self.options.monitor) is None:
            return
        self.past.report.summary.metric = monitor
        if not self.trainer.enable_validation:
            raise MisconfigurationException(
                f"monitor is {monitor!r}, but the Trainer has no validation: give a validation dataloader, or "
                "monitor=None"
            )

    def _hook_optimizers(self) -> None:
        """Enforce masks after each step. The steps of the first optimizer that updates a target are the schedule's."""
        optimizers = self.access.optimizers
        stepped = {id(self.access.stepped(layer)) for layer in self.layers.values()}
        updates = (optimizer for optimizer in optimizers if any(id(it) in stepped for it in tensors_of(optimizer)))
        counting = next(updates, optimizers[0])
        for optimizer in optimizers:
            hook = optimizer.register_step_post_hook(partial(self._after_step, counts=optimizer is counting))
            self._hooks.enter_context(hook)

    def _route(self) -> None:
        """Let the routers choose among the experts that are left."""
        for name, mixture in self.targets.mixtures.items():
            experts = range(mixture.size)
            keep_experts(mixture, [one for one in experts if not self.enforcer.is_gone(f"{name}.{one}.down_proj")])

    def _hold_zeros(self) -> None:
        held = self.enforcer.hold_zeros()
        for name in self.targets.coupled:
            keep = self.enforcer.keep_mask(name)
            self.targets.check_zeros(name, 0 if keep is None else int((~keep).all(0).count_nonzero()))
        self.targets = self.targets.without_order(held.keys())
        self.past.patterns.update(held)
        if held:
            first, pattern = next(iter(held.items()))
            rank_zero_warn(
                f"{len(held)} target(s) are pruned already, such as {first} with {pattern.sparsity:.1%} zeros. Their "
                'zeros are kept and count towards the target. "dense" in the report means this already pruned model. '
                "To let a layer's zeros be trained, add the layer to ignore"
            )

    # The plan

    def _plan_within_memory(self, restored: Mapping[str, Any] | None) -> None:
        """Plan windows that fit the memory that is free, or those of the training that is resumed."""
        options, calibration, past = self.options, self.options.calibration, self.past
        device = self.module.device
        # Before the first step there are no gradients and moments yet
        steps = any(event.step for event in scheduled_events(self.planner.schedule, self.trainer))
        optimizers = self.access.optimizers if steps else []
        everywhere = self.access.gather(free_bytes(device, self.trainer.num_devices, optimizers))
        if restored is not None:
            if calibration.memory_gib is None and past.memory_gib is not None:
                self._take(replace(options, calibration=replace(calibration, memory_gib=past.memory_gib)))
            self.windows = self._plan(restored)
            return

        def event_bytes(options: PruningOptions) -> Counter[str]:
            self._take(options)
            self.windows = self._plan()
            estimated = estimate_of(self, device)
            needed = Counter(cpu=max(one.waiting for one in estimated.windows) + estimated.states)
            needed[device.type] += max(one.event for one in estimated.windows)
            return needed

        free = {kind: min(one[kind] for one in everywhere) for kind in everywhere[0]}
        fitting(options, list(self.layers.values()), free, event_bytes)
        past.memory_gib = self.options.calibration.memory_gib

    def _plan(self, restored: Mapping[str, Any] | None = None) -> list[Window]:
        begun_with_scan = None
        if restored is not None and (restored["windows_done"] or restored["collected"] is not None):
            begun_with_scan = bool(restored["windows"][0][-1] == "scans")
        return self.planner.plan(
            self.trainer,
            self.layers,
            self.final,
            self.past.sensitivities,
            optimizer_steps=self.past.optimizer_steps,
            begun_with_scan=begun_with_scan,
        )

    # Batches

    def begin_batch(self, batch: Any, number: int) -> None:
        """Count the forwards of the training batch that begins, the epoch's batch `number`."""
        self._scores.renewed(self.trainer, "step")
        self.collector.begin(batch, number, partial(loss_scale, self.trainer))

    def _is_saved_at_the_end(self) -> bool:
        """Whether a checkpoint of this step may be the last one, which has to hold the final metric."""
        trainer = self.trainer
        is_last = 0 <= trainer.max_steps <= trainer.global_step
        has_metric = self.options.monitor is not None and bool(self.past.report.events)
        return is_last and has_metric and bool(trainer.checkpoint_callbacks)

    def end_batch(self, outputs: Any) -> None:
        """Prune what is due at the end of a training batch."""
        self.collector.end()
        self._clock.tick()
        self._is_ending()
        before, now = self._steps_seen, self.past.optimizer_steps
        if now != before:
            self._steps_seen = now
            self._recorder.add(now, outputs)
            every = self.options.verify_every_n_steps
            # a batch may take several optimizer steps; the first steps after an event show whether an optimizer keeps
            # zeros
            if every and (now // every > before // every or self.enforcer.has_new_masks):
                self.enforcer.verify()
            self._advance()
            if self._is_saved_at_the_end():
                self.past.report.summary.recovered = self._measure()
        if self._sparsity is None:  # a tensor on the device saves a copy per batch
            self._sparsity = torch.tensor(self.enforcer.sparsity(), device=self.module.device)
        self.module.log("sparsity/total", self._sparsity)

    def begin_validation(self) -> None:
        """Pause the clock, since validation is no training time."""
        self._clock.pause()

    def end_validation(self, value: float | None) -> None:
        """Record the monitored metric after a validation; None if no metric is monitored."""
        self._clock.go_on()
        self._is_ending()
        if value is not None:
            self.past.measured = (self.past.optimizer_steps, value)
            self.past.report.history.metrics.append(self.past.measured)
            self._recorder.settle()
        if not self.trainer.sanity_checking:
            self._scores.renewed(self.trainer, "validation")

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any, *, counts: bool) -> None:
        if counts and self.access.completes_step(optimizer):
            self.past.optimizer_steps += 1
        self.enforcer.enforce(optimizer)

    def _is_ending(self) -> bool:
        """Whether Lightning ends the training at this batch, because SIGTERM has come to a rank. Talks to all ranks."""
        if self.access.total(torch.tensor(float(has_sigterm(self.trainer)))).item():
            end_on_sigterm(self.trainer)
        return self.trainer.received_sigterm

    # Windows

    def _advance(self) -> None:
        """Prune or scan the windows that end at this step, and open the window that begins at it.

        If SIGTERM ends the training, windows that have not begun are left to the training that goes on from it.
        """
        past = self.past
        while past.windows_done < len(self.windows):
            window = self.windows[past.windows_done]
            if past.optimizer_steps < window.end_step:
                is_open = self.collector.statistics is not None
                if not is_open and window.end_step > window.start_step <= past.optimizer_steps:
                    self.collector.open(window, self.module)
                return
            # A first event right after its scan is measured before both, while a checkpoint can still hold the sums
            is_first = not past.report.events and (not window.scans or self.options.calibration.memory_gib is None)
            if is_first and self.options.monitor is not None and not self._is_ending():
                past.report.summary.dense = self._measure()
            if not self._work_on_windows(scans=window.scans):
                return
            if past.windows_done == len(self.windows):
                self._scores.pruned(self.trainer)
                release_stopping(self.trainer, self._held_back)
        if self.options.monitor is not None and past.report.summary.pruned is None and past.report.events:
            past.report.summary.pruned = self._measure()

    def _work_on_windows(self, *, scans: bool) -> bool:
        """Scan or prune at the end of all windows that end at this step. False if SIGTERM has come before one."""
        past = self.past
        due = [window for window in self.windows[past.windows_done :] if window.end_step <= past.optimizer_steps]
        due = [window for window in due if window.scans == scans]
        is_off = self.trainer.progress_bar_callback is None  # the user turned progress bars off
        phase = Phase(f"{'Scanning' if scans else 'Pruning'} at step {due[0].event.step}", len(due), "windows")
        with hidden(is_off), shown(phase) if len(due) > 1 else nullcontext():
            for window in due:
                if not self._work(window):
                    return False
                past.windows_done += 1
                self.is_in_event = False
                phase.advance()
        return True

    def _work(self, window: Window) -> bool:
        """Scan or prune at the end of a window. False if SIGTERM has come before."""
        with self._clock.event(), ends_on_sigterm():
            if self._is_ending():  # a SIGTERM that comes later ends the event at once
                return False
            self.is_in_event = True
            if window.scans:
                self._scan(window)
            else:
                self._prune(window)
        if window.scans:
            return True
        event = self.past.report.events[-1]
        event.add(self._clock.take())
        if window.is_last:
            self._finish(event)
        return True

    def _moments(self, window: Window) -> Moments:
        if self.options.solver.needs_statistics:
            self._clock.now("calibrating")
            moments = self.collector.take(window, self.trainer, self.module)
            self._clock.add("calibrating", moments.seconds)
            self.past.report.summary.collecting_seconds += moments.seconds
        else:
            moments = Moments(assign_owners(self._layers_of(window), self.access.world_size))
        # A calibration set or a validation may leave whole copies of weights, whose memory the solves need
        self.access.release()
        return moments

    def _layers_of(self, window: Window) -> dict[str, Layer]:
        return {name: self.layers[name] for name in window.patterns}

    def _scan(self, window: Window) -> None:
        moments = self._moments(window)
        self._clock.now("scanning")
        self.past.sensitivities |= scan_window(
            window,
            self._layers_of(window),
            moments,
            self.access,
            self.options.solver,
            self.planner.to_try(window.patterns),
        )
        if window.is_last:
            self.windows = self._plan()
        following = self.windows[self.past.windows_done + 1 :]
        if following and following[0].end_step > self.past.optimizer_steps:
            self.collector.forget_scan()

    def _prune(self, window: Window) -> None:
        report = self.past.report
        moments = self._moments(window)
        self._clock.now("solving")
        targets = self.targets
        if self.past.optimizer_steps:  # optimizers' moments have the old order
            targets = replace(targets, reordered={})
        layers, blocks = prune_window(
            window,
            targets,
            moments,
            self.enforcer,
            self.options.solver,
            later={name for other in self.windows[self.past.windows_done + 1 :] for name in other.patterns},
            blocks=self.blocks,
            now=self._clock.now,
        )
        pruned = {layer.name for layer in layers}
        for name, pattern in window.patterns.items():
            coupled = self.targets.coupled.get(name, ())
            if isinstance(pattern, Experts):
                if self.enforcer.is_gone(name):
                    self.past.patterns |= dict.fromkeys((name, *(one.name for one in coupled)), pattern)
            elif name in pruned:
                self.past.patterns[name] = pattern
                if isinstance(pattern, Channels):
                    self.past.patterns |= {one.name: replace(pattern, dim=0) for one in coupled}
        self._route()
        self._sparsity = None
        self.past.measured = None  # the metric of the weights before this event is stale
        restart_averages(self.trainer, self.module)
        if not report.events or report.events[-1].step != window.event.step:
            report.events.append(EventReport(window.event.step, window.event.sparsity(self.options.pattern.sparsity)))
        report.events[-1].layers.extend(layers)
        report.events[-1].blocks.extend(blocks)

    def _finish(self, event: EventReport) -> None:
        self.past.report.summary.sparsity = self.enforcer.sparsity()
        metrics = {
            "pruning/step": float(event.step),
            "pruning/relative_loss": event.relative_loss,
            "pruning/seconds": event.seconds,
            "sparsity/target": event.target,
            "sparsity/total": self.past.report.summary.sparsity,
        }
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=logged_step(self.trainer))
        if self.trainer.is_global_zero:
            print_event(event)
            self._write_report()

    def _measure(self) -> float:
        """The monitored metric of the current weights, from the Trainer's own validation loop."""
        steps = self.past.optimizer_steps
        if self.past.measured is None or self.past.measured[0] != steps:
            validate_quietly(self.trainer)
        if self.past.measured is None or self.past.measured[0] != steps:
            raise MisconfigurationException(
                f"monitor is {self.options.monitor!r}, but validation ran without a batch: give a validation "
                "dataloader that isn't empty, or monitor=None"
            )
        return self.past.measured[1]

    # The end

    def end(self) -> None:
        """Count the zeros at the end of the training, warn of events that were missed, and write the report."""
        report, trainer = self.past.report, self.trainer
        self.enforcer.verify()
        if self.options.monitor is not None and report.events:
            report.summary.recovered = self._measure()
        missed = [window for window in self.windows[self.past.windows_done :] if window.is_last]
        if missed:
            events = [window for window in missed if not window.scans]
            which = (
                f"{len(events)} pruning event(s), the last one at step {events[-1].end_step}"
                if events
                else "all events"
            )
            rank_zero_warn(
                f"training ended after {self.past.optimizer_steps} optimizer steps, before {which}: the final sparsity "
                "was not reached. (Steps that a gradient scaler skips, and those of other optimizers, do not count)"
            )
        elif self.windows:
            last = self.windows[-1].end_step
            self._scores.warn_of_none(trainer, last)
            # If the Trainer planned to end here, planning has warned already, or this is a fast_dev_run
            if self.past.optimizer_steps == last and trainer.estimated_stepping_batches != last:
                rank_zero_warn(
                    f"the training ended with its last event, at optimizer step {last}: no step was left in which the "
                    "model could recover. Train for longer, or end the schedule earlier (end_step)"
                )
        report.summary.sparsity = self.enforcer.sparsity()
        self._clock.tick()
        if trainer.is_global_zero:
            self._write_report()
            print_summary(report)

    def stop(self) -> None:
        """Remove all hooks, and give EarlyStopping back to the Trainer. The masks stay for a checkpoint."""
        release_stopping(self.trainer, self._held_back)
        self._hooks.close()
        self.enforcer.end()
        self.collector.stop()

    @property
    def report_path(self) -> Path:
        """Path of the report."""
        return Path(self.trainer.default_root_dir) / "pruning_report.json"

    def _write_report(self) -> None:
        self._recorder.settle()
        try:
            self.past.report.write(self.report_path)
        except OSError as error:  # one rank's full disk must not end a training of days
            rank_zero_warn(f"the report could not be written to {self.report_path} ({error})")

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """The state as plain values. All ranks must call it while a window is open or if masks are sharded.

        All ranks return the same, except for the report's times and losses, and in two cases. For an open window, rank
        0, which writes the checkpoint, has the sums of all ranks, and every other rank has its own. If each rank writes
        a file (ZeRO-3), each rank has its own sums and its share of the masks: each mask is in one of the files.
        """
        self._recorder.settle()
        return self.past.state(
            self._asked,
            windows=[window.state() for window in self.windows],
            masks=self.enforcer.state(self.past.patterns),
            pruned={self.masked[name].parameter_name: n for name, n in self.enforcer.num_pruned.items()},
            collected=self.collector.state(),
            event_parts=dict(self._clock.parts),
            # The files of all ranks share this id, which shows that they are of one save
            save=self.access.gather(uuid.uuid4().hex)[0] if self.access.saves_every_rank else "",
        )


def _steps_without_state(trainer: Trainer) -> int:
    """The optimizer steps before a checkpoint that holds no state of the callback."""
    if len(trainer.optimizers) > 1:
        raise MisconfigurationException(
            "the checkpoint has no pruning state, and with several optimizers its steps can't be counted: load its "
            "weights, and fit without ckpt_path"
        )
    return trainer.global_step
