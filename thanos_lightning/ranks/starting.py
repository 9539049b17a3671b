"""What can delay or end the start of a training: extensions that are built, and `configure_model` under ZeRO-3."""

from __future__ import annotations

import glob
import os
import shlex
import time
import traceback
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn

from thanos_lightning.report.progress import Phase, open_phase

_PATIENCE = 5.0  # seconds
_BETWEEN_LOOKS = 0.5


def announce_builds() -> None:
    """Show each build of an extension in this process as a phase, which SIGTERM ends as Ctrl-C does: without a lock."""
    from torch.utils import cpp_extension  # imports setuptools

    load = cpp_extension.load
    if hasattr(load, "is_announced"):
        return

    @wraps(load)
    def announced(name: str, *args: Any, **kwargs: Any) -> Any:
        folder = kwargs.get("build_directory") or cpp_extension._get_build_directory(name, verbose=False)
        with open_phase(f"Building the extension {name} in {folder}") as phase:
            _wait_for(Path(folder) / "lock", phase)
            return load(name, *args, **kwargs)

    announced.is_announced = True  # type: ignore[attr-defined]
    cpp_extension.load = announced


def _wait_for(lock: Path, phase: Phase) -> None:
    """Wait until the lock is gone. torch would do so in silence, and go on without an extension if none was built."""
    is_named = False
    while lock.exists():
        phase.advance(0, note=f"waiting until {lock.name} is gone")
        if not is_named and phase.seconds >= _PATIENCE and not _is_held(lock):
            rank_zero_warn(
                f"{lock} is a lock that no process of this machine holds: a start that was killed has left it, and "
                "this one waits until it is gone. If no other machine builds there, remove it: "
                f"rm {shlex.quote(str(lock))}"
            )
            is_named = True
        time.sleep(_BETWEEN_LOOKS)
    phase.advance(0, note="")


def _is_held(lock: Path) -> bool:
    """Whether a process has the lock open, as torch has from making it until removing it."""
    for opened in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # the process has ended, or is another user's
            if os.path.samefile(opened, lock):
                return True
    return False


def explain_configuring(strategy: Strategy, failure: BaseException) -> str | None:
    """Return advice if a module's own `from_pretrained`, or `torch.compile`, has failed under ZeRO-3; else None.

    ZeRO-3 creates parameters empty, and transformers fills them only if it knows that ZeRO-3 is on. Otherwise
    transformers reports an index out of bounds, or sizes that differ. The wrapper of `torch.compile` looks for its own
    attributes in what it wraps, without an end while DeepSpeed initialises it.
    """
    if not (isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3):
        return None
    calls = {
        (frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(failure.__traceback__)
    }
    if isinstance(failure, RecursionError) and ("torch", "__getattr__") in calls:
        return (
            "torch.compile(module) in configure_model fails under ZeRO-3: compile it in place (module.compile()), or "
            "in __init__"
        )
    if ("transformers", "from_pretrained") not in calls or ("thanos_lightning", "load_pretrained") in calls:
        return None
    from transformers.integrations import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        return None
    return (
        "from_pretrained failed under ZeRO-3, of which transformers does not know: in configure_model, keep "
        "HfDeepSpeedConfig(self.trainer.strategy.config) of transformers.integrations in a variable while it loads, or "
        "load the model in __init__"
    )
