from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from tiny_mixtures import tiny_mixture
from torch import Tensor
from toy import Alike

from thanos_lightning.event.experts import TOKENS_PER_INPUT, lend, lenders
from thanos_lightning.layers.targets import Layer, find_targets
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.solver import HessianAccumulator

EXPERTS = "model.layers.0.mlp.experts"
WIDTH = 16
ENOUGH = TOKENS_PER_INPUT * WIDTH
TOKENS = (0, 5, ENOUGH - 1, ENOUGH)  # of each expert


def layers() -> dict[str, Layer]:
    return find_targets(tiny_mixture(number=4, num_hidden_layers=1), targets=["*gate_proj", "*up_proj", "*q_proj"])


def counted() -> tuple[dict[str, HessianAccumulator], dict[str, int]]:
    generator = torch.Generator().manual_seed(0)
    sums, tokens = {}, dict.fromkeys(layers(), 3)
    for expert, number in enumerate(TOKENS):
        own = HessianAccumulator(WIDTH)
        own.update(torch.randn(number, WIDTH, generator=generator))
        for matrix in ("gate_proj", "up_proj"):
            tokens[f"{EXPERTS}.{expert}.{matrix}"] = number
            if number:
                sums[f"{EXPERTS}.{expert}.{matrix}"] = own
    return sums, tokens


def test_experts_with_few_tokens_borrow_from_those_that_have_any() -> None:
    _, tokens = counted()
    found = lenders(layers(), tokens)
    others = tuple(f"{EXPERTS}.{expert}.up_proj" for expert in (1, 2, 3))
    assert {name: of for name, of in found.items() if "up_proj" in name} == {
        f"{EXPERTS}.{expert}.up_proj": others for expert in (0, 1, 2)
    }
    assert not any("q_proj" in name for name in found)
    # where no expert has a token none is lent
    assert lenders(layers(), dict.fromkeys(layers(), 0)) == {}


def test_what_is_lacking_is_the_mean_of_all() -> None:
    sums, tokens = counted()
    before = {name: one.sum for name, one in sums.items()}
    owners = dict.fromkeys(layers(), 0)
    lend(sums, lenders(layers(), tokens), layers(), tokens, owners, ParameterAccess())
    names = [f"{EXPERTS}.{expert}.gate_proj" for expert in range(4)]
    mean = sum(before[name] for name in names[1:]) / sum(TOKENS)
    for name, number in zip(names, TOKENS, strict=True):
        wanted = before.get(name, torch.zeros(WIDTH, WIDTH)) + max(0, ENOUGH - number) * mean
        torch.testing.assert_close(sums[name].sum, wanted)
        assert sums[name].num_tokens == ENOUGH
        if number:  # gate and up share one factor
            assert sums[name] is sums[name.replace("gate", "up")]
    torch.testing.assert_close(sums[names[3]].sum, before[names[3]])


class Other(Alike):
    """One of two ranks, which notes what it reserves; each total is another one."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, world_size=2)
        self.reserved: list[int] = []
        self.totals = itertools.count(1)

    def reserve(self, sizes: Iterable[int]) -> None:
        self.reserved += sizes

    def total(self, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, next(self.totals))


def test_each_layer_has_its_own_mean_where_another_rank_has_all_that_lend() -> None:
    every = find_targets(tiny_mixture(number=2), targets=["*.experts.*"])
    tokens = {name: 0 if ".0." in name.partition("experts")[2] else 1000 for name in every}
    lent = {name: others for name, others in lenders(every, tokens).items() if not tokens[name]}
    owners = {name: 0 if name in lent else 1 for name in every}
    sums: dict[str, HessianAccumulator] = {}
    lend(sums, lent, every, tokens, owners, Other(rank=0))
    assert {len(one.triangle) == every[name].cols for name, one in sums.items()} == {True}
    assert len({float(one.triangle[0, 0]) for one in sums.values()}) == len(sums) == 6


def test_a_rank_that_owns_nothing_reserves_the_total() -> None:
    _, tokens = counted()
    access = Other(rank=1)
    lend({}, lenders(layers(), tokens), layers(), tokens, dict.fromkeys(layers(), 0), access)
    assert access.reserved == [4 * WIDTH**2]
