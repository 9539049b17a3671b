from dataclasses import replace

import pytest
import torch
from cases import hessian_of, layer

from thanos_lightning.solver import Channels, Structured, prune
from thanos_lightning.solver.hessian import Factors
from thanos_lightning.solver.linalg import FactorizationError
from thanos_lightning.solver.thanos import eliminate


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_it_loses_less_than_columns_that_are_chosen_alone(sparsity):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 20, generator=generator) @ torch.randn(20, 60, generator=generator)
    inputs += 0.3 * torch.randn(500, 60, generator=generator)
    weight = torch.randn(40, 60, generator=generator)
    together, alone = (prune(weight, hessian_of(inputs), kind(sparsity)) for kind in (Channels, Structured))
    assert together.loss < 0.96 * alone.loss


def test_large_layers_go_in_rounds_and_keep_the_count():
    weight, H = layer(8, 700)
    first = torch.zeros(700, dtype=torch.bool)
    first[::10] = True
    gone = eliminate(weight, Factors(H.float()).curvature(1.0), first, 600)
    assert int(gone.sum()) == 600
    assert gone[first].all()


def test_single_frozen_weights_make_no_column_go():
    weight, H = layer(4, 10)
    frozen = torch.zeros(4, 10, dtype=torch.bool)
    frozen[0] = True
    mask = prune(weight, H, Channels(0.3), frozen=frozen).mask
    assert not mask[0].any()
    assert int((~mask[1:]).all(0).sum()) == 3


def test_columns_that_can_not_be_told_apart_are_an_error():
    nothing = replace(Factors(torch.eye(2)).curvature(0.01), factor=torch.zeros(2, 2))
    with pytest.raises(FactorizationError, match="not positive"):
        eliminate(torch.ones(2, 2), nothing, torch.tensor([True, False]), 1)
