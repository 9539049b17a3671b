import copy
from typing import Any

import pytest
import torch
from tiny_mixtures import tiny_mixture
from torch import nn

from thanos_lightning.enforcement import MaskEnforcer, ZeroViolationError
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.ranks.access import ParameterAccess


def masked(model: nn.Module, *optimizers: torch.optim.Optimizer) -> tuple[MaskEnforcer, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    layers = find_targets(model)
    enforcer = MaskEnforcer(layers, ParameterAccess(optimizers=optimizers))
    keeps = {name: torch.rand(layer.rows, layer.cols) > 0.5 for name, layer in layers.items()}
    for name, keep in keeps.items():
        enforcer.set_mask(name, keep)
    return enforcer, keeps


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, enforcer: MaskEnforcer) -> None:
    optimizer.zero_grad()
    net(torch.randn(3, 8)).square().sum().backward()
    enforcer.mask_gradients()
    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    optimizer.step()
    enforcer.enforce(optimizer)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
        (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
        (torch.optim.Adadelta, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.ASGD, {}),
        (torch.optim.Muon, {}),  # the weight of an entry depends on the gradients of others
        (torch.optim.Adafactor, {}),  # so it does here, and its factored moments can't be counted
    ],
    ids=str,
)
def test_moments_stay_zero_without_being_masked(
    kind: type[torch.optim.Optimizer], options: dict[str, Any], steps: int
) -> None:
    torch.manual_seed(0)
    net = model()
    optimizer = kind([layer.weight for layer in net], **options)
    layers, access = find_targets(net), ParameterAccess(optimizers=[optimizer])
    enforcer = MaskEnforcer(layers, access)
    for _ in range(steps):
        step(net, optimizer, enforcer)
    for name, layer in layers.items():
        keep = torch.rand(layer.rows, layer.cols) > 0.5
        drop = access.write(layer, layer.parameter.detach().where(keep, 0), keep, owner=0)
        enforcer.hold(name, drop, int(drop.sum()))
    for _ in range(3):
        step(net, optimizer, enforcer)
        enforcer.verify()
    moments = [piece for layer in layers.values() for piece in access.local_tensors(layer) if piece.what != "weight"]
    assert kind is torch.optim.Adafactor or any(piece.tensor.any() for piece in moments)


def test_weights_become_zero_and_nothing_else_is_touched() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    enforcer, keeps = masked(net, optimizer)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict()["state"])
    enforcer.enforce(optimizer)
    for name, keep in keeps.items():
        before[f"{name}.weight"].masked_fill_(~keep, 0)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


def test_only_the_optimizers_own_layers_are_touched() -> None:
    net = model()
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in net)
    enforcer, keeps = masked(net, first, second)
    net(torch.randn(3, 8)).square().sum().backward()
    enforcer.enforce(first)
    enforcer.mask_gradients(first)
    for own, other in ((net[0].weight, net[1].weight), (net[0].weight.grad, net[1].weight.grad)):
        assert not own[~keeps["0"]].any()
        assert own[keeps["0"]].any()
        assert other[~keeps["1"]].any()
    with pytest.raises(ZeroViolationError, match=r"pruned entries of 1\.weight \(weight\)"):
        enforcer.verify()
    enforcer.enforce(second)
    enforcer.verify()
    enforcer.mask_gradients()
    assert not net[1].weight.grad[~keeps["1"]].any()


def test_the_gradient_of_all_experts_is_masked_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    net = tiny_mixture()
    enforcer, keeps = masked(net)
    net(input_ids=torch.arange(16).unsqueeze(0)).logits.square().sum().backward()
    called, mask_gradient = [], ParameterAccess.mask_gradient

    def counted(access: ParameterAccess, drops: Any) -> None:
        called.append(id(drops[0][0].parameter))
        mask_gradient(access, drops)

    monkeypatch.setattr(ParameterAccess, "mask_gradient", counted)
    enforcer.mask_gradients()
    layers = find_targets(net)
    assert len(called) == len(set(called)) < len(layers)
    for name, layer in layers.items():
        gradient = layer.part_of(layer.parameter.grad)
        assert not gradient[~layer.oriented(keeps[name])].any(), name


@pytest.mark.parametrize("what", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [1e-30, -0.0, float("nan")])
def test_each_place_is_verified(what: str, value: float) -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    enforcer, keeps = masked(net, optimizer)
    step(net, optimizer, enforcer)
    enforcer.verify()
    tensor = net[1].weight.data if what == "weight" else optimizer.state[net[1].weight][what]
    row, col = (~keeps["1"]).nonzero()[0].tolist()
    tensor[row, col] = value
    with pytest.raises(ZeroViolationError, match=rf"1 of \d+ pruned entries of 1\.weight \({what}\)"):
        enforcer.verify()
