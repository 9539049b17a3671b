import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn

from thanos_lightning.layers.targets import find_targets
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.choice import check_strategy


def test_other_strategies_are_refused_by_name() -> None:
    with pytest.raises(MisconfigurationException, match=r"strategy FSDPStrategy: .*strategy='ddp'"):
        check_strategy(FSDPStrategy())
    # without torch_xla they can't be made; to isinstance they are DDP and one device
    for kind in (XLAStrategy, SingleDeviceXLAStrategy):
        with pytest.raises(MisconfigurationException, match=f"strategy {kind.__name__}: "):
            check_strategy(kind.__new__(kind))


def test_moments_are_the_state_of_the_weights_shape() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(net.parameters())
    layers = find_targets(net)
    access = ParameterAccess(optimizers=[optimizer])
    assert [piece.what for piece in access.local_tensors(layers["0"])] == ["weight"]
    assert not optimizer.state, "asking made no entry"
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    # of quantised moments, whose code 0 need not mean 0
    optimizer.state[net[0].weight]["state1"] = torch.ones(4, 4, dtype=torch.uint8)
    assert [piece.what for piece in access.local_tensors(layers["0"])] == ["weight", "exp_avg", "exp_avg_sq"]
