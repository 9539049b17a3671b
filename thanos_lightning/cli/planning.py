"""The command plan: what fit would take on machines that need not be there, and what it would take to fit."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from thanos_lightning.cli.commands import GIGABYTES
from thanos_lightning.cli.mistakes import Mistake
from thanos_lightning.cli.plan_text import GIB, plan_text
from thanos_lightning.cli.planned import Outlook, Plan, PlannedCLI, quiet
from thanos_lightning.sharding.held import stage_of

_Change = tuple[str, dict[str, Any]]  # in words, and as arguments of `Plan.outlook`


def plan(
    arguments: list[str],
    *,
    devices: int | None = None,
    num_nodes: int | None = None,
    device: str | None = None,
    memory_gib: float | None = None,
) -> int:
    """Print what fit would take with these arguments. Returns 1 if it does not fit into the memory, else 0."""
    if memory_gib is not None and not 0 < memory_gib < float("inf"):
        raise Mistake(f"--memory-gib is {memory_gib:g}: give a number > 0, such as 80")
    memory = None if device is None else GIGABYTES[device] * 10**9
    if memory_gib is not None:
        memory = round(memory_gib * GIB)
    for name, value in (("devices", devices), ("num_nodes", num_nodes)):
        if value is not None:
            arguments = [*arguments, f"--trainer.{name}={value}"]
    planned = Plan(PlannedCLI(arguments, for_another=memory is not None))
    outlook = planned.outlook()
    fits = None if memory is None else outlook.most <= memory
    remedies = [] if fits is not False else list(_remedies(planned, outlook, memory or 0))
    name = f"{planned.ranks} × {device}" if device else f"{planned.ranks} rank{'s' if planned.ranks > 1 else ''}"
    sys.stdout.write(f"{plan_text(planned, outlook, name, memory, remedies)}\n")
    return 1 if fits is False else 0


def _remedies(planned: Plan, outlook: Outlook, memory: int) -> Iterator[str]:
    """Settings with which it would fit, one of each kind."""
    kinds = [_smaller_windows(planned, outlook)]
    if not isinstance(planned.strategy, ModelParallelStrategy) and find_spec("deepspeed") is not None:
        kinds += [_other_strategies(planned), _more_ranks(planned)]  # a module of FSDP2 shards itself
    for kind in kinds:
        for words, change in kind:
            with warnings.catch_warnings(), quiet():
                warnings.simplefilter("ignore")
                try:
                    fits = planned.outlook(**change).most <= memory
                except (MisconfigurationException, ValueError):  # windows that no longer fit before an event
                    continue
            if fits:
                yield words
                break


def _smaller_windows(planned: Plan, outlook: Outlook) -> Iterator[_Change]:
    sums = max(one.moments for one in outlook.estimated.windows) / GIB
    if not sums:
        return
    for part in (2, 4, 8, 16, 32):
        gib = float(f"{sums / part:.2g}")
        calibration = replace(planned.options.calibration, memory_gib=gib)
        yield f"calibration.memory_gib: {gib:g}", {"options": replace(planned.options, calibration=calibration)}


def _other_strategies(planned: Plan) -> Iterator[_Change]:
    now = stage_of(planned.strategy) if isinstance(planned.strategy, DeepSpeedStrategy) else 0
    for stage in (2, 3):
        if planned.ranks > 1 and stage > now:
            yield f"DeepSpeed at stage {stage}", {"strategy": DeepSpeedStrategy(stage=stage)}
    offloaded = DeepSpeedStrategy(stage=3, offload_optimizer=True)
    yield "DeepSpeed at stage 3 with offload_optimizer: true", {"strategy": offloaded}


def _more_ranks(planned: Plan) -> Iterator[_Change]:
    is_sharded = isinstance(planned.strategy, DeepSpeedStrategy)
    strategy = planned.strategy if is_sharded else DeepSpeedStrategy(stage=3)
    with_it = "" if is_sharded else " with DeepSpeed at stage 3"
    for times in (2, 4, 8, 16):
        ranks = times * planned.ranks
        yield f"{ranks} devices in all{with_it}", {"strategy": strategy, "ranks": ranks}
