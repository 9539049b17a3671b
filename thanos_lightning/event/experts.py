"""Experts of a window. Experts with few tokens borrow statistics; experts that give tokens the least are dropped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from thanos_lightning.checkpoints.shrink import configuration_with
from thanos_lightning.enforcement import MaskEnforcer
from thanos_lightning.event.targets import Targets, home_of
from thanos_lightning.layers.experts import (
    Mixture,
    find_mixtures,
    keep_experts,
    layout_of,
    matrices_of,
    unknown_experts,
)
from thanos_lightning.layers.lora import collect_merged
from thanos_lightning.layers.targets import Layer, examples, layer_of
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import Failures, Ranks, reserve
from thanos_lightning.ranks.view import View
from thanos_lightning.report.data import LayerReport
from thanos_lightning.solver import Channels, Experts, HessianAccumulator, Pattern
from thanos_lightning.solver.linalg import exact_arithmetic
from thanos_lightning.solver.refine import row_losses

# With fewer tokens for each input, an expert loses less with the mean of the others: benchmarks/experts.py
TOKENS_PER_INPUT = 4

# Before the training


def take_experts(module: LightningModule, layers: Mapping[str, Layer], final: Mapping[str, Pattern]) -> Targets:
    """Replace the layers with the pattern `Experts` by the experts of the module's mixtures.

    Of these layers, those that are no matrix of an expert are not pruned. All mixtures of a model keep the same number
    of experts.

    Raises:
        ValueError: If there are no mixtures, or so many experts can't go. The message says why.
    """
    if any(isinstance(pattern, Channels) for pattern in final.values()):
        raise ValueError(
            "channels and experts can't go in one training: prune one, export the model, and then prune the other"
        )
    asked = {name: pattern for name, pattern in final.items() if isinstance(pattern, Experts)}
    found = find_mixtures(module)
    chosen = {name: mixture for name, mixture in found.items() if any(one.startswith(f"{name}.") for one in asked)}
    if not chosen:
        raise ValueError(_why_none(module, found))
    models = {name for name, part in module.named_modules() if isinstance(part, PreTrainedModel)}
    homes = {home_of(name, models) for name in chosen}
    mixtures = {name: mixture for name, mixture in found.items() if home_of(name, models) in homes}
    downs: dict[str, list[View]] = {}
    for name, mixture in mixtures.items():
        parts = [layer_of(f"{name}.{own}", matrix) for own, matrix in matrices_of(mixture.experts).items()]
        for part in parts:
            is_down = part.name.endswith(".down_proj")
            if (is_down and part.name not in final) or not isinstance(final.get(part.name, Experts(0.5)), Experts):
                why = f"has the pattern {final[part.name].name}" if part.name in final else "is not among the targets"
                raise ValueError(
                    f"experts are dropped from all {len(mixtures)} mixtures of a model, and {part.name} {why}: give "
                    f"all their matrices the pattern 'experts', such as by the target '{name.rpartition('.')[2]}.*'"
                )
            if is_down:
                expert = part.name.removesuffix("down_proj")
                downs[part.name] = [one for one in parts if one.name.startswith(expert) and one is not part]
    pattern = _rounded(mixtures, {asked[name] for name in downs})
    _check_configurations(module, mixtures, pattern, models)
    kept: dict[str, Pattern] = {}
    for name, other in final.items():
        if name in downs:
            kept[name] = pattern
        elif name not in asked:
            kept[name] = other
    return Targets({name: layers[name] for name in kept}, kept, coupled=downs, mixtures=mixtures)


def _why_none(module: LightningModule, found: Mapping[str, Mixture]) -> str:
    if found:
        return (
            "the pattern 'experts' is for mixtures of experts, and no target is a matrix of an expert: add to targets "
            f"{examples(f'{name}.*' for name in found)}"
        )
    for name, experts in module.named_modules():
        if layout_of(experts) is not None:
            return f"no router is known beside the experts {name}, so none of them can be dropped: take another pattern"
    for name, experts in unknown_experts(module):
        kind = type(experts).__name__
        return f"the layout of the experts {name} ({kind}) is not known, so none can be dropped: take another pattern"
    return (
        f"{type(module).__name__} has no mixture of experts that transformers keeps in one parameter, and the pattern "
        "'experts' drops such experts: take another pattern"
    )


def _rounded(mixtures: Mapping[str, Mixture], patterns: set[Experts]) -> Experts:
    if len(patterns) > 1:
        raise ValueError(
            f"mixtures are to lose {' or '.join(sorted(f'{one.sparsity:g}' for one in patterns))} of their experts, "
            "but a model has one number of experts: give one sparsity"
        )
    sizes = {mixture.size: name for name, mixture in mixtures.items()}
    if len(sizes) > 1:
        (size, name), (other, other_name), *_ = sizes.items()
        raise ValueError(
            f"mixtures have unequal numbers of experts ({name} has {size}, {other_name} has {other}), and experts go "
            "in equal number from each: take another pattern"
        )
    (pattern,) = patterns
    for name, mixture in mixtures.items():
        size, groups = mixture.size, mixture.groups
        number = pattern.num_experts(size, groups)
        in_groups = f", in equal number from each of {groups} groups" if groups > 1 else ""
        if not number:
            raise ValueError(
                f"a sparsity of {pattern.sparsity:g} takes {pattern.sparsity * size:g} of the {size} experts of "
                f"{name}{in_groups}, which rounds to none: raise the sparsity to {groups / size:.4g}"
            )
        within = (size - number) // groups * mixture.open_groups if groups > 1 else size - number
        if within < mixture.top_k:
            least = -(-mixture.top_k // (mixture.open_groups if groups > 1 else 1)) * groups
            most = f"lower the sparsity to {(size - least) / size:.4g}" if least < size else "take another pattern"
            of_groups = f", {within} of them in the {mixture.open_groups} groups that are open to it" * (groups > 1)
            raise ValueError(
                f"a sparsity of {pattern.sparsity:g} leaves {size - number} of the {size} experts of {name}{in_groups}"
                f"{of_groups}, fewer than the {mixture.top_k} that its router sends each token to: {most}"
            )
        mixture.check(size - number)
    return Experts(number / size)


def _check_configurations(
    module: LightningModule, mixtures: Mapping[str, Mixture], pattern: Experts, models: set[str]
) -> None:
    """Refuse a model whose configuration can't say how many experts are left: no export could be used."""
    homes = {home_of(name, models): mixture for name, mixture in mixtures.items()}
    for home in homes.keys() & models:
        model, mixture = module.get_submodule(home), homes[home]
        assert isinstance(model, PreTrainedModel)
        number = pattern.num_experts(mixture.size, mixture.groups)
        if configuration_with(model, number, Path(home or type(module).__name__)) is None:
            raise ValueError(
                f"the configuration of {type(model).__name__} has no entry that makes its {mixture.size} experts "
                f"{mixture.size - number}: take another pattern"
            )


