"""Reorders a model's channels so that an N:M pattern loses less, without changing what the model computes.

An N:M pattern keeps N of each M neighbouring inputs, so the order of the inputs decides what it can keep. The order is
free: the model computes the same if all parameters that write some channels and all that read them are reordered alike
(Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021). A decoder has three kinds of such channels: the
residual stream, which all layers share; the channels between the two halves of each MLP; and the channels of each value
head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from thanos_lightning.calibration.batches import BATCHES_PER_BACKWARD
from thanos_lightning.calibration.fisher import counted_predictions, sampled_loss
from thanos_lightning.calibration.inputs import InputStatistics
from thanos_lightning.calibration.outputs import OutputGradients
from thanos_lightning.calibration.outputs import output_weights as weights_of
from thanos_lightning.calibration.tokens import token_mask
from thanos_lightning.models.channels import Channels, exchangeable_channels, reorder
from thanos_lightning.models.targets import PrunableLayer, find_targets, refuse_wrapped
from thanos_lightning.plan.windows import split_by_memory
from thanos_lightning.report.progress import open_phase
from thanos_lightning.solver import NM, Pattern, parse_pattern
from thanos_lightning.solver.admm import weight_costs
from thanos_lightning.solver.linalg import FactorizationError, damped, damping_ladder, exact_arithmetic, inverse_factor
from thanos_lightning.solver.ordering import kept_share, search_order

# The search draws this many rows at random, out of the rows of all layers that read the same channels.
_ROWS = 16384
# Largest error of the logits over their norm: for float32 and float64, and for narrower dtypes. Rounding errs by less.
_TOLERANCE, _TOLERANCE_OF_HALVES = 1e-3, 0.1
_DAMPING = 0.01  # the solver's default


@dataclass(frozen=True)
class Reordered:
    """A set of channels and its new order.

    Attributes:
        channels: The reordered channels.
        order: int64 (size,): new position -> old position.
        kept_before: Share of the scores that the pattern keeps in the old order, of the weights that read the channels.
        kept: Share of the scores that the pattern keeps in the new order.
    """

    channels: Channels
    order: Int[Tensor, " size"]
    kept_before: float
    kept: float


def require_nm(pattern: Pattern | str) -> NM:
    """The pattern as an object. Raise a ValueError if it is not N:M, since channel order matters to N:M only.

    Examples:
        >>> require_nm("2:4")
        NM(n=2, m=4, outlier_fraction=0.0)
    """
    parsed = parse_pattern(pattern) if isinstance(pattern, str) and ":" in pattern else pattern
    if not isinstance(parsed, NM):
        raise ValueError(f"pattern is {pattern!r}: the order of channels matters to N:M only, give one such as 2:4")
    return parsed


def permute_channels(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    pattern: Pattern | str = "2:4",
    *,
    targets: str | Sequence[str] = ("*",),
    ignore: str | Sequence[str] = ("lm_head",),
    memory_gib: float | None = None,
    seed: int = 0,
) -> list[Reordered]:
    """Reorder the channels of a model, in place, so that an N:M pattern keeps weights of a higher total score.

    The score of a weight is g_i W_ij² c_j. c_j is the geometric mean of two costs of a weight of input j: H_jj, if no
    other weight adapts, and 1 / [H⁻¹]_jj, if all others adapt. g_i is the mean square of the loss's gradient at output
    i, for labels that the model draws (calibration/fisher.py). The logits stay the same up to rounding: a check on the
    first batch verifies that. Reorder before a Trainer has the model: optimizers depend on the old order, and so do
    teachers whose hidden states are compared with the model's.

    Args:
        model: A causal LM that is built like Llama's, in any floating dtype, on one device.
        batches: Arguments of the model's forward, such as {"input_ids": (batch, length)}. Padding that an
            attention_mask marks does not count. Some ten thousand tokens are enough.
        pattern: The N:M pattern that the model will be pruned to.
        targets: The layers that will be pruned, as for the callback.
        ignore: The layers that will not be pruned.
        memory_gib: Memory for the second moments of inputs. If those of all targets don't fit, the batches run more
            than once. None holds all at once.
        seed: Seed of the searches.

    Returns:
        The channels that a target reads, with their new orders.

    Raises:
        ValueError: If the pattern is not N:M or fits no channels, if the model is not supported, if there are no
            batches, or if no token reaches a target.
        RuntimeError: If the reordered model computes other logits. The model has its old order then.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> reordered = permute_channels(model, [{"input_ids": torch.arange(8).view(1, 8)}], "2:4")
        >>> all(channels.kept >= channels.kept_before for channels in reordered)
        True
    """
    parsed = require_nm(pattern)
    batches = list(batches)
    if not batches:
        raise ValueError("there are no batches to measure the channels on: give some, such as of the training text")
    refuse_wrapped(model)
    layers = {layer.parameter_name: layer for layer in find_targets(model, targets, ignore).values()}
    read = [
        channels
        for channels in exchangeable_channels(model)
        if any(place.dim == 1 and place.parameter in layers for place in channels.places)
    ]
    fitting = [channels for channels in read if _fits(channels, parsed)]
    if not fitting:
        raise ValueError(
            f"pattern {parsed.name} has no groups that lie within the channels of a {type(model).__name__} (their "
            f"numbers: {', '.join(sorted({str(channels.size) for channels in read}))}): choose a smaller M"
        )
    modes = [(module, module.training) for module in model.modules()]
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    applied: list[Reordered] = []
    try:
        model.eval()
        before = _logits(model, batches[0])
        weights = _output_weights(model, batches, layers.values())
        costs: dict[str, Float[Tensor, " cols"]] = {}
        for window in split_by_memory(list(layers.values()), memory_gib):
            costs |= _costs(model, batches, {layer.name: layer for layer in window})
        # Search all orders before the first change: the scores belong to the old order of inputs
        reordered = []
        with open_phase("Searching for orders", len(fitting), "sets of channels") as phase:
            for channels in fitting:
                reordered.append(_search(channels, layers, costs, weights, parsed, generator))
                phase.advance(note=channels.name)
        for change in reordered:
            reorder(parameters, change.channels, change.order)
            applied.append(change)
        error = _relative_error(_logits(model, batches[0]), before)
        if not error <= (_TOLERANCE if model.dtype in (torch.float32, torch.float64) else _TOLERANCE_OF_HALVES):
            raise RuntimeError(
                f"reordered, the {type(model).__name__} computes other logits, by {error:.1e} of their norm: it is not "
                "built as it seems, and has its old order again. Prune it in that"
            )
    except BaseException:
        for change in applied:
            reorder(parameters, change.channels, change.order.argsort())
        raise
    finally:
        for module, mode in modes:
            module.training = mode
    return reordered


def _fits(channels: Channels, pattern: NM) -> bool:
    """Whether no group of the pattern crosses an edge of the channels, wherever a layer reads them."""
    starts = [start for place in channels.places if place.dim == 1 for start in place.starts]
    return all(number % pattern.m == 0 for number in (channels.size, *starts))


def _search(
    channels: Channels,
    layers: Mapping[str, PrunableLayer],
    costs: Mapping[str, Float[Tensor, " cols"]],
    weights: Mapping[str, Float[Tensor, " rows"]],
    pattern: NM,
    generator: torch.Generator,
) -> Reordered:
    """The best order that the search finds for a set of channels."""
    scores = []
    readers = [place for place in channels.places if place.dim == 1 and place.parameter in layers]
    rows = [layers[place.parameter].rows for place in readers for _ in place.starts]
    share = min(1.0, _ROWS / sum(rows))
    for place in readers:
        layer = layers[place.parameter]
        chosen = torch.randperm(layer.rows, generator=generator, device="cpu")[: max(1, round(share * layer.rows))]
        weight = layer.parameter.detach()
        of_layer = weight.float().square().mul_(costs[layer.name].to(weight.device))
        of_layer *= weights[layer.name].to(weight.device).unsqueeze(1)
        of_layer = of_layer[chosen.to(weight.device)]
        scores += [of_layer[:, start : start + channels.size] for start in place.starts]
    together = torch.cat(scores)
    seed = int(torch.randint(2**31, (), generator=generator, device="cpu"))
    order = search_order(together, pattern, seed=seed)
    return Reordered(
        channels, order, kept_share(together, pattern), kept_share(together[:, order.to(together.device)], pattern)
    )


# Forwards and backwards of the model


def _costs(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], layers: Mapping[str, PrunableLayer]
) -> dict[str, Float[Tensor, " cols"]]:
    """The cost c of each target's inputs, for some of the targets."""
    statistics = InputStatistics(layers)
    statistics.start()
    try:
        with open_phase("Measuring inputs", len(batches), "batches") as phase:
            for batch in batches:
                with statistics.counting(token_mask(batch)):
                    _logits(model, batch)
                phase.advance()
    finally:
        statistics.stop()
    accumulators = statistics.accumulators
    by_accumulator: dict[int, Tensor] = {}
    costs = {}
    for name in layers:
        if name not in accumulators or accumulators[name].num_tokens == 0:
            raise ValueError(
                f"no token of the batches reached layer {name}: give some that count, or add the layer to ignore"
            )
        accumulator = accumulators[name]
        if id(accumulator) not in by_accumulator:
            by_accumulator[id(accumulator)] = cost_of_inputs(name, accumulator.compute())
        costs[name] = by_accumulator[id(accumulator)]
    return costs


