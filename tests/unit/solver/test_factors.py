import pytest
import torch
from cases import layer

from thanos_lightning.solver import Unstructured, prune
from thanos_lightning.solver.hessian import Factors
from thanos_lightning.solver.layer import SolverOptions, prune_layer

OPTIONS = {"saliency": "balanced", "admm_steps": 4, "refine_steps": 2}


@pytest.mark.filterwarnings("ignore:the Hessian is not positive definite")  # so that more damping is tried
@pytest.mark.parametrize("H", [layer(6, 12)[1], torch.full((12, 12), -1.01 / 11).fill_diagonal_(1.0)])
def test_layers_that_share_factors_become_what_each_becomes_alone(H):
    weight, other = layer(6, 12)[0], layer(9, 12)[0]
    shared = Factors(H.float())
    shared.kept = True
    for rows in (weight, other, weight):
        together = prune_layer(rows, shared, Unstructured(0.5), SolverOptions(**OPTIONS))
        alone = prune(rows, H.float(), Unstructured(0.5), **OPTIONS)
        assert torch.equal(together.weight, alone.weight)
        assert torch.equal(together.mask, alone.mask)
        assert (together.loss, together.relative_loss) == (alone.loss, alone.relative_loss)
