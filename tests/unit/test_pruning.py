from __future__ import annotations

import pytest
import torch
from torch import nn

from thanos_lightning.calibration import InputStatistics
from thanos_lightning.enforcement import MaskEnforcer
from thanos_lightning.planning import Window
from thanos_lightning.pruning import PruningError, SolverOptions, assign_owners, prune_window
from thanos_lightning.report import LayerReport
from thanos_lightning.schedule import Event
from thanos_lightning.sharding.replicated import ReplicatedAccess
from thanos_lightning.solver import NM, Unstructured, prune
from thanos_lightning.targets import find_targets

OPTIONS = SolverOptions("thanos", block_size=128, damping=0.01, refine_steps=0)


def run(model: nn.Module, inputs: torch.Tensor, options: SolverOptions = OPTIONS) -> list[LayerReport]:
    layers = find_targets(model)
    statistics = InputStatistics(layers)
    statistics.start()
    with statistics.counting():
        model(inputs)
    statistics.stop()
    access = ReplicatedAccess()
    return prune_window(
        Window(Event(1, 1.0), dict.fromkeys(layers, NM(2, 4)), 0, 1, is_last=True),
        layers,
        statistics.accumulators,
        access=access,
        enforcer=MaskEnforcer(layers, access),
        options=options,
    )


def test_layers_become_what_the_solver_returns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    inputs = torch.randn(50, 8)
    expected = prune(model[0].weight.detach(), 2 / 50 * inputs.T @ inputs, NM(2, 4), damping=0.01)
    reports = run(model, inputs)
    torch.testing.assert_close(model[0].weight, expected.weight, rtol=1e-4, atol=1e-6)
    assert [report.name for report in reports] == ["0", "2"]
    assert reports[0].relative_loss == pytest.approx(expected.relative_loss, rel=1e-3)
    assert reports[0].sparsity == 0.5


def test_nothing_is_written_when_one_layer_fails() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    before = model[0].weight.detach().clone()
    with pytest.raises(PruningError, match=r"layer 2: .*No layer of this window was changed"):
        run(model, torch.randn(50, 8))
    assert torch.equal(model[0].weight, before)


def test_owners_are_balanced_by_cost() -> None:
    layers = find_targets(nn.Sequential(nn.Linear(64, 8), *(nn.Linear(32, 8) for _ in range(8))))
    owners = assign_owners(layers, 2)
    loads = [0, 0]
    for name, owner in owners.items():
        loads[owner] += layers[name].cols ** 3 + layers[name].rows * layers[name].cols ** 2
    assert max(loads) / sum(loads) < 0.6
    assert set(assign_owners(layers, 1).values()) == {0}
    assert assign_owners(layers, 2) == owners


@pytest.mark.parametrize(
    ("method", "refine", "needs"), [("magnitude", 0, False), ("magnitude", 5, True), ("wanda", 0, True)]
)
def test_what_needs_statistics(method: str, refine: int, needs: bool) -> None:
    assert SolverOptions(method, 128, 0.01, refine).needs_statistics is needs


def test_earlier_masks_are_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    layers, access = find_targets(model), ReplicatedAccess()
    enforcer = MaskEnforcer(layers, access)
    options = SolverOptions("magnitude", 128, 0.01, 0)
    for sparsity in (0.3, 0.6):
        window = Window(Event(1, 1.0), {"0": Unstructured(sparsity)}, 1, 1, is_last=True)
        before = enforcer.keep_mask("0")
        prune_window(window, layers, None, access=access, enforcer=enforcer, options=options)
        with torch.no_grad():  # the weights of the first event come back, large: their mask must win
            model[0].weight += 10 * (model[0].weight == 0)
    keep = enforcer.keep_mask("0")
    assert before is not None
    assert keep is not None
    assert not (keep & ~before).any()
    assert int((~keep).sum()) == int(0.6 * 128)