def _output_weights(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Any]], layers: Iterable[PrunableLayer]
) -> dict[str, Float[Tensor, " rows"]]:
    """How much an error of each output counts. The outputs of a layer that no gradient reaches count 0."""
    by_name = {layer.name: layer for layer in layers}
    gradients = OutputGradients(by_name)
    gradients.start(of_training=False)
    chosen = list(enumerate(batches))[::BATCHES_PER_BACKWARD]
    try:
        with open_phase("Measuring what outputs count", len(chosen), "batches") as phase:
            for number, batch in chosen:
                logits = _logits(model, batch, differentiable=True)
                with torch.enable_grad():
                    loss = sampled_loss(logits, counted_predictions(batch, logits), seed=number)
                gradients.backward(loss, counts=True)
                phase.advance()
    finally:
        gradients.stop()
    # Scale in float64, since squares of small gradients may leave the normal range of float32
    sums = {name: squares.double() for name, squares in gradients.sums.items()}
    total = sum(float(squares.sum()) for squares in sums.values())
    sums = {name: (squares / max(total, 1e-300)).float() for name, squares in sums.items()}
    none = {name: torch.zeros(layer.rows, dtype=torch.float32, device="cpu") for name, layer in by_name.items()}
    return {**none, **weights_of(sums)}


def cost_of_inputs(name: str, hessian: Float[Tensor, "cols cols"]) -> Float[Tensor, " cols"]:
    """The cost c of one layer's inputs; 0 for inputs that were always zero."""
    with exact_arithmetic(hessian.device):
        for damping in damping_ladder(_DAMPING):
            try:
                cost = weight_costs(hessian, inverse_factor(damped(hessian, damping)), damping)
            except FactorizationError:
                continue
            return cost.masked_fill(hessian.diagonal() == 0, 0)
    raise FactorizationError(
        f"the second moment of the inputs of layer {name} has no inverse with any damping: give more batches, or add "
        "the layer to ignore"
    )


def _logits(model: PreTrainedModel, batch: Mapping[str, Any], *, differentiable: bool = False) -> Tensor:
    arguments = {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    # A caller's autocast would cache copies of the weights, and use them after the reordering
    with exact_arithmetic(model.device), torch.set_grad_enabled(differentiable):
        logits: Tensor = model(**arguments, use_cache=False).logits
    return logits


def _relative_error(found: Tensor, expected: Tensor) -> float:
    difference = torch.linalg.vector_norm((found - expected).float())
    return float(difference / torch.linalg.vector_norm(expected.float()))
