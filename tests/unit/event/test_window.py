from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Alike, counted

from thanos_lightning.collect.collector import Moments
from thanos_lightning.enforcement import MaskEnforcer, ZeroViolationError
from thanos_lightning.event.targets import Targets
from thanos_lightning.event.window import needed_in_order, prune_window
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.plan.schedule import Event
from thanos_lightning.plan.windows import Window
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.owners import assign_owners, sum_on_owners
from thanos_lightning.ranks.talk import PruningError
from thanos_lightning.report.data import LayerReport
from thanos_lightning.solver import NM, Unstructured, prune
from thanos_lightning.solver.layer import SolverOptions
from thanos_lightning.solver.linalg import Curvature, curvature

OPTIONS = SolverOptions.as_published()
pytestmark = pytest.mark.usefixtures("compiling")


def run(model: nn.Module, inputs: torch.Tensor, options: SolverOptions = OPTIONS) -> list[LayerReport]:
    layers = find_targets(model)
    patterns = dict.fromkeys(layers, NM(2, 4))
    reports, _ = prune_window(
        Window(Event(1, 1.0), patterns, 0, 1, is_last=True),
        Targets(layers, patterns),
        Moments(assign_owners(layers, 1), counted(model, inputs)),
        MaskEnforcer(layers, ParameterAccess()),
        options,
    )
    return reports


def test_fewer_tokens_than_inputs_are_warned_of_where_products_of_inputs_count(recwarn: Any) -> None:
    def said(tokens: int, method: str) -> list[str]:
        recwarn.clear()
        model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4))
        run(model, torch.randn(tokens, 64), SolverOptions.as_published(method))
        return [str(one.message) for one in recwarn]

    (text,) = said(6, "thanos")
    assert "2 layer(s) saw fewer tokens than they have inputs, such as 0 (6 for 64)" in text
    assert "give 11 times as many" in text
    (text,) = said(8, "sparsegpt")
    assert "1 layer(s)" in text
    assert not said(64, "thanos")
    assert not said(6, "wanda")
    assert not said(6, "magnitude")


def test_layers_become_what_the_solver_returns_and_share_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branches(nn.ModuleList):
        def forward(self, inputs: Tensor) -> Tensor:
            left, right, after = self
            given: Tensor = right(inputs) + after(left(inputs))
            return given

    widths = []

    def counted(hessian: Tensor, damping: float) -> Curvature:
        widths.append(len(hessian))
        return curvature(hessian, damping)

    monkeypatch.setattr("thanos_lightning.solver.hessian.curvature", counted)
    torch.manual_seed(0)
    model, inputs = Branches([nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)]), torch.randn(50, 8)
    hessians = [2 / 50 * given.T @ given for given in (inputs, inputs, model[0](inputs).detach())]
    expected = [prune(one.weight.detach(), hessian, NM(2, 4)) for one, hessian in zip(model, hessians, strict=True)]
    widths.clear()
    reports = run(model, inputs)
    assert [report.name for report in reports] == ["0", "1", "2"]
    assert len(widths) == 2  # left and right, and after
    for found, wanted, report in zip(model, expected, reports, strict=True):
        torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-4, atol=1e-6)
        assert report.relative_loss == pytest.approx(wanted.relative_loss, rel=1e-3)
        assert report.sparsity == 0.5


def test_broken_weights_are_named_before_the_training() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    MaskEnforcer(find_targets(model), ParameterAccess()).begin()
    with torch.no_grad():
        model[1].weight[3, 4], model[2].weight[0, 0] = float("nan"), float("inf")
    with pytest.raises(PruningError, match=r"the weight of layer 1 \(and 1 more\) holds NaN or Inf before"):
        MaskEnforcer(find_targets(model), ParameterAccess()).begin()


def test_owners_are_balanced_by_cost() -> None:
    layers = find_targets(nn.Sequential(nn.Linear(64, 8), *(nn.Linear(32, 8) for _ in range(8))))
    owners = assign_owners(layers, 2)
    loads = [0, 0]
    for name, owner in owners.items():
        loads[owner] += layers[name].cols ** 3 + 4 * layers[name].rows * layers[name].cols ** 2
    assert max(loads) / sum(loads) < 0.6
    assert set(assign_owners(layers, 1).values()) == {0}
    assert assign_owners(dict(reversed(layers.items())), 2) == owners
    assert sorted(assign_owners(layers, 12).values()) == list(range(9))  # three ranks have none


def test_zeros_of_before_are_held() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 8, bias=False) for _ in range(3)))
    with torch.no_grad():
        model[0].weight[:, ::2] = torch.tensor(-0.0)  # a zero, too
        model[1].weight[0] = 0
        model[1].weight[1, 0] = 0
        model[2].weight.zero_()  # to be trained from 0
    layers, access = find_targets(model), ParameterAccess()
    enforcer = MaskEnforcer(layers, access)
    assert enforcer.hold_zeros() == {"0": Unstructured(64 / 128), "1": Unstructured(17 / 128)}
    assert torch.equal(enforcer.keep_mask("0"), model[0].weight != 0)
    enforcer.verify()
    with torch.no_grad():
        model[1].weight[1] = 0.5
    with pytest.raises(ZeroViolationError, match=r"1 of 17 pruned entries of 1\.weight"):
        enforcer.verify()


class SecondSeesTheSame(Alike):
    """The first of two ranks, of which the other one would say and send what this one does."""

    def __init__(self) -> None:
        super().__init__(world_size=2)
        self.reserved: list[int] = []

    def sum_on(self, owner: int, matrix: Tensor | None, width: int) -> Tensor | None:
        return matrix if owner == self.rank else None

    def total(self, tensor: Tensor) -> Tensor:
        return 2 * tensor

    def reserve(self, sizes: Iterable[int]) -> None:
        self.reserved += sizes


@pytest.mark.parametrize(("stay", "widths"), [(False, [16]), (True, [8, 16])])
def test_sums_that_stay_are_all_reserved_beside_those_of_the_owner(stay: bool, widths: list[int]) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 4))
    layers = find_targets(model)
    sums = dict(counted(model, torch.ones(3, 8)))
    access = SecondSeesTheSame()
    owners = {"0": 0, "1": 0, "2": 1}
    sum_on_owners(layers, sums, dict.fromkeys(layers, 6), owners, access, stay=stay)
    assert sorted(access.reserved) == [4 * width**2 for width in widths]


def test_layers_whose_inputs_get_another_order_need_their_statistics_twice() -> None:
    layers = find_targets(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 2)))
    ordered = {"1": [layers["0"]], "2": [layers["0"]]}
    needed = needed_in_order({"0": 512, "1": 256}, ordered, layers)
    assert needed == {"0": 512, "1": 2 * 5 * 128 + 2 * 4 * 16**2}
