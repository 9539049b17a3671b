"""Explains why a module's `configure_model` fails under ZeRO-3, for which DeepSpeed changes how modules are made."""

from __future__ import annotations

import traceback

from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy


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
