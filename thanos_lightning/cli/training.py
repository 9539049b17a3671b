"""The commands fit, validate and test: LightningCLI with our YAML, recipes by name and precision: auto."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from jsonargparse import ArgumentError, set_loader
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override
from yaml import YAMLError  # type: ignore[import-untyped]

# imported so that --trainer.callbacks+=ThanosPruningCallback and --model CausalLM need no path
import thanos_lightning.lm  # noqa: F401
from thanos_lightning.callback import ThanosPruningCallback
from thanos_lightning.checkpoints.folders import bring_back
from thanos_lightning.checkpoints.format import read_content
from thanos_lightning.checkpoints.resume import guard_resume
from thanos_lightning.cli.commands import TRAINER_COMMANDS
from thanos_lightning.cli.mistakes import PROGRAM, Mistake, did_you_mean, users_mistake
from thanos_lightning.cli.parsing import GROUPS, SPECIAL, is_ours, load_yaml, one_line, why_not_made, with_recipes
from thanos_lightning.cli.training_bar import TrainingBar

# said of classes that are not ours, because their arguments may be for the optimizer
_OF_THE_OPTIMIZER = ", but the optimizer's learning rates and weight decay go on as they are in the checkpoint"
_MODE = "yaml_without_sexagesimals"
AUTO: Final = "auto"
# torch's own tests of a CPU, which also work without /proc
_CPU_INSTRUCTIONS = {"_is_amx_tile_supported": "AMX", "_is_avx512_bf16_supported": "AVX512-BF16"}


class _Trainer(Trainer):
    """Lightning's Trainer.

    Args:
        precision: As Lightning's, such as "bf16-mixed" or "32-true", or "auto" for what the device multiplies fast.
    """

    def __init__(self, *args: Any, precision: _PRECISION_INPUT | Literal["auto"] | None = None, **kwargs: Any) -> None:
        assert precision != AUTO  # CLI has resolved it
        callbacks = kwargs.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        # Lightning's own bar counts epochs even if max_epochs is -1, and says nothing in a log
        if kwargs.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            kwargs["callbacks"] = [*callbacks, TrainingBar()]
        if kwargs.get("enable_model_summary") is None:  # seventeen lines, which the announcement makes superfluous
            kwargs["enable_model_summary"] = False
        super().__init__(*args, precision=precision, **kwargs)
        guard_resume(self.strategy)  # also where there is no callback that does


class CLI(LightningCLI):
    """Lightning's command line as `thanos-lightning` runs it."""

    def __init__(self, args: list[str], **options: Any) -> None:
        # These warnings are about calls of LightningCLI, which the user cannot change.
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        set_loader(_MODE, load_yaml, exceptions=(YAMLError,))
        mode = {"parser_mode": _MODE, "exit_on_error": False}
        super().__init__(
            trainer_class=_Trainer,
            save_config_kwargs={"overwrite": True},  # a second run in the same folder is no mistake
            parser_kwargs={**mode, **{name: mode | _help_of(name) for name in self.subcommands()}},
            args=args,
            **options,
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        # not predict, for which neither CausalLM nor TextData has a step or a loader
        return {name: arguments for name, arguments in LightningCLI.subcommands().items() if name in TRAINER_COMMANDS}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        (config,) = (action for action in parser._actions if "--config" in action.option_strings)
        config.help = "Name of a recipe (`thanos-lightning recipes` lists them), or path of a YAML file."
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        args, of_callbacks = _callbacks_by_number(with_recipes(args))
        try:
            self.config = parser.parse_args(args)
            if of_callbacks:
                self._override_callbacks(of_callbacks)
            self._check_groups()
        except ArgumentError as error:
            command = args[0] if args and args[0] in self.subcommands() else "fit"
            known = getattr(self, "_subcommand_parsers", {"fit": parser})[command]._actions
            options = [option.removeprefix("--") for action in known for option in action.option_strings]
            raise Mistake(one_line(str(error), options, command)) from error

    def _check_groups(self) -> None:
        """Refuse a number or a list in place of a group's options, since jsonargparse doesn't."""
        callbacks = self._get_section(self.config).trainer.callbacks
        for callback in callbacks if isinstance(callbacks, list) else []:
            for name in ("solver", "calibration"):
                value = callback.get(f"init_args.{name}")
                if is_ours([callback.class_path]) and isinstance(value, (bool, int, float, list)):
                    raise Mistake(f"{name} of ThanosPruningCallback is {value!r}: {GROUPS[name]}")

    def _override_callbacks(self, values: dict[tuple[int, str], str]) -> None:
        """Set single arguments of callbacks in the list, because jsonargparse cannot."""
        root = f"{self.config.subcommand}." if "subcommand" in self.config else ""
        callbacks = self.config[f"{root}trainer.callbacks"]
        given = callbacks if isinstance(callbacks, list) else []
        listed = [{"init_args": {}, **callback.as_dict()} for callback in given]
        for (number, key), value in values.items():
            if number >= len(listed):
                raise Mistake(
                    f"--trainer.callbacks.{number}.{key}: there are {len(listed)} callbacks, and the first is 0"
                )
            inner = listed[number]["init_args"]
            *parents, last = (part for part in key.split(".") if part != "init_args")
            for parent in parents:
                if not isinstance(inner.get(parent), dict):  # None, or the word that stands for a group
                    inner[parent] = {}
                inner = inner[parent]
                if "class_path" in inner:  # parsed dataclasses have lost their class_path
                    inner = inner.setdefault("init_args", {})
            inner[last] = load_yaml(value)
        self.config = self.parser.parse_object({f"{root}trainer.callbacks": listed}, self.config)

    @override
    def _parse_ckpt_path(self) -> None:
        """Refuse a checkpoint whose model LightningCLI would load in place of the configured one.

        Other values than the checkpoint's are told.
        """
        section = self._get_section(self.config)
        path = section.get("ckpt_path")
        if not path or section.get("weights_only") is False:  # the user trusts any code in it
            return
        content = content_of(str(path))
        self._dump_config()
        command = self.config.subcommand
        for part, key in (("model", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
            said = self.config_dump.get(part)
            for name, now, then in differences(said, content.get(key)):
                owner = said["class_path"].rpartition(".")[2]
                where = f"{name} of {owner} is {now!r}, {then!r} in {path}"
                if part == "model" and name == "model" and not _is_the_same_folder(now, then):
                    raise Mistake(
                        f"{where}, whose weights would replace it: give --model.model {then}, or train anew without "
                        "--ckpt_path"
                    )
                if command == "fit":
                    rest = "" if owner in ("CausalLM", "TextData") else _OF_THE_OPTIMIZER
                    rank_zero_info(f"going on with other values: {where}; {now!r} is taken{rest}")

    def _get_section(self, config: Any) -> Any:
        return config[config.subcommand] if "subcommand" in config else config

    @override
    def after_instantiate_classes(self) -> None:
        if self.subcommand == "fit" and self.datamodule is None and not is_overridden("train_dataloader", self.model):
            raise Mistake("no data is given to train on: add a data section, such as that of the recipe quickstart")
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        if self.subcommand == "fit" and not any(isinstance(one, ThanosPruningCallback) for one in callbacks):
            rank_zero_info("trains dense: no ThanosPruningCallback among the callbacks (trainer.callbacks)")

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            why = None if users_mistake(error) else why_not_made(str(error))  # what we say ourselves tells more
            if why is None:
                raise
            raise Mistake(why) from error

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, RuntimeError, ImportError) as error:  # Lightning refuses its arguments
            raise Mistake(f"trainer: {error}") from error

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            _, loading, what = str(error).partition("in loading state_dict for ")
            if not loading:
                raise
            first = " ".join(what.split())[:200]
            path = self._get_section(self.config).get("ckpt_path")
            raise Mistake(
                f"{path} is of another model than the configuration's ({first} …): give the model that it was trained "
                "with, or train anew without --ckpt_path"
            ) from error

    @override
    def before_instantiate_classes(self) -> None:
        trainer = self._get(self.config, "trainer")
        if trainer.max_steps == 0 and self.subcommand == "fit":
            raise Mistake("trainer.max_steps is 0, and nothing would be trained: give at least 1")
        require_strategy(trainer.strategy, trainer.accelerator)
        if trainer.precision == AUTO:
            # The saved configuration gets the resolved precision, too.
            trainer.precision, why = fast_precision(trainer.accelerator)
            rank_zero_info(f"precision: {trainer.precision}, since {why}")


def _help_of(command: str) -> dict[str, str]:
    """How a command's help begins: with what is ours."""
    text = TRAINER_COMMANDS[command]
    return {
        "usage": f"{PROGRAM} {command} --config RECIPE [--OPTION VALUE ...]",
        "description": (
            f"{text[0].upper()}{text[1:]}. A recipe's callback is the first of the Trainer's callbacks: "
            "--trainer.callbacks.0.pattern 2:4 sets one of its options. "
            "--trainer.callbacks.help=ThanosPruningCallback lists them: pattern, sparsity, schedule, calibration and "
            "more. --model.help=CausalLM and --data.help=TextData do so for the model and the data."
        ),
    }


def train(argv: list[str]) -> int:
    """Run one of the Trainer's commands, and return the exit status 0."""
    # a warning is said as an error is; Lightning's form begins with a path of its own
    warnings.formatwarning = lambda message, *_, **__: f"{PROGRAM}: warning: {message}\n"
    CLI(argv)
    # torch does not leave the process group by itself, and then a thread of Gloo may hold a tensor while Python ends,
    # and abort a process that has done its work. After an error other ranks may be inside a collective, and a barrier
    # would wait for them.
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # the others need rank 0's store to leave
        dist.destroy_process_group()
    return 0


def fast_precision(accelerator: Any) -> tuple[str, str]:
    """Return a `precision` for the Trainer's `accelerator`, and the reason as the end of a sentence.

    The choice depends on the device's features and not on a measurement, so that ranks on machines of one kind agree.
    """
    if accelerator in ("gpu", "cuda", AUTO) and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        if all(_multiplies_bf16(device) for device in range(torch.cuda.device_count())):
            return "bf16-mixed", f"this GPU multiplies bf16 ({name})"
        return "16-mixed", f"this GPU multiplies fp16, but not bf16 ({name})"
    if accelerator == "cpu" or (accelerator == AUTO and not torch.backends.mps.is_available()):
        known = [name for test, name in _CPU_INSTRUCTIONS.items() if getattr(torch.cpu, test)()]
        if known:
            return "bf16-mixed", f"this CPU multiplies bf16 ({known[0]})"
        return "32-true", f"this CPU has no instructions for bf16 ({' or '.join(_CPU_INSTRUCTIONS.values())})"
    return "32-true", "nothing faster is known to work on this device"


def _multiplies_bf16(device: int) -> bool:
    """Whether a GPU has units for bf16. On older GPUs torch emulates bf16."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def require_strategy(strategy: Any, accelerator: Any) -> None:
    """Refuse the name of a strategy that Lightning does not have, or that cannot work on a CPU."""
    if not isinstance(strategy, str):
        return
    known = StrategyRegistry.available_strategies()
    on_a_cpu = accelerator == "cpu" or (accelerator == AUTO and not torch.cuda.is_available())
    if strategy.startswith(("deepspeed", "fsdp")) and on_a_cpu:
        raise Mistake(
            f"trainer.strategy is {strategy!r}, which needs GPUs: on CPUs give ddp, or thanos_lightning.CPUDeepSpeed "
            "and its stage (--trainer.strategy.stage 3)"
        )
    if strategy != AUTO and strategy not in known:
        meant = did_you_mean(strategy, known)
        raise Mistake(
            f"trainer.strategy is {strategy!r}: {meant}Give auto, ddp, deepspeed_stage_1, deepspeed_stage_2 or "
            "deepspeed_stage_3, or a class_path in the YAML, as the recipe quickstart-zero3-cpu does"
        )


def _is_the_same_folder(name: Any, other: Any) -> bool:
    are_folders = all(isinstance(path, str) and Path(path).is_dir() for path in (name, other))
    return are_folders and Path(name).samefile(other)


def _callbacks_by_number(argv: list[str]) -> tuple[list[str], dict[tuple[int, str], str]]:
    """Split off arguments such as --trainer.callbacks.0.pattern. Returns the rest, and (number, key) -> value."""
    rest: list[str] = []
    values: dict[tuple[int, str], str] = {}
    arguments = iter(argv)
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if numbered := re.fullmatch(r"--trainer\.callbacks\.(\d+)\.(.+)", option):
            if not equals:
                value = next(arguments, "")
                if not value:
                    raise Mistake(f"{option} has no value: give one, such as {option} 2:4")
            values[int(numbered[1]), numbered[2]] = value
        else:
            rest.append(argument)
    return rest, values


def content_of(ckpt_path: str) -> Mapping[str, Any]:
    """Read what Lightning and its callbacks saved in a checkpoint; empty if it cannot be read here.

    Raises a Mistake if the path is no checkpoint of a training, and what `read_content` raises.
    """
    path = Path(ckpt_path)
    if ckpt_path in SPECIAL or "://" in ckpt_path:
        return {}
    bring_back(path)
    if (path / ".metadata").is_file():  # a folder of FSDP2
        return {}
    if path.is_dir() and not (path / "checkpoint").is_dir():
        inside = sorted(path.rglob("*.ckpt"))
        mend = f"give what is in it, such as {inside[0]}" if inside else "give a .ckpt that the Trainer wrote"
        raise Mistake(f"--ckpt_path {ckpt_path} is a folder, and no checkpoint: {mend}")
    content = read_content(path)
    if "pytorch-lightning_version" not in content:
        raise Mistake(
            f"--ckpt_path {ckpt_path} holds weights and nothing of a training: give a .ckpt that the Trainer wrote, or "
            "load the weights in a module of your own"
        )
    return content


def differences(section: Mapping[str, Any] | None, saved: Mapping[str, Any] | None) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, the configured value and the checkpoint's value of each argument in which the two differ.

    `section` is the section `model` or `data` of a configuration, as plain values with class_path. `saved` has the
    hyperparameters in the checkpoint.

    Examples:
        >>> list(differences({"class_path": "a.B", "init_args": {"rate": 2}}, {"_class_path": "a.B", "rate": 1}))
        [('rate', 2, 1)]
    """
    if not section or not saved:
        return
    now, then = {"class": section["class_path"], **_plain(section)}, {"class": saved.get("_class_path"), **saved}
    if then["class"] is None:  # a training from Python records none
        del then["class"]
    for name in now:
        if name in then and _plain(now[name]) != _plain(then[name]):
            yield name, now[name], then[name]


def _plain(value: Any) -> Any:
    """Strip classes from their arguments, and turn tuples into lists."""
    if isinstance(value, Mapping):
        arguments = value["init_args"] if "class_path" in value and "init_args" in value else value
        return {key: _plain(inner) for key, inner in arguments.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
