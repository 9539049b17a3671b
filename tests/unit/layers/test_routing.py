from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_mixtures import MIXTURES, tiny_mixture
from torch import nn

from thanos_lightning.layers.experts import Mixture, find_mixtures, keep_experts

KEPT = {"of all": [0, 2, 3, 4, 6, 7], "as many as each token gets, by groups": [1, 2, 5, 7]}


def mixture_of(model: nn.Module) -> Mixture:
    return next(iter(find_mixtures(model).values()))


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("family", MIXTURES)
def test_a_router_chooses_as_that_of_a_model_without_the_other_experts(family: str, kept: list[int]) -> None:
    mixture, smaller = mixture_of(tiny_mixture(family)), mixture_of(tiny_mixture(family, len(kept)))
    own = {**dict(mixture.router.named_parameters()), **dict(mixture.router.named_buffers())}
    smaller.router.load_state_dict({name: value[kept] for name, value in own.items()})
    mixture.check(len(kept))
    keep_experts(mixture, kept)
    hidden = torch.randn(32, 16)
    given, expected = mixture.router(hidden), smaller.router(hidden)
    numbers = torch.tensor(kept)
    gone = [expert for expert in range(8) if expert not in kept]
    logits, wanted = (given[0], expected[0]) if mixture.gives_numbers else (given[1], expected[1])
    assert torch.equal(logits[:, kept], wanted)
    assert logits[:, gone].eq(-torch.inf).all()
    if mixture.gives_numbers:
        assert torch.equal(given[1], expected[1])
        assert torch.equal(given[2], numbers[expected[2]])
    else:
        assert torch.equal(given[0][:, kept], expected[0])
        assert given[0][:, gone].eq(0).all()


def test_the_rows_of_kept_experts_are_trained_and_no_others() -> None:
    mixture = mixture_of(tiny_mixture())
    keep_experts(mixture, [1, 4, 6])
    logits, shares, _ = mixture.router(torch.randn(16, 16))
    (logits.softmax(-1).square().sum() + shares.square().sum()).backward()  # of auxiliary losses, and of the output
    gradient: Any = mixture.router.weight.grad  # type: ignore[union-attr]
    assert gradient.isfinite().all()
    assert gradient.any(1).tolist() == [expert in (1, 4, 6) for expert in range(8)]


def test_all_experts_are_chosen_again() -> None:
    model = tiny_mixture()
    before = model(torch.arange(16).view(1, 16)).logits
    for kept in ([0, 1, 2], range(8)):
        for mixture in find_mixtures(model).values():
            keep_experts(mixture, list(kept))
        after = model(torch.arange(16).view(1, 16)).logits
        assert torch.equal(after, before) == (len(kept) == 8)


def test_a_copy_of_the_model_has_a_router_of_its_own() -> None:
    model = tiny_mixture()
    for mixture in find_mixtures(model).values():
        keep_experts(mixture, [0, 1, 2])
    copied = copy.deepcopy(model)
    ids = torch.arange(16).view(1, 16)
    before = copied(ids).logits
    with torch.no_grad():
        mixture_of(model).router.weight.zero_()  # type: ignore[operator, union-attr]
    assert torch.equal(copied(ids).logits, before)
    assert not torch.equal(model(ids).logits, before)


def test_a_router_that_gives_something_else_is_refused() -> None:
    model: Any = tiny_mixture()
    model.model.layers[0].mlp.gate = nn.Linear(16, 8, bias=False)
    model.model.layers[0].mlp.gate.top_k = 2
    with pytest.raises(ValueError, match=r"the router model.layers.0.mlp.gate \(Linear\) gives something else"):
        mixture_of(model).check(4)
