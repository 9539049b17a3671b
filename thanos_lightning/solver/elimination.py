"""Chooses the columns that a layer can best do without together: backward elimination on the inverse Hessian.

Legend (W and X_j as in saliency.py):
    V  (cols, cols)  H⁻¹ of the columns that are left
    Q                the columns of a round; W becomes W - W_:Q E, and V becomes V - V_:Q E, with E = V[Q, Q]⁻¹ V[Q, :]

Removing column j adds ‖W_:j‖² / V_jj to twice the loss if all others adapt (Hassibi and Stork, 1993, for a column), and
‖W_:j‖² ‖X_j‖² if none does. The geometric mean of both chose best: of the other tokens that a model will see, the
calibration knows only a part.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from thanos_lightning.solver.linalg import Curvature, cholesky

# Between two looks at the scores, at most so many columns go, and at most this share of those that are to go.
_ROUND, _SHARE = 16, 1 / 32


def eliminate(
    W: Float[Tensor, "rows cols"], curvature: Curvature, first: Bool[Tensor, " cols"], count: int
) -> Bool[Tensor, " cols"]:
    """Choose ``count`` columns, all of ``first`` among them. Each choice takes the earlier ones' updates into account.

    If ``first`` has more than ``count``, it is the choice.
    """
    W, V, gone = W.clone(), curvature.factor.mT @ curvature.factor, first.clone()
    _remove(W, V, first)
    left = count - int(first.count_nonzero())
    at_once = max(1, min(_ROUND, int(_SHARE * left)))
    while left > 0:
        energy = W.square().sum(0)
        scores = (energy * curvature.norms / V.diagonal().sqrt()).masked_fill_(gone, torch.inf)
        chosen = torch.zeros_like(gone)
        chosen[scores.argsort(stable=True)[: min(left, at_once)]] = True
        _remove(W, V, chosen)
        gone |= chosen
        left -= at_once
    return gone


def _remove(W: Float[Tensor, "rows cols"], V: Float[Tensor, "cols cols"], chosen: Bool[Tensor, " cols"]) -> None:
    """Remove columns in place, and let the others adapt."""
    if not chosen.any():
        return
    across = V[:, chosen]
    E = torch.cholesky_solve(across.mT, cholesky(across[chosen]))
    W.addmm_(W[:, chosen], E, alpha=-1)
    V.addmm_(across, E, alpha=-1)
    W[:, chosen] = 0
    V[:, chosen] = 0
    V[chosen] = 0
