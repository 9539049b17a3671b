from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_mixtures import tiny_mixture
from torch import nn

from thanos_lightning.models.targets import PrunableLayer, find_targets
from thanos_lightning.sharding.replicated import ReplicatedAccess
from thanos_lightning.training.enforcement import MaskEnforcer, ZeroViolationError


def masked(model: nn.Module, *optimizers: torch.optim.Optimizer) -> tuple[MaskEnforcer, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    layers = find_targets(model)
    enforcer = MaskEnforcer(layers, ReplicatedAccess(optimizers=optimizers))
    keeps = {name: torch.rand(layer.rows, layer.cols) > 0.5 for name, layer in layers.items()}
    for name, keep in keeps.items():
        enforcer.set_mask(name, keep)
    return enforcer, keeps


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_weights_and_all_moments_become_zero(amsgrad: bool) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, amsgrad=amsgrad)
    net(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    enforcer, keeps = masked(net, optimizer)
    before = net[0].weight.detach().clone()
    enforcer.enforce(optimizer)
    drop = ~keeps["0"]
    state = optimizer.state[net[0].weight]
    names = {"exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])}
    for tensor in (net[0].weight, *(state[name] for name in names)):
        assert not tensor[drop].any()
    assert torch.equal(net[0].weight[keeps["0"]], before[keeps["0"]])
    enforcer.verify()


def test_nan_and_infinity_become_zero_too() -> None:
    net = model()
    enforcer, keeps = masked(net)
    with torch.no_grad():
        net[0].weight[~keeps["0"]] = float("nan")
        net[1].weight[~keeps["1"]] = -float("inf")
    enforcer.enforce(torch.optim.SGD(net.parameters(), lr=0.1))
    assert torch.isfinite(net[0].weight).all()
    assert not torch.signbit(net[1].weight[~keeps["1"]]).any()


def test_only_the_optimizers_own_layers_are_touched() -> None:
    net = model()
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net)
    enforcer, keeps = masked(net, first, second)
    enforcer.enforce(first)
    assert not net[0].weight[~keeps["0"]].any()
    assert net[1].weight[~keeps["1"]].all()
    with pytest.raises(ZeroViolationError, match=r"pruned entries of 1\.weight \(weight\)"):
        enforcer.verify()
    enforcer.enforce(second)
    enforcer.verify()


def test_gradients() -> None:
    net = model()
    first = torch.optim.SGD(net[0].parameters(), lr=0.1)
    enforcer, keeps = masked(net, first)
    net(torch.randn(3, 8)).square().sum().backward()
    enforcer.mask_gradients(first)
    assert not net[0].weight.grad[~keeps["0"]].any()
    assert net[0].weight.grad[keeps["0"]].any()
    assert net[1].weight.grad[~keeps["1"]].any()
    enforcer.mask_gradients()
    assert not net[1].weight.grad[~keeps["1"]].any()


def test_the_gradient_of_all_experts_is_masked_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny_mixture()
    enforcer, keeps = masked(net)
    net(input_ids=torch.arange(16).unsqueeze(0)).logits.square().sum().backward()
    called = []
    mask_gradient = ReplicatedAccess.mask_gradient

    def counted(access: ReplicatedAccess, drops: Sequence[tuple[PrunableLayer, torch.Tensor]]) -> None:
        called.append(id(drops[0][0].parameter))
        mask_gradient(access, drops)

    monkeypatch.setattr(ReplicatedAccess, "mask_gradient", counted)
    enforcer.mask_gradients()
    layers = find_targets(net)
    assert len(called) == len(set(called)) < len(layers)
    for name, layer in layers.items():
        gradient = layer.own(layer.parameter.grad)
        assert not gradient[~layer.oriented(keeps[name])].any(), name


@pytest.mark.parametrize("what", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [1e-30, -0.0, float("nan")])
def test_each_place_is_verified(what: str, value: float) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    enforcer, keeps = masked(net, optimizer)
    enforcer.enforce(optimizer)
    tensor = net[1].weight.data if what == "weight" else optimizer.state[net[1].weight][what]
    row, col = (~keeps["1"]).nonzero()[0].tolist()
    tensor[row, col] = value
    with pytest.raises(ZeroViolationError, match=rf"1 of \d+ pruned entries of 1\.weight \({what}\)"):
        enforcer.verify()


def test_sparsity_counts_the_layers_without_a_mask() -> None:
    net = model()
    layers = find_targets(net)
    enforcer = MaskEnforcer(layers, ReplicatedAccess())
    assert enforcer.sparsity() == 0.0
    assert enforcer.keep_mask("1") is None
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[0] = False
    enforcer.set_mask("1", keep)
    assert enforcer.sparsity() == pytest.approx(6 / (48 + 24))
    assert torch.equal(enforcer.keep_mask("1"), keep)
    assert enforcer.masked == ["1"]


def test_an_optimizer_without_state_gets_none() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    enforcer, _ = masked(net)
    enforcer.enforce(optimizer)
    assert len(optimizer.state) == 0