# At an event


class Sums(NamedTuple):
    """The statistics of a window, summed over ranks."""

    tokens: dict[str, int]  # layer -> how many have reached it on all ranks
    lent: dict[str, tuple[str, ...]]  # matrix of an expert that lacks tokens -> the matrices that lend it theirs
    of_owner: dict[str, HessianAccumulator]  # of the layers that this rank owns

    def reach(self, name: str) -> bool:
        """Whether there are statistics of a layer."""
        return bool(self.tokens.get(name)) or name in self.lent


def choose_experts(
    mixtures: Mapping[str, Mixture],
    layers: Mapping[str, Layer],
    patterns: Mapping[str, Pattern],
    sums: Sums,
    owners: Mapping[str, int],
    enforcer: MaskEnforcer,
) -> list[tuple[list[str], LayerReport]]:
    """Choose the experts that go from each mixture. All ranks must call it, and return the same, but for seconds.

    Return for each mixture the down layers of the experts that are gone after the event, and its report.

    An expert adds its output, times the router's share, to a token. H of down_proj is made of inputs times that share.
    So ½·tr(W H Wᵀ) of down_proj is the mean, over the expert's tokens, of the squared norm of what the expert adds.
    The experts with the lowest mean go. This is the measure of REAP (arXiv 2510.13999), but with squared norms, and
    without the bias of down_proj. An expert that got no token goes first. An expert that went earlier stays away.

    `layers` are the down layers of the window's experts. Their statistics are taken out of `sums`.
    """
    access, tokens = enforcer.access, sums.tokens
    gone = {name for name in layers if enforcer.is_gone(name)}
    start = time.perf_counter()
    given: dict[str, Tensor] = {}
    failures = Failures(access)
    for name, layer in layers.items():
        weight = collect_merged(layer, owners[name], access)
        counted = sums.of_owner.pop(name, None)
        if weight is not None and counted is not None and tokens[name] and failures.error is None:
            with failures.catching(layer=name), exact_arithmetic(weight.device):
                hessian = counted.compute()
                weight = weight.to(hessian.dtype)
                given[name] = row_losses(torch.zeros_like(weight), weight, hessian).sum()
    failures.raise_together()
    own: list[float] = torch.stack(list(given.values())).tolist() if given else []
    means = access.union(dict(zip(given, own, strict=True)))
    seconds = (time.perf_counter() - start) / max(1, len(layers))
    found = []
    for name, mixture in mixtures.items():
        downs = [f"{name}.{expert}.down_proj" for expert in range(mixture.size)]
        if downs[0] not in layers:
            continue
        pattern = patterns[downs[0]]
        assert isinstance(pattern, Experts)
        going = _least(downs, pattern.num_experts(mixture.size, mixture.groups), mixture.groups, means, gone)
        sums_given = {down: means.get(down, 0.0) * tokens[down] for down in downs}
        lost, whole = sum(sums_given[down] for down in going), sum(sums_given.values())
        sent = sum(tokens[down] for down in downs)
        report = LayerReport(
            name=name,
            shape=(mixture.size, mixture.weights),
            pattern=pattern.name,
            sparsity=len(going) / mixture.size,
            loss=lost / max(1, sent),
            relative_loss=lost / whole if whole else 0.0,
            seconds=seconds * mixture.size,
            tokens=sent,
        )
        found.append((going, report))
    return found


