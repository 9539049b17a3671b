"""A training that is planned: its model has no weights, its ranks and its data need not be there."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn
from typing_extensions import override

from thanos_lightning.callback import ThanosPruningCallback
from thanos_lightning.checkpoints.format import Size, exported_size
from thanos_lightning.checkpoints.huggingface import first_line
from thanos_lightning.cli.mistakes import Mistake, users_mistake
from thanos_lightning.cli.training import AUTO, CLI
from thanos_lightning.collect.tiny_input import tiny_run
from thanos_lightning.event.channels import Width, choose_targets, found_or_declared
from thanos_lightning.event.targets import Targets
from thanos_lightning.fit.announce import describe
from thanos_lightning.fit.other_callbacks import check_companions
from thanos_lightning.layers.blocks import find_blocks
from thanos_lightning.layers.census import take_census
from thanos_lightning.layers.feedforward import FeedForward, kind_of
from thanos_lightning.layers.lora import mask_adapters
from thanos_lightning.layers.targets import Layer, find_targets, prunable_modules
from thanos_lightning.layers.wrappers import compile_in_place
from thanos_lightning.lm import CausalLM, TextData
from thanos_lightning.lm.distillation import START
from thanos_lightning.lm.pretrained import load_pretrained
from thanos_lightning.plan.estimate import Batches, Estimate, Needs, Solving, estimate
from thanos_lightning.plan.options import PruningOptions, assign_patterns
from thanos_lightning.plan.planner import Planner
from thanos_lightning.plan.schedule import scheduled_events, steps_of
from thanos_lightning.plan.shares import Share, share_of, zero_of
from thanos_lightning.plan.windows import Window
from thanos_lightning.ranks.choice import check_strategy
from thanos_lightning.ranks.fsdp import require_rows
from thanos_lightning.solver import Channels


class PlannedCLI(CLI):
    """The command line of fit, whose model has no weights and whose Trainer trains nothing."""

    def __init__(self, args: list[str], *, for_another: bool) -> None:
        self._for_another = for_another  # than the device that is here
        with quiet():
            super().__init__(["fit", *args], save_config_callback=None)

    @override
    def before_instantiate_classes(self) -> None:
        trainer = self._get(self.config, "trainer")
        if self._for_another:
            trainer.accelerator = "gpu" if trainer.accelerator == AUTO else trainer.accelerator
            if trainer.accelerator != "cpu" and trainer.precision == AUTO:
                trainer.precision = "bf16-mixed"
        super().before_instantiate_classes()

    @override
    def instantiate_classes(self) -> None:
        with _building("model and data"), torch.device("meta"):
            LightningCLI.instantiate_classes(self)  # and not `CLI`'s, whose errors would hide those of the meta device

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's Trainer on one device, which knows the length of the training."""
        self.asked = self._get(self.config_init, "trainer")
        on_cpu = self.asked.accelerator == "cpu" or not torch.cuda.is_available()
        precision = str(self.asked.precision or "32-true")
        here: dict[str, Any] = {
            "accelerator": "cpu" if on_cpu else "gpu",
            "precision": f"bf{precision}" if on_cpu and precision.startswith("16") else precision,
        }
        with torch.device("cpu"):
            trainer = super().instantiate_trainer(
                **kwargs, **here, devices=1, num_nodes=1, strategy=AUTO, plugins=None, logger=False
            )
        trainer.fit_loop.max_epochs = -1  # else the number of steps would be counted in the data
        return trainer

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing runs."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what libraries say of the device that is here, and of seeds."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _building(what: str) -> Iterator[None]:
    """Turn whatever a module raises because it has no weights into a user's mistake."""
    try:
        yield
    except Exception as error:
        if users_mistake(error) is not None:
            raise
        first: BaseException = error
        while (before := first.__cause__ or first.__context__) is not None:  # jsonargparse raises its own
            first = before
        raise Mistake(
            f"{what} can't be built on the meta device, without weights ({type(first).__name__}: {first_line(first)}): "
            "build it from its configuration in __init__ or configure_model, and load weights elsewhere, say in setup"
        ) from error


