"""Checks a checkpoint's files before they are loaded, and completes the load.

The callback's state is checked elsewhere: its format by `load_state_dict` of the callback (fit/past.py). The rest is
checked by `PruningRun.begin` (fit/run.py): the plan in plan/windows.py (`check_begun`, `check_ahead`), masks and zeros
in enforcement.py (`restore`), the sums of an open window in collect/statistics.py (`load`). `on_load_checkpoint` of the
callback checks the shapes of moments. cli/training.py checks that the model is the same, lm/resumable.py the data.
"""

from __future__ import annotations

import itertools
import os
import pickle
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

from thanos_lightning.checkpoints.deepspeed_files import (
    CLASSES,
    Plan,
    files_of,
    is_universal,
    is_zero_folder,
    load_file,
    model_files,
    read_facts,
    read_parameter_groups,
    read_plan,
    require_end,
    require_one_save,
)
from thanos_lightning.checkpoints.foreign import check_shards, not_plain, require_bounded, require_intact
from thanos_lightning.ranks.talk import Ranks, failing_together
from thanos_lightning.ranks.view import whole_shape
from thanos_lightning.report.progress import open_phase

_GUARDED = "_thanos_lightning_guards_resume"
_SAFE, _UNSAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch reads them
_YES = ("1", "y", "yes", "true")


def guard_resume(strategy: Strategy) -> None:
    """Let this strategy load no code from a checkpoint, from now on and by any of the Trainer's methods.

    All ranks refuse files that are not regular, or whose bytes have changed, before anything is loaded. The files of a
    folder are refused then, too, if they hold more than plain values. torch itself is told to read plain values alone,
    whatever its callers say. A user who trusts a checkpoint says weights_only=False; Lightning does not pass that on to
    DeepSpeed's strategy. What DeepSpeed leaves undone is completed after a load.

    The strategy's methods are wrapped, because the checkpoint is unknown until it is loaded.
    """
    if getattr(strategy, _GUARDED, False):
        return
    setattr(strategy, _GUARDED, True)
    if isinstance(strategy, DeepSpeedStrategy):
        _refresh_masters(strategy)
    load_checkpoint = strategy.load_checkpoint

    def safe_load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        of_deepspeed = isinstance(strategy, DeepSpeedStrategy)
        trusted = False in (*args, kwargs.get("weights_only")) and not of_deepspeed
        path = Path(checkpoint_path)
        with _all_of(strategy):
            if not trusted:
                require_end(path)
                check_shards(path)
            if path.exists() and not path.is_dir():  # a URL is not here
                require_bounded(path)
                with open_phase(f"Reading {path.name}"):
                    require_intact(path)
        if trusted:
            return load_checkpoint(checkpoint_path, *args, **kwargs)
        if isinstance(strategy, DeepSpeedStrategy):
            _prepare(path, strategy)
        with _plain_values_alone(CLASSES if of_deepspeed else ()):
            try:
                loaded = load_checkpoint(checkpoint_path, *args, **kwargs)
            except (pickle.UnpicklingError, CheckpointException) as error:
                failed = [cause for cause, _ in getattr(error, "failures", {}).values()]
                if (why := next((e for e in (error, *failed) if isinstance(e, pickle.UnpicklingError)), None)) is None:
                    raise
                raise MisconfigurationException(str(not_plain(path, why))) from error
            if isinstance(strategy, DeepSpeedStrategy) and _fits(strategy):
                _complete(path, strategy)
            return loaded

    strategy.load_checkpoint = safe_load_checkpoint  # type: ignore[method-assign]


def _all_of(strategy: Any) -> AbstractContextManager[None]:
    return failing_together(Ranks(strategy.global_rank, getattr(strategy, "world_size", 1)))


@contextmanager
def _plain_values_alone(classes: Iterable[str]) -> Iterator[None]:
    """Let `torch.load` read plain values and these classes alone, also where it is called with weights_only=False."""
    if os.environ.get(_UNSAFE, "").lower() in _YES:  # set by the user, and torch refuses both settings
        yield
        return
    before = os.environ.get(_SAFE)
    os.environ[_SAFE] = "1"
    try:
        with torch.serialization.safe_globals([pkgutil.resolve_name(name) for name in classes]):
            yield
    finally:
        os.environ.pop(_SAFE)
        if before is not None:
            os.environ[_SAFE] = before


def _prepare(path: Path, strategy: DeepSpeedStrategy) -> None:
    """Check a folder before DeepSpeed loads it. All ranks must call it.

    - All ranks refuse a folder with damaged files, or files of several saves. DeepSpeed reads in a way that may run
      code from a file, so each one is read safely before. Each rank reads its share of the files, once.
    - Another number of ranks, ZeRO stage or model is refused with advice. DeepSpeed alone would fail with a message
      that does not help, or load values that do not belong there.
    - A resharded folder is recognised. DeepSpeed alone needs an entry in its configuration.
    """
    fits = _fits(strategy)
    if fits and path.is_file() and not strategy.load_full_weights:
        raise MisconfigurationException(
            f"{path} is one file, which another strategy wrote, and DeepSpeed resumes from a folder: resume with "
            "that strategy, or export the checkpoint and start from the exported model"
        )
    if not is_zero_folder(path):
        return
    with _all_of(strategy):
        plan = read_plan(path)
        facts = read_facts(path, files_of(path)[strategy.global_rank :: strategy.world_size])
    everywhere = Ranks(strategy.global_rank, strategy.world_size).gather(facts)
    with _all_of(strategy):
        require_one_save(path, itertools.chain.from_iterable(everywhere))
    if fits:
        _check(path, plan, strategy)
        strategy.deepspeed_engine._config.load_universal_checkpoint = is_universal(path)


