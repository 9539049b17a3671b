import pytest
import torch

from thanos_lightning.collect import outputs
from thanos_lightning.collect.outputs import LOSS_PER, sampled_loss


@pytest.fixture(autouse=True, params=[700, 1_000_000])
def _chunk(request, monkeypatch):
    monkeypatch.setattr(outputs, "TOKENS_PER_CHUNK", request.param)


def test_gradients_have_the_fisher_matrix_for_a_moment():
    number = 50_000
    scores = torch.tensor([1.0, 0.0, -1.0, 0.5])
    logits = scores.expand(1, number, 4).clone().requires_grad_()
    sampled_loss(logits, torch.ones(1, number, dtype=torch.bool), seed=1).backward()
    gradients = logits.grad[0].double() * LOSS_PER  # of the loss of each token
    p = scores.double().softmax(0)
    torch.testing.assert_close(gradients.mean(0), torch.zeros(4, dtype=torch.float64), atol=0.01, rtol=0)
    moment = gradients.T @ gradients / number
    torch.testing.assert_close(moment, p.diag() - p.outer(p), atol=0.005, rtol=0)


def test_only_tokens_that_count_have_gradients():
    some = torch.rand(2, 5) < 0.5
    some[0, 0], some[1, 4] = True, False
    for counted in (some, torch.zeros(2, 5, dtype=torch.bool)):
        logits = torch.randn(2, 5, 7, requires_grad=True)
        loss = sampled_loss(logits, counted, seed=1)
        loss.backward()
        assert torch.equal(logits.grad.abs().sum(-1) > 0, counted)
    assert loss.item() == 0


def test_tokens_of_a_short_batch_count_as_others_do():
    """Squares of gradients are summed batch by batch: they may not depend on how tokens are put into batches."""
    scores = torch.tensor([0.5, 0.0, -0.5])
    moments = []
    for number in (40, 20_000):
        logits = scores.expand(1, number, 3).clone().requires_grad_()
        for seed in range(20_000 // number):
            counted = torch.ones(1, number, dtype=torch.bool)
            sampled_loss(logits, counted, seed=seed).backward()
            moments.append(logits.grad.square().sum((0, 1)))
            logits.grad = None
    of_short, of_long = torch.stack(moments[:-1]).sum(0), moments[-1]
    torch.testing.assert_close(of_short, of_long, rtol=0.2, atol=0)


def test_draws_are_those_of_the_seed_and_touch_no_others():
    logits, counted = torch.randn(2, 50, 7, requires_grad=True), torch.ones(2, 50, dtype=torch.bool)
    state = torch.get_rng_state()
    first, again, other = (sampled_loss(logits, counted, seed=seed).item() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again != other


def test_the_backward_keeps_no_copy_of_the_logits_in_float32():
    logits = torch.randn(1, 3000, 50, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.dtype) or tensor, lambda t: t):
        sampled_loss(logits, torch.ones(1, 3000, dtype=torch.bool), seed=1)
    assert torch.float32 not in kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, counted = torch.randn(2, 50, 7).to(dtype), torch.ones(2, 50, dtype=torch.bool)
    loss = sampled_loss(logits, counted, seed=1)
    assert loss.dtype == torch.float32
    assert loss.item() == sampled_loss(logits.float(), counted, seed=1).item()