@dataclass(frozen=True)
class Outlook:
    """What a training would take."""

    announced: str  # what the training says before its first batch
    share: Share  # what a rank holds
    windows: Sequence[Window]  # as the run would plan them, if a scan found all layers alike
    estimated: Estimate  # what it takes to prune
    at_events: Sequence[int]  # bytes on a rank's device at the end of each window, at most
    in_training: int  # bytes on a rank's device while batches are trained, at most, without activations
    beside: int  # bytes of models that are only read, such as a teacher

    @property
    def most(self) -> int:
        """Bytes that a rank's device needs, at most, without activations."""
        return max(self.in_training, *self.at_events)


class Plan:
    """A training that is planned: its model, its machines, and what its configuration says."""

    def __init__(self, cli: PlannedCLI) -> None:
        asked, self.trainer, self.module = cli.asked, cli.trainer, cli.model
        nodes = _at_least_one("trainer.num_nodes", asked.num_nodes)
        self.ranks = _devices(asked) * nodes
        self.strategy = _strategy(asked.strategy, self.ranks)
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        self.options = _options(self.trainer, callbacks, self.strategy)
        self.steps_are_limited = asked.max_epochs not in (None, -1)
        self.precision = str(asked.precision or "32-true")
        self._has_half = self.precision.removeprefix("bf") in ("16", "16-mixed", "16-true")
        self._autocasts = self._has_half and not self.precision.endswith("-true")
        here_on_cpu = asked.accelerator == AUTO and not torch.cuda.is_available()
        self._device = torch.device("cpu" if asked.accelerator == "cpu" or here_on_cpu else "cuda")
        self._build(nodes)
        averages = sum(isinstance(callback, WeightAveraging) for callback in callbacks)
        self._averages = averages * _size(self.module)  # bytes of copies of all weights
        self._teacher = _teacher(self.module)
        self.batches = Batches()
        if isinstance(data := cli.datamodule, TextData):
            tokens = data.batch_size * data.block_size
            self.batches = Batches(-(-data.calibration_tokens // tokens), tokens, data.block_size)
        self._feed_forwards = _feed_forwards(self.module, self.trainer, self.options)

    def _build(self, nodes: int) -> None:
        module, strategy = self.module, self.strategy
        sharded = isinstance(strategy, ModelParallelStrategy)
        ranks = _pretended_ranks(module, strategy, nodes, self.ranks) if sharded else nullcontext()
        module.trainer = self.trainer
        with _building(type(module).__name__), torch.device("meta"), ranks:
            module.configure_model()
        module.trainer = None
        compile_in_place(module)
        mask_adapters(module)
        self.trainer.strategy.connect(module)
        if self._has_half and not self._autocasts:
            module.to(torch.bfloat16)
        if sharded:
            for layer in self.layers:
                require_rows(layer)

    @cached_property
    def _of_deepspeed(self) -> LightningModule:
        """DeepSpeed's copy of the model, which has 16 bits also in mixed precision."""
        module: LightningModule = self.module
        if not self._has_half:
            return module
        with _building(type(module).__name__):
            return copy.deepcopy(module).to(torch.bfloat16)

    def outlook(
        self, options: PruningOptions | None = None, strategy: Strategy | None = None, ranks: int | None = None
    ) -> Outlook:
        """Plan the training as the callback will, or with other options or machines, and estimate what it takes.

        What the callback would refuse is refused as by the callback.
        """
        strategy, ranks, trainer = strategy or self.strategy, ranks or self.ranks, self.trainer
        of_deepspeed = isinstance(strategy, DeepSpeedStrategy)
        module = self._of_deepspeed if of_deepspeed else self.module
        options = options or self.options
        dense = exported_size(module, find_targets(module, options.targets, options.ignore), of_deepspeed=of_deepspeed)
        options, targets = self._taken(module, options, dense)
        layers, masked = dict(targets.layers), targets.masked
        planner = Planner(options, options.schedule, self._can_differentiate(options, strategy))
        windows = planner.plan(trainer, layers, targets.final, None)
        census = take_census(module, masked)
        held_by = strategy if ranks > 1 or of_deepspeed else None
        share = share_of(module, masked.values(), held_by, ranks, autocasts=self._autocasts)
        events = scheduled_events(options.schedule, trainer)
        estimated = estimate(
            options,
            layers,
            census,
            windows,
            targets.trainable(find_blocks(module, layers)) if options.block_steps else {},
            self.batches,
            Solving(ranks, share.in_pieces, again=len(events) > 1, device=self._device.type),
            accumulated=trainer.accumulate_grad_batches,
        )
        shares_teacher = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
        beside = self._teacher // (ranks if shares_teacher else 1) + self._averages
        return Outlook(
            describe(options, targets, census, estimated, events, dense=dense, steps=steps_of(trainer)),
            share,
            windows,
            estimated,
            at_events=[size + beside for size in _at_events(windows, estimated.windows, share, layers)],
            in_training=share.in_training().total + beside + (estimated.moments if options.collects_in_training else 0),
            beside=beside,
        )

    @property
    def layers(self) -> list[Layer]:
        """All that `targets` and `ignore` leave, front to back."""
        return list(find_targets(self.module, self.options.targets, self.options.ignore).values())

    def _taken(self, module: LightningModule, options: PruningOptions, dense: Size) -> tuple[PruningOptions, Targets]:
        """What is pruned, and the options with the sparsity that channels and experts really have."""
        layers = find_targets(module, options.targets, options.ignore)
        final = assign_patterns(layers, options.pattern, options.overrides)
        width = Width(options.multiple_of, options.size, dense)
        targets = choose_targets(module, layers, final, width, lambda: self._feed_forwards)
        return options.with_pattern(targets.final), targets

    def _can_differentiate(self, options: PruningOptions, strategy: Strategy | None) -> bool:
        """As of `ParameterAccess`, which matters for a calibration set only."""
        if options.calibration.batches is None or not isinstance(strategy, DeepSpeedStrategy):
            return True
        from thanos_lightning.ranks.zero import gathers_whole_modules  # imports deepspeed

        return not (strategy.zero_stage_3 and gathers_whole_modules(self._of_deepspeed, zero_of(strategy)))


def _at_events(
    windows: Sequence[Window], each: Sequence[Needs], share: Share, layers: Mapping[str, Layer]
) -> list[int]:
    """Bytes on the device at the end of each window. Masks are there of what was pruned before."""
    sizes: list[int] = []
    masked: set[str] = set()
    weights = {name: layer.rows * layer.cols for name, layer in layers.items()}
    for window, needs in zip(windows, each, strict=True):
        on_device = share.at_event(window.event.step)
        masks = on_device.masks * sum(weights[name] for name in masked) // sum(weights.values())
        counting = needs.moments + (share.in_training().copies if window.start_step == window.end_step else 0)
        sizes.append(on_device.without("masks").total + masks + max(needs.event, counting))
        if not window.scans:
            masked |= window.patterns.keys()
    return sizes


def _devices(asked: Any) -> int:
    """The number of devices of a machine."""
    devices = asked.devices
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip(",").split(",")
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    if str(devices) in (AUTO, "-1"):
        if asked.accelerator != "cpu":
            raise Mistake(
                f"trainer.devices is {devices}, which is another number on each machine: give --devices, such as 8"
            )
        devices = 1
    return _at_least_one("trainer.devices", devices)


def _at_least_one(name: str, value: Any) -> int:
    """The value as a number, or a `Mistake` that names it."""
    if not str(value).isdecimal() or int(value) < 1:
        raise Mistake(f"{name} is {value}: give at least 1")
    return int(value)


def _strategy(asked: Any, ranks: int) -> Strategy | None:
    """The strategy, as far as its ranks don't matter; None for one device. What the callback refuses is refused."""
    strategy = asked
    if isinstance(asked, str):
        if asked == AUTO:
            return DDPStrategy() if ranks > 1 else None
        try:
            strategy = StrategyRegistry.get(asked)
        except ImportError as error:
            raise Mistake(f"the strategy {asked!r} can't be planned ({error}): give another") from error
    check_strategy(strategy)
    return strategy if isinstance(strategy, (DDPStrategy, ModelParallelStrategy)) else None


def _options(trainer: Trainer, callbacks: Sequence[Any], strategy: Strategy | None) -> PruningOptions:
    ours = [callback for callback in callbacks if isinstance(callback, ThanosPruningCallback)]
    if not ours:
        raise Mistake(
            "the trainer has no ThanosPruningCallback, so nothing would be pruned: add one to trainer.callbacks"
        )
    check_companions(trainer, ours[0], strategy)
    return ours[0].options


@contextmanager
def _pretended_ranks(module: LightningModule, strategy: Any, nodes: int, ranks: int) -> Iterator[None]:
    """Give a module of FSDP2 the mesh of rank 0, whose other ranks are not there."""
    # As Lightning sets them: all ranks of a machine would share each tensor
    asked = (strategy._data_parallel_size, strategy._tensor_parallel_size)
    automatic = (nodes, ranks // nodes)
    sizes = [auto if size == AUTO else int(size) for size, auto in zip(asked, automatic, strict=True)]
    if sizes != [ranks, 1]:
        raise Mistake(
            f"ModelParallelStrategy would have data_parallel_size {sizes[0]} and tensor_parallel_size {sizes[1]} on "
            f"{ranks} ranks: give it {ranks} and 1, since tensor parallelism is not supported"
        )
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        names = ("data_parallel", "tensor_parallel")
        module._device_mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=names)
        yield
    finally:
        dist.destroy_process_group()


def _teacher(module: LightningModule) -> int:
    """Bytes of a whole teacher."""
    if not isinstance(module, CausalLM) or (wanted := module.distillation) is None:
        return 0
    name = module.model_name if wanted.teacher == START else wanted.teacher
    with torch.device("meta"):
        return _size(load_pretrained(name, wanted.dtype))


def _size(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _feed_forwards(module: LightningModule, trainer: Trainer, options: PruningOptions) -> list[FeedForward]:
    """The module's feed-forward blocks, where channels are pruned: those it declares, or as a small copy has them."""
    patterns = [options.pattern, *(other.parsed() for other in options.overrides)]
    if not any(isinstance(pattern, Channels) for pattern in patterns):
        return []
    if (declared := getattr(module, "feed_forwards", None)) is not None:
        return list(declared())
    if not isinstance(module, CausalLM):
        raise Mistake(
            f"the feed-forward blocks of {type(module).__name__} are found by running it, which needs weights: name "
            "them in its feed_forwards()"
        )
    small = _miniature(module)
    with tiny_run(trainer, small) as run:
        of_kind = {kind_of(block.down): block for block in found_or_declared(small, run)}
    return [
        FeedForward(name, tuple(_moved(up, block.down, name) for up in block.ups))
        for name in prunable_modules(module)
        if (block := of_kind.get(kind_of(name))) is not None
    ]


def _moved(up: str, down: str, to: str) -> str:
    """The name of a layer beside `to` that is where `up` is beside `down`."""
    parts = up.split(".")
    pairs = zip(parts, down.split("."), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return ".".join([*to.split(".")[:shared], *parts[shared:]])


def _miniature(module: CausalLM) -> CausalLM:
    """A module of the same architecture with two layers and few words, which has weights."""
    assert module.model is not None
    config = copy.deepcopy(module.model.config)
    text = config.get_text_config()
    text.num_hidden_layers = min(2, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    text.vocab_size = 64
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    return CausalLM(type(module.model)(config))
