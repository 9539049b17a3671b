"""fit, validate, test and predict: Lightning's own command line, with our YAML."""

from __future__ import annotations

import os

from thanos_lightning.cli.yaml_loader import yaml_loader

TRAINER_COMMANDS = {
    "fit": "train, and prune on the callback's schedule",
    "validate": "run the validation loop",
    "test": "run the test loop",
    "predict": "run the prediction loop",
}


def train(argv: list[str] | None) -> int:
    """Run one of the Trainer's commands.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit status, 0.
    """
    # of calls that LightningCLI makes; the user can't mend them
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

    from jsonargparse import set_loader
    from lightning.pytorch.cli import LightningCLI

    # imported so that --trainer.callbacks+=ThanosPruningCallback and --model CausalLM need no path
    import thanos_lightning.callback
    import thanos_lightning.lm  # noqa: F401

    loader, error = yaml_loader()
    set_loader("yaml_without_sexagesimals", loader, exceptions=(error,))
    mode = {"parser_mode": "yaml_without_sexagesimals"}
    LightningCLI(
        save_config_kwargs={"overwrite": True},  # a second run in the same folder is no mistake
        parser_kwargs={**mode, **{name: dict(mode) for name in TRAINER_COMMANDS}},
        args=argv,
    )
    _leave_ranks()
    return 0


def _leave_ranks() -> None:
    """End this process's part in the process group, which torch leaves to whoever runs the training.

    Otherwise a thread of Gloo may still hold a tensor while Python ends, and aborts a process that had done its work.
    Not called after an error: other ranks may be inside a collective, and this would wait for them.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # rank 0 keeps the store by which the others leave
        dist.destroy_process_group()