def _fits(strategy: Strategy) -> bool:
    module = strategy.lightning_module
    return module is not None and module.trainer.state.fn == "fit"


def _complete(path: Path, strategy: DeepSpeedStrategy) -> None:
    """Complete what DeepSpeed has loaded for a fit.

    - DeepSpeed loads a resharded checkpoint at stage 3 with the first parameter group's weight decay for all groups,
      and with one step counter that every group advances. Here each group gets its own values back.
    - DeepSpeed loads a resharded checkpoint without buffers and untrained parameters. They are loaded here.
    - With the optimizer on NVMe, DeepSpeed restores the masters but not the moments. A warning says so.
    """
    if strategy.deepspeed_engine.zero_nvme_offload_optimizer():
        rank_zero_warn(
            "the optimizer is offloaded to NVMe, and DeepSpeed does not load moments there: masters, masks and "
            "schedule go on, moments begin at zero, so the losses will differ from those of a run that was not "
            "stopped"
        )
    if is_zero_folder(path) and is_universal(path):
        _complete_optimizer(path, strategy)
        _complete_module(path, strategy)


def _refresh_masters(strategy: DeepSpeedStrategy) -> None:
    """Let `load_full_weights` fill the masters, too. DeepSpeed fills the model's copy, which the first step undoes."""
    load_model_state_dict = strategy.load_model_state_dict

    def load_with_masters(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load_model_state_dict(checkpoint, strict=strict)
        refresh = getattr(getattr(strategy.deepspeed_engine, "optimizer", None), "refresh_fp32_params", None)
        if strategy.load_full_weights and strategy.zero_stage_3 and refresh is not None:
            refresh()

    strategy.load_model_state_dict = load_with_masters  # type: ignore[method-assign]


def _check(path: Path, plan: Plan, strategy: DeepSpeedStrategy) -> None:
    stage = int(strategy.deepspeed_engine.zero_optimization_stage())
    if stage != plan.stage and (stage in (0, 3) or plan.stage in (0, 3)):  # stages 1 and 2 write the same files
        raise MisconfigurationException(
            f"{path} was written at ZeRO stage {plan.stage}, and this training is at stage {stage}: resume at stage "
            f"{plan.stage}, or export the checkpoint and start from the exported model"
        )
    if plan.stage > 0 and not is_universal(path) and plan.world_size != strategy.world_size:
        raise MisconfigurationException(
            f"{path} was written by {plan.world_size} ranks, and {strategy.world_size} resume it: run "
            f"`thanos-lightning reshard {path}`, and resume from the folder that it makes"
        )
    assert strategy.lightning_module is not None
    ours = {
        name: whole_shape(parameter)
        for name, parameter in strategy.lightning_module.named_parameters()
        if parameter.requires_grad
    }
    if not plan.shapes:
        return
    aliases = {name for name, _ in strategy.lightning_module.named_parameters(remove_duplicate=False)}
    unlike = [
        f"has {name} of shape {tuple(shape)}, and this model has "
        + (f"shape {ours[name]}" if name in ours else "no such parameter")
        for name, shape in plan.shapes.items()
        if name not in aliases or (name in ours and ours[name] != shape)
    ]
    unlike += [f"lacks {name}, which this model trains" for name in ours if name not in plan.shapes]
    if unlike:
        raise MisconfigurationException(
            f"{path} is a checkpoint of another model: it {unlike[0]}. Resume with the model that it was trained with"
        )


def _complete_optimizer(path: Path, strategy: DeepSpeedStrategy) -> None:
    wrapped: Any = strategy.deepspeed_engine.optimizer
    optimizer: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
    saved = read_parameter_groups(path)
    if len(saved) != len(optimizer.param_groups):
        raise MisconfigurationException(
            f"the optimizer in {path} has {len(saved)} parameter groups, and this one {len(optimizer.param_groups)}: "
            "resume with the configure_optimizers that it was trained with"
        )
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update({name: value for name, value in values.items() if name != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@torch.no_grad()
def _complete_module(path: Path, strategy: DeepSpeedStrategy) -> None:
    module = strategy.lightning_module
    assert module is not None
    saved = load_file(model_files(path)[0])["module"]
    untrained = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    for name, tensor in [*module.named_buffers(), *untrained]:
        if name in saved and saved[name].numel() == tensor.numel():
            tensor.copy_(saved[name])
