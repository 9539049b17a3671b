from __future__ import annotations

import torch
from torch import nn

from thanos_lightning.layers.blocks import find_blocks, replica
from thanos_lightning.layers.targets import find_targets


def test_a_list_in_a_block_a_layer_alone_and_layers_of_several_blocks_make_no_block() -> None:
    def block() -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])})

    layers = nn.ModuleList([block(), block()])
    shared = nn.Linear(4, 4)
    alone = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
    sharing = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(nn.Linear(4, 4), shared)])
    model = nn.ModuleDict({"layers": layers, "alone": alone, "sharing": sharing})
    assert list(find_blocks(model, find_targets(model))) == ["layers.0", "layers.1"]


def test_a_replica_keeps_what_is_tied_and_what_is_plain() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale = nn.Linear(3, 3), 2.0
            self.again = nn.ModuleDict({"first": self.first, "second": nn.Linear(3, 3)})
            self.again["second"].weight = self.first.weight
            self.register_buffer("shift", torch.ones(3))

    module, calls = Tied(), []
    module.first.register_forward_hook(lambda *_: calls.append("a hook"))
    copied = replica(module, {name: value.detach().clone() for name, value in module.named_parameters()})
    assert copied.again["first"] is copied.first
    assert copied.first.weight is copied.again["second"].weight is not module.first.weight
    assert copied.scale == 2.0
    assert copied.shift is module.shift
    assert copied.first(torch.ones(3)).equal(module.first(torch.ones(3)))
    assert len(calls) == 1, "hooks are the model's own"
    assert module.training
    assert not any(part.training for part in copied.modules())
