import torch
from cases import layer

from thanos_lightning.solver import Unstructured, prune
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
    factors = Factors(layer(1, 8)[1])
    factors.kept = True
    weak, strong = factors.curvature(0.01), factors.curvature(0.1)
    assert not torch.equal(weak.factor, strong.factor)
    weak, strong = (factors.penalties(torch.ones(8), damping, 2) for damping in (0.01, 0.1))
    assert not torch.equal(weak.first, strong.first)
    strong = factors.curvature(0.1)
    factors.kept = False
    assert factors.curvature(0.1) is strong  # the last layer that has it
    assert factors.curvature(0.1) is not strong
