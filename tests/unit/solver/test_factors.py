import torch
from cases import layer

from thanos_lightning.solver import Unstructured, prune
from thanos_lightning.solver.admm import weight_costs
from thanos_lightning.solver.hessian import Factors
from thanos_lightning.solver.layer import SolverOptions, prune_layer

OPTIONS = {"saliency": "balanced", "admm_steps": 4, "refine_steps": 2}


def test_layers_that_share_factors_become_what_each_becomes_alone():
    (weight, H), (other, _) = layer(6, 12), layer(9, 12)
    shared = Factors(H.float())
    shared.kept = True
    for rows in (weight, other, weight):
        together = prune_layer(rows, shared, Unstructured(0.5), SolverOptions(**OPTIONS))
        alone = prune(rows, H.float(), Unstructured(0.5), **OPTIONS)
        assert torch.equal(together.weight, alone.weight)
        assert torch.equal(together.mask, alone.mask)
        assert (together.loss, together.relative_loss) == (alone.loss, alone.relative_loss)


def test_only_what_is_kept_for_another_layer_is_there_again_and_nothing_of_another_damping():
    _, H = layer(1, 8)
    factors = Factors(H)
    assert factors.curvature(0.01) is not factors.curvature(0.01)
    factors.kept = True
    found = factors.curvature(0.01)
    cost = weight_costs(H, found.factor, 0.01)
    shared = factors.penalties(cost, 0.01, 3)
    assert factors.curvature(0.01) is found
    assert factors.penalties(cost, 0.01, 3) is shared
    assert factors.penalties(cost, 0.01, 4).rho != shared.rho
    stronger = factors.curvature(0.1)
    assert not torch.equal(stronger.factor, found.factor)
    # the ladder raised the damping of the factor, by which weights cost something else, and not that of the loss
    assert not torch.equal(factors.penalties(weight_costs(H, stronger.factor, 0.01), 0.01, 4).cost, shared.cost)
    factors.kept = False
    assert factors.curvature(0.1) is stronger  # the last layer that has it
    assert factors.curvature(0.1) is not stronger
