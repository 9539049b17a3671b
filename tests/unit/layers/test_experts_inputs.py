"""What experts are seen to get and to give, against what the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_mixtures import MIXTURES, tiny_mixture
from torch import Tensor
from toy import counted, started

from thanos_lightning.collect.outputs import OutputGradients
from thanos_lightning.layers.targets import Layer, find_targets


def experts_of(model: Any) -> dict[str, Layer]:
    return {name: layer for name, layer in find_targets(model).items() if layer.part is not None}


def tokens(batch: int = 3, length: int = 16) -> Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(3))


def gradients_of(model: Any, batch: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_training_step_is_what_it_was(family: str) -> None:
    model = tiny_mixture(family)
    logits, wanted = model(input_ids=tokens()).logits, gradients_of(model, tokens())
    statistics = started(model)
    outputs = OutputGradients(statistics.layers)
    outputs.start()
    with statistics.counting():
        torch.testing.assert_close(model(input_ids=tokens()).logits, logits)
        for name, gradient in gradients_of(model, tokens()).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
    outputs.stop()
    statistics.stop()
    assert torch.equal(model(input_ids=tokens()).logits, logits)  # by transformers' own forward again
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", MIXTURES)
def test_moments_of_down_layers_tell_what_their_errors_do(family: str) -> None:
    """The outputs are linear in these weights: an error ΔW changes them by tr(ΔW Σ x xᵀ ΔWᵀ) in square."""
    model = tiny_mixture(family).double()
    model.set_experts_implementation("eager")  # the others know no float64
    layers = {name: layer for name, layer in experts_of(model).items() if name.endswith("down_proj")}
    found = counted(model, tokens())
    assert len(found.keys() & layers.keys()) > 4
    for name, layer in list(layers.items())[-8:]:  # all experts of the last layer
        given: list[Tensor] = []
        handle = layer.holders[0].register_forward_hook(lambda *call, to=given: to.append(call[2].detach().clone()))
        model(input_ids=tokens())
        error = torch.randn(layer.rows, layer.cols, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            layer.part_of(layer.parameter).add_(layer.oriented(error))
            model(input_ids=tokens())
            layer.part_of(layer.parameter).sub_(layer.oriented(error))
        handle.remove()
        changed = float((given[1] - given[0]).square().sum())
        if name not in found:
            assert changed == 0  # no token goes there
            continue
        told = float(((error @ found[name].sum.double()) * error).sum())
        assert told == pytest.approx(changed, rel=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_of_one_token_inputs_and_gradients_are_the_factors_of_the_weights_gradient(family: str) -> None:
    model = tiny_mixture(family)
    layers = experts_of(model)
    statistics = started(model)
    outputs = OutputGradients(statistics.layers)
    outputs.start()
    with statistics.counting():
        model(input_ids=tokens(1, 1)).logits.square().sum().backward()
    reached = {name: moments for name, moments in statistics.accumulators.items() if name in layers}
    matrices = len({name.rpartition(".")[2] for name in layers})
    moe_layers = len({name.partition("experts")[0] for name in layers})
    assert len(reached) == (1 if family == "llama 4" else 2) * matrices * moe_layers  # by the chosen experts alone
    for name, moments in reached.items():
        layer, squares = layers[name], outputs.sums[name]
        assert layer.parameter.grad is not None
        gradient = layer.oriented(layer.part_of(layer.parameter.grad))
        assert moments.num_tokens == 1
        torch.testing.assert_close(gradient.T @ gradient, squares.sum() * moments.sum, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(gradient.square().sum(1), squares * moments.sum.trace(), rtol=1e-3, atol=1e-7)


def test_inputs_count_as_much_as_the_routers_share_of_them() -> None:
    model = tiny_mixture()
    routed: dict[str, tuple[Tensor, ...]] = {}
    for name, module in model.named_modules():
        if name.endswith("experts"):
            module.register_forward_pre_hook(lambda _, args, name=name: routed.update({name: args}))
    found = counted(model, tokens())
    for name in found.keys() & experts_of(model).keys():
        moments, (experts, expert, matrix) = found[name], name.rsplit(".", 2)
        hidden, chosen, shares = routed[experts]
        at, place = (chosen == int(expert)).nonzero(as_tuple=True)
        assert moments.num_tokens == len(at)
        if matrix == "down_proj":
            continue
        weighted = hidden[at] * shares[at, place].unsqueeze(1)
        torch.testing.assert_close(moments.sum, (weighted.T @ weighted).detach(), rtol=1e-4, atol=1e-6)
        assert moments is found[f"{experts}.{expert}.gate_proj"]  # gate and up share one sum


@pytest.mark.parametrize("family", ["mixtral", "llama 4"])
def test_padding_does_not_count(family: str) -> None:
    model, batch = tiny_mixture(family), tokens()
    mask = torch.ones_like(batch, dtype=torch.bool)
    mask[1, 9:] = False
    mask[2] = False
    found, *sums = (
        counted(model, shown, mask=kept) for kept, shown in ((mask, batch), (None, batch[:1]), (None, batch[1:2, :9]))
    )
    for name in experts_of(model).keys() & found.keys():
        whole, parts = found[name], [one[name] for one in sums if name in one]
        assert whole.num_tokens == sum(part.num_tokens for part in parts)
        if parts:
            torch.testing.assert_close(whole.sum, sum(part.sum for part in parts), rtol=1e-3, atol=1e-4)
