"""Finds all that the channels of feed-forward blocks own, to prune them as units or to give them another order."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from thanos_lightning.checkpoints.format import Size
from thanos_lightning.checkpoints.shrink import resized
from thanos_lightning.collect.tiny_input import tiny_run
from thanos_lightning.event.experts import take_experts
from thanos_lightning.event.targets import Targets, home_of
from thanos_lightning.layers.feedforward import (
    FeedForward,
    check_feed_forwards,
    find_feed_forwards,
    in_any_order,
    kind_of,
)
from thanos_lightning.layers.lora import MaskedAdapter, base_of
from thanos_lightning.layers.targets import Layer, examples, find_targets, layer_of, prunable_modules
from thanos_lightning.plan.options import ModelSize
from thanos_lightning.ranks.view import View, whole_shape
from thanos_lightning.solver import NM, Channels, Experts, Pattern


@dataclass(frozen=True)
class Width:
    """What is asked of the width at which feed-forward blocks end."""

    multiple_of: int  # it is a multiple of this
    size: ModelSize | None  # what the model may have then; None if the pattern has a share
    dense: Size  # of an export without pruning

    def rounded(self, pattern: Channels, width: int, weights: int) -> Channels:
        """The pattern with the width that fits. A channel of all blocks has so many weights.

        Raises:
            ValueError: If none fits.
        """
        if width % self.multiple_of:
            raise ValueError(
                f"multiple_of is {self.multiple_of}, which does not divide the {width} channels of a feed-forward "
                "block: give a number that does, such as "
                f"{max(n for n in range(1, self.multiple_of + 1) if width % n == 0)}"
            )
        kept = self._of_share(pattern, width) if self.size is None else self._of_size(self.size, width, weights)
        return Channels((width - kept) / width)

    def _of_share(self, pattern: Channels, width: int) -> int:
        kept = round((1 - pattern.sparsity) * width / self.multiple_of) * self.multiple_of
        if (1 - pattern.sparsity) * width < self.multiple_of:
            raise ValueError(
                f"a sparsity of {pattern.sparsity:g} leaves {(1 - pattern.sparsity) * width:g} of {width} channels, "
                f"fewer than {self.multiple_of} (multiple_of): lower one of them"
            )
        if kept == width:
            raise ValueError(
                f"a sparsity of {pattern.sparsity:g} takes {pattern.sparsity * width:g} of {width} channels, which "
                f"rounds to none in multiples of {self.multiple_of} (multiple_of): raise the sparsity, or lower "
                "multiple_of"
            )
        return kept

    def _of_size(self, size: ModelSize, width: int, weights: int) -> int:
        dense, bytes_each = self.dense
        fitting = width - (dense - size.in_weights(bytes_each)) / weights
        kept = math.floor(fitting / self.multiple_of) * self.multiple_of
        if kept < self.multiple_of:
            least = size.like_this(dense - (width - self.multiple_of) * weights, bytes_each)
            raise ValueError(
                f"{size.in_words()}, and with {self.multiple_of} of {width} channels (multiple_of) the model still has "
                f"{least}: give at least {least}"
            )
        if kept >= width:
            has = size.like_this(dense, bytes_each)
            raise ValueError(f"{size.in_words()}, and the dense model has no more than {has}: give less")
        return kept


def choose_targets(
    module: LightningModule,
    layers: Mapping[str, Layer],
    final: Mapping[str, Pattern],
    target_width: Width,
    find: Callable[[], Sequence[FeedForward]],
) -> Targets:
    """The targets of a training: layers, or feed-forward blocks or experts where their patterns ask for these.

    `find` returns the module's feed-forward blocks.

    Raises:
        ValueError: If channels or experts can't be taken out of the model. The message says why.
    """
    kinds = {type(pattern) for pattern in final.values()}
    if Experts in kinds:
        return take_experts(module, layers, final)
    if Channels in kinds:
        return take_channels(module, find(), layers, final, target_width)
    return Targets(layers, final)


def proven_blocks(trainer: Trainer, module: LightningModule) -> list[FeedForward]:
    """Find the feed-forward blocks of the module, and check them by a run. All ranks must call it."""
    with tiny_run(trainer, module) as run:
        blocks = found_or_declared(module, run)
        check_feed_forwards(module, blocks, run, found=getattr(module, "feed_forwards", None) is None)
    return blocks


def take_channels(
    module: LightningModule,
    blocks: Sequence[FeedForward],
    layers: Mapping[str, Layer],
    final: Mapping[str, Pattern],
    target_width: Width,
) -> Targets:
    """Replace the layers with the pattern `Channels` by feed-forward blocks of the module.

    Of these layers, those that are no down layer of a block are not pruned. All blocks of a model keep the same number
    of channels. Warn if the model's configuration has no entry for that, so that an export can't make it smaller.

    Raises:
        ValueError: If there are no blocks, or the channels can't be taken out of the model. The message says why.
    """
    if not blocks:
        raise ValueError(_why_none(module))
    downs = {block.down for block in blocks}
    asked = {name: pattern for name, pattern in final.items() if isinstance(pattern, Channels)}
    chosen = {name: pattern for name, pattern in asked.items() if name in downs}
    for name in chosen:
        if len(layers[name].modules) > 1:
            raise ValueError(_shared(name))
    _check_all_taken(module, blocks, chosen, final)
    if len(set(chosen.values())) > 1:
        raise ValueError(
            f"feed-forward blocks are to lose {' or '.join(sorted({f'{p.sparsity:g}' for p in chosen.values()}))} of "
            "their channels, but a model has one width: give one sparsity"
        )
    widths = {name: layers[name].cols for name in chosen}
    if len(set(widths.values())) > 1:
        narrow, wide = min(widths, key=lambda name: widths[name]), max(widths, key=lambda name: widths[name])
        raise ValueError(
            f"feed-forward blocks have unequal widths ({narrow} has {widths[narrow]}, {wide} has {widths[wide]}), and "
            "channels go in equal number from each: take another pattern"
        )
    ups = {up: block.down for block in blocks for up in block.ups if block.down in chosen}
    coupled: dict[str, list[View]] = {name: [] for name in chosen}
    for name, layer in find_targets(module, [f"re:{re.escape(up)}" for up in ups], ignore=()).items():
        if len(layer.modules) > 1:
            raise ValueError(_shared(name))
        coupled[ups[name]] += [part for part in (layer, layer.bias) if part is not None]
    width = next(iter(widths.values()))
    weights = sum(layers[name].rows + sum(part.rows * part.cols for part in coupled[name]) // width for name in chosen)
    pattern = target_width.rounded(next(iter(chosen.values())), width, weights)
    kept = {
        name: pattern if name in chosen else other
        for name, other in final.items()
        if name not in asked or name in chosen
    }
    targets = Targets({name: layers[name] for name in kept}, kept, coupled)
    _warn_if_fixed(module, targets)
    return targets


def with_reordered(targets: Targets, trainer: Trainer, module: LightningModule) -> Targets:
    """Add the channels that may get another order: those of feed-forward blocks whose down layer gets N:M.

    All ranks must call it. If there are none, the reason is added.
    """
    blocks: list[FeedForward] = []
    why = "no target with N:M is the down layer of a feed-forward block that computes the same in another order"
    try:
        with tiny_run(trainer, module) as run:
            blocks = in_any_order(module, found_or_declared(module, run), run)
    except ValueError as error:
        why = str(error).rpartition(": ")[0] or str(error)  # what follows is how to mend it
    except Exception as error:  # whatever a model raises: the training can do without another order
        why = f"the search for feed-forward blocks ended in {type(error).__name__}"
    blocks, why = trainer.strategy.broadcast((blocks, why))
    holders = Counter(id(parameter) for part in module.modules() for parameter in part.parameters(recurse=False))
    reordered: dict[str, list[View]] = {}
    for block in blocks:
        down, ups = module.get_submodule(block.down), {up: module.get_submodule(up) for up in block.ups}
        pattern = targets.final.get(block.down)
        if (
            isinstance(pattern, NM)
            and targets.layers[block.down].cols % pattern.m == 0
            and all(_is_plain(part, holders) for part in (down, *ups.values()))
        ):
            layers = [layer_of(name, part) for name, part in ups.items()]
            reordered[block.down] = [part for layer in layers for part in (layer, layer.bias) if part is not None]
    return replace(targets, reordered=reordered, keeps_order=None if reordered else why)


def _is_plain(module: nn.Module, holders: Mapping[int, int]) -> bool:
    """Whether a layer is a product with its weight and no more, and shares neither weight nor bias."""
    module = base_of(module) if isinstance(module, MaskedAdapter) else module  # what is added is merged before
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    has_own_forward = "forward" in vars(module) or type(module).forward not in (nn.Linear.forward, Conv1D.forward)
    return (
        names <= {"weight", "bias"}
        and not has_own_forward
        and all(holders[id(parameter)] == 1 and parameter.is_floating_point() for parameter in module.parameters())
    )


def found_or_declared(module: LightningModule, run: Callable[[], Any]) -> list[FeedForward]:
    """The feed-forward blocks that a module declares, or else those that a small input shows."""
    declared = getattr(module, "feed_forwards", None)
    return find_feed_forwards(module, run) if declared is None else list(declared())


def _check_all_taken(
    module: LightningModule, blocks: Sequence[FeedForward], chosen: Mapping[str, Pattern], final: Mapping[str, Pattern]
) -> None:
    names = list(prunable_modules(module))
    kinds = {kind_of(part) for block in blocks for part in (block.down, *block.ups)}
    found = {part for block in blocks for part in (block.down, *block.ups)}
    if unlike := [name for name in names if kind_of(name) in kinds and name not in found]:
        raise ValueError(
            f"{len(unlike)} layer(s), such as {unlike[0]}, are named like those of feed-forward blocks but are none "
            "(an expert that no token reached? a layer that is never called?), and a model has one width: take another "
            "pattern"
        )
    if not chosen:
        raise ValueError(
            "the pattern 'channels' is for feed-forward blocks, and no target is the down layer of one: add to targets "
            f"{examples([block.down for block in blocks])}"
        )
    ups = {up: block.down for block in blocks for up in block.ups if block.down in chosen}
    for name, pattern in final.items():
        if name in ups and not isinstance(pattern, Channels):
            raise ValueError(
                f"layer {name} has the pattern {pattern.name}, but its rows are channels of {ups[name]} and go with "
                "them: give it the pattern 'channels', too, or add it to ignore"
            )
    models = {name for name, part in module.named_modules() if isinstance(part, PreTrainedModel)}
    homes = {home_of(name, models) for name in chosen}
    left = [block.down for block in blocks if block.down not in chosen and home_of(block.down, models) in homes]
    if left:
        why = f"has the pattern {final[left[0]].name}" if left[0] in final else "is not among the targets"
        raise ValueError(
            f"channels are taken from all {len(chosen) + len(left)} feed-forward blocks or from none, since a model "
            f"has one width, and {left[0]} {why}: give all of them the pattern 'channels'"
        )


def _warn_if_fixed(module: LightningModule, targets: Targets) -> None:
    """Warn if a model's configuration can't say how many channels are left."""
    models = {name: part for name, part in module.named_modules() if isinstance(part, PreTrainedModel)}
    for home in sorted({home_of(name, models) for name in targets.coupled} & models.keys()):
        prefix = f"{home}." if home else ""
        shapes = {name: list(whole_shape(value)) for name, value in models[home].state_dict(keep_vars=True).items()}
        widths = (0, 0)
        for name, parts in targets.coupled.items():
            pattern, width = targets.final[name], targets.layers[name].cols
            assert isinstance(pattern, Channels)
            widths = (width, width - pattern.num_columns(width))
            for part in (targets.layers[name], *parts):
                if part.parameter_name.startswith(prefix) and home_of(part.name, models) == home:
                    shape = shapes[part.parameter_name.removeprefix(prefix)]
                    dim = (part.name == name) != part.transposed
                    shape[dim] = shape[dim] // widths[0] * widths[1]
        if resized(models[home], shapes, widths) is None:
            rank_zero_warn(
                f"the configuration of {type(models[home]).__name__} has no entry that makes its feed-forward blocks "
                f"{widths[1]} channels wide: an export has to keep its shape (--keep-shape), and be no faster"
            )


def _shared(name: str) -> str:
    return (
        f"layer {name} of a feed-forward block shares its weight with another layer, whose channels would go, too: "
        "take another pattern"
    )


def _why_none(module: LightningModule) -> str:
    fused = next(
        (
            name
            for name, parameter in module.named_parameters()
            if len(whole_shape(parameter)) == 3 and whole_shape(parameter)[0] > 1 and "conv" not in name.lower()
        ),
        None,
    )
    if fused is not None:
        return (
            f"the model has experts fused into one parameter, such as {fused}, whose channels can't be pruned yet: "
            "take another pattern for its other layers"
        )
    return (
        f"no feed-forward block was found in {type(module).__name__} (an up layer, called once, each row of which is "
        "read by one column of a down layer alone): if it has some, name them in a method feed_forwards() of it that "
        "returns a list of FeedForward(down, ups), or take another pattern"
    )