def _least(downs: Sequence[str], number: int, groups: int, means: Mapping[str, float], gone: set[str]) -> list[str]:
    """The down layers of the experts that go, as many from each group; those that are gone already first."""
    width = len(downs) // groups
    going = []
    for first in range(0, len(downs), width):
        group = downs[first : first + width]
        order = sorted(group, key=lambda down: (down not in gone, means.get(down, -1.0)))
        going += [down for down in group if down in order[: number // groups]]
    return going


def drop_experts(
    going: Sequence[str],
    layers: Mapping[str, Layer],
    coupled: Mapping[str, Sequence[View]],
    owners: Mapping[str, int],
    enforcer: MaskEnforcer,
) -> None:
    """Write zeros to all matrices of experts, which have these down layers, and hold them. All ranks must call it."""
    access = enforcer.access
    for name in going:
        for part in (layers[name], *coupled[name]):
            shape, weight, keep = (part.rows, part.cols), None, None
            if owners[name] == access.rank:
                parameter = part.parameter
                weight = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
                keep = torch.zeros(shape, dtype=torch.bool, device=parameter.device)
            enforcer.hold(part.name, access.write(part, weight, keep, owners[name]), part.rows * part.cols)


def route_as_saved(module: nn.Module, masks: Mapping[str, Mapping[str, Any]], ranks: Ranks) -> None:
    """Let routers choose as when a checkpoint was saved, whose masks the ranks have loaded. All ranks must call it."""
    own = [name for name, state in masks.items() if state["pattern"] == "experts"]
    gone = {name for names in ranks.gather(own) for name in names}
    for name, mixture in find_mixtures(module).items():
        downs = {one: layer_of(f"{name}.{one}", matrix) for one, matrix in matrices_of(mixture.experts).items()}
        kept = [one for one in range(mixture.size) if downs[f"{one}.down_proj"].parameter_name not in gone]
        keep_experts(mixture, kept)


# Experts that few tokens have reached, and what they borrow from the other experts of their layer


def lenders(layers: Mapping[str, View], tokens: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """A matrix of an expert with too few tokens -> the same matrix of each expert of the layer that has any tokens.

    The list includes the matrix itself if a token has reached it. If no token has reached any expert of the layer, the
    matrix is missing from the result.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        if layer.part is not None:
            kinds.setdefault(_kind(name), []).append(name)
    reached = {kind: tuple(name for name in names if tokens[name]) for kind, names in kinds.items()}
    return {
        name: reached[kind]
        for kind, names in kinds.items()
        for name in names
        if reached[kind] and tokens[name] < TOKENS_PER_INPUT * layers[name].cols
    }


def _kind(name: str) -> tuple[str, str]:
    experts, _, matrix = name.rsplit(".", 2)
    return experts, matrix


def lend(
    sums: dict[str, HessianAccumulator],
    lent: Mapping[str, tuple[str, ...]],
    layers: Mapping[str, View],
    tokens: Mapping[str, int],
    owners: Mapping[str, int],
    access: ParameterAccess,
) -> None:
    """Fill up the sums of experts that lack tokens, on their owners. All ranks must call it.

    An expert with fewer than `TOKENS_PER_INPUT` tokens per input feature gets the mean x xᵀ of its `lenders` for each
    missing token. `sums` are of `sum_on_owners`, `tokens` are those that all ranks have counted.
    """
    if not lent:
        return
    own = {name for name in lent if owners[name] == access.rank}
    needed = {name: 4 * layers[name].cols ** 2 for name in own}
    widest = max((group[0] for group in lent.values()), key=lambda name: layers[name].cols)
    needed[widest] = needed.get(widest, 0) + 4 * layers[widest].cols ** 2  # the total, on every rank
    reserve(needed, access)
    before: dict[str, HessianAccumulator] = {}
    filled: dict[tuple[object, ...], HessianAccumulator] = {}  # gate and up of an expert share theirs
    of_experts = None
    for group in dict.fromkeys(lent.values()):
        if of_experts != _kind(group[0])[0]:
            of_experts = _kind(group[0])[0]
            before, filled = dict(sums), {}
        counted = [before[name].triangle for name in group if owners[name] == access.rank]
        first = layers[group[0]]
        total = torch.zeros(first.cols, first.cols, device=counted[0].device if counted else first.parameter.device)
        for one in counted:
            total += one
        total = access.total(total)
        total /= sum(tokens[name] for name in group)
        for name in (name for name, others in lent.items() if others == group and name in own):
            counted_here = before.get(name)
            experts = tuple(other.rsplit(".", 2)[1] for other in group)
            key = (experts, name if counted_here is None else id(counted_here))
            if key not in filled:
                enough = TOKENS_PER_INPUT * first.cols
                filled[key] = HessianAccumulator.of_sum(total * (enough - tokens[name]), enough)
                if counted_here is not None:
                    filled[key].triangle.add_(counted_here.triangle)
            sums[name] = filled[key]
