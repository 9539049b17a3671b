"""fit, validate, test and predict: Lightning's own command line, with our YAML, recipes by name and precision: auto."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from jsonargparse import set_loader
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

# imported so that --trainer.callbacks+=ThanosPruningCallback and --model CausalLM need no path
import thanos_lightning.callback
import thanos_lightning.lm  # noqa: F401
from thanos_lightning.cli.precision import AUTO, fast_precision
from thanos_lightning.cli.shipped import recipes
from thanos_lightning.cli.yaml_loader import yaml_loader
from thanos_lightning.training_bar import TrainingBar

_MODE = "yaml_without_sexagesimals"


class _Trainer(Trainer):
    """Lightning's Trainer.

    Args:
        precision: As Lightning's, such as "bf16-mixed" or "32-true", or "auto" for what the device multiplies fast.
    """

    def __init__(self, *args: Any, precision: _PRECISION_INPUT | Literal["auto"] | None = None, **kwargs: Any) -> None:
        assert precision != AUTO  # CLI has resolved it
        callbacks = kwargs.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        # Lightning's own wraps at 80 columns, and counts epochs where max_epochs is -1
        if kwargs.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"] = [*callbacks, TrainingBar()]
        super().__init__(*args, precision=precision, **kwargs)


class CLI(LightningCLI):
    """Lightning's command line as `thanos-lightning` runs it.

    Args:
        args: The arguments after the program's name.
        options: LightningCLI's.

    Example:
        >>> CLI(["--config", "quickstart"], run=False).trainer.max_steps  # doctest: +SKIP
        32
    """

    def __init__(self, args: list[str], **options: Any) -> None:
        loader, error = yaml_loader()
        set_loader(_MODE, loader, exceptions=(error,))
        mode = {"parser_mode": _MODE}
        super().__init__(
            trainer_class=_Trainer,
            save_config_kwargs={"overwrite": True},  # a second run in the same folder is no mistake
            parser_kwargs={**mode, **{name: dict(mode) for name in self.subcommands()}},
            args=args,
            **options,
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        self.config = parser.parse_args(_with_recipes(args))

    @override
    def before_instantiate_classes(self) -> None:
        trainer = self._get(self.config, "trainer")
        if trainer.precision == AUTO:
            # in the configuration that is saved, too
            trainer.precision, why = fast_precision(trainer.accelerator)
            rank_zero_info(f"precision: {trainer.precision}, since {why}")


def train(argv: list[str]) -> int:
    """Run one of the Trainer's commands.

    Args:
        argv: The arguments after the program's name.

    Returns:
        The exit status, 0.
    """
    # of calls that LightningCLI makes; the user can't mend them
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    CLI(argv)
    _leave_ranks()
    return 0


def _with_recipes(argv: list[str]) -> list[str]:
    """The arguments, with a recipe's file where --config has its name and no file is called so."""
    known = recipes()

    def file_of(name: str) -> str:
        return str(known[name]) if name in known and not Path(name).exists() else name

    expanded = []
    for before, argument in zip(["", *argv], argv, strict=False):
        option, equals, value = argument.partition("=")
        if before in ("-c", "--config"):
            expanded.append(file_of(argument))
        elif option in ("-c", "--config") and equals:
            expanded.append(f"{option}={file_of(value)}")
        else:
            expanded.append(argument)
    return expanded


def _leave_ranks() -> None:
    """End this process's part in the process group, which torch leaves to whoever runs the training.

    Otherwise a thread of Gloo may still hold a tensor while Python ends, and aborts a process that had done its work.
    Not called after an error: other ranks may be inside a collective, and this would wait for them.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # rank 0 keeps the store by which the others leave
        dist.destroy_process_group()
