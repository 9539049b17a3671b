import math

import pytest
import torch
import toy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thanos_lightning.collect.outputs import OutputGradients
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.ranks.access import ParameterAccess


def started(model: nn.Module) -> OutputGradients:
    gradients = OutputGradients(find_targets(model))
    gradients.start()
    return gradients


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def expected(model: nn.Sequential, batches: list[Tensor]) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for batch in batches:
        hidden = model[0](batch)
        out = model[2](model[1](hidden))
        for name, one in zip(("0", "2"), torch.autograd.grad(out.square().sum(), (hidden, out)), strict=True):
            sums[name] = sums.get(name, 0) + one.square().reshape(-1, one.shape[-1]).sum(0)
    return sums


def test_sums_are_those_of_autograd_over_all_batches() -> None:
    model, batches = small(), [torch.randn(3, 5, 8), torch.randn(7, 8), torch.randn(8)]
    gradients = started(model)
    with torch.no_grad():
        model(batches[0])
    model(batches[0])
    assert gradients.sums == {}, "forwards without a backward count nothing"
    for batch in batches:
        model(batch).square().sum().backward()
    gradients.stop()
    seconds = gradients.stopwatch.seconds()
    assert seconds > 0
    model(batches[0]).square().sum().backward()  # after the window
    assert gradients.stopwatch.seconds() == seconds
    torch.testing.assert_close(gradients.sums, expected(model, batches))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_each_token_once(use_reentrant: bool) -> None:
    model, batch, calls = small(), torch.randn(5, 8), []
    model[0].register_forward_pre_hook(lambda *call: calls.append(call))
    gradients, inputs = started(model), toy.started(model)
    with inputs.counting():
        given = batch.clone().requires_grad_()
        checkpoint(model, given, use_reentrant=use_reentrant).square().sum().backward()
    gradients.stop()
    inputs.stop()
    assert len(calls) == 2, "the forward was not recomputed: the test shows nothing"
    torch.testing.assert_close(gradients.sums, expected(model, [batch]))
    assert {one.num_tokens for one in inputs.accumulators.values()} == {5}


def test_summing_leaves_the_training_as_it_is() -> None:
    inputs = torch.randn(3, 8)
    found = []
    for watched in (False, True):
        model = small()
        if watched:
            started(model)
        (model(inputs) ** 2).sum().backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_gradients_that_are_not_finite_are_left_out() -> None:
    model, batch = small(), torch.randn(4, 8)
    gradients = started(model)
    model(batch).square().sum().backward()
    before = {name: one.clone() for name, one in gradients.sums.items()}
    for scale in (math.inf, math.nan, 1e30):  # of which the last overflows when it is squared
        (model(batch).sum() * scale).backward()
    torch.testing.assert_close(gradients.sums, before)


def test_half_precision_is_summed_in_float32() -> None:
    model = small().to(torch.bfloat16)
    gradients = started(model)
    for _ in range(300):
        model(torch.ones(4, 8, dtype=torch.bfloat16)).sum().backward()
    assert gradients.sums["2"].dtype == torch.float32
    torch.testing.assert_close(gradients.sums["2"], torch.full((4,), 1200.0))


def test_no_output_is_worth_nothing() -> None:
    gradients = OutputGradients(find_targets(small()))
    gradients.load({"0": torch.tensor([0.0, 0, 0, 0, 0, 6]), "2": torch.tensor([1e-30, 0, 0, 0])})
    weights = gradients.weights(ParameterAccess())
    torch.testing.assert_close(weights["0"], torch.tensor([0.01, 0.01, 0.01, 0.01, 0.01, 6.01]))
    assert (weights["2"] > 0).all()


def test_a_backward_of_its_own_touches_no_parameter() -> None:
    model, batches = small(), [torch.randn(3, 8), torch.randn(5, 8)]
    model[0].requires_grad_(False)
    model[2].weight.grad = torch.ones(4, 6)
    gradients = OutputGradients(find_targets(model))
    gradients.start(of_training=False)
    for number, batch in enumerate([*batches, torch.randn(4, 8)]):
        gradients.backward(model(batch).square().sum(), counts=number < 2)
    gradients.stop()
    assert torch.equal(model[2].weight.grad, torch.ones(4, 6))
    assert model[2].bias.grad is None
    model[0].requires_grad_(True)
    torch.testing.assert_close(gradients.sums, expected(model, batches))  # of the frozen layer, too


def test_a_scaled_loss_counts_as_the_loss_that_it_is() -> None:
    model, batches = small(), [torch.randn(3, 5, 8), torch.randn(7, 8)]
    gradients = started(model)
    scales: list[float | Tensor] = [2.0**16, torch.tensor(2.0**15)]
    for batch, scale in zip(batches, scales, strict=True):
        gradients.begin(scale)
        (scale * model(batch).square().sum()).backward()
    torch.testing.assert_close(gradients.sums, expected(model, batches))


class Falcon(nn.Module):
    """A block that writes in place on what its layers give, as transformers' Falcon does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.side = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.down(torch.relu_(self.up(inputs)))
        found += self.side(inputs)
        return found


@pytest.mark.parametrize("of_training", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8)])
def test_outputs_that_a_model_writes_on_have_their_gradient_from_before(
    shape: tuple[int, ...], of_training: bool
) -> None:
    torch.manual_seed(0)
    model, inputs = Falcon(), torch.randn(shape)
    gradients = OutputGradients(find_targets(model))
    gradients.start(of_training=of_training)
    loss = model(inputs).square().sum()
    if of_training:
        loss.backward()
    else:
        gradients.backward(loss, counts=True)
    gradients.stop()
    up, side = model.up(inputs).detach().requires_grad_(), model.side(inputs).detach().requires_grad_()
    down = model.down(torch.relu(up))
    wanted = torch.autograd.grad((down + side).square().sum(), (up, down, side))
    sums = (one.square().flatten(end_dim=-2).sum(0) for one in wanted)
    torch.testing.assert_close(gradients.sums, dict(zip(("up", "down", "side"), sums, strict=True)))
