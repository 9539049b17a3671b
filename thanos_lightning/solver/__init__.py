"""The solver prunes one layer in one process: it takes tensors and returns a pruned layer."""

from thanos_lightning.solver.hessian import HessianAccumulator
from thanos_lightning.solver.layer import PrunedLayer, prune
from thanos_lightning.solver.linalg import FactorizationError, NonFiniteError, SolverError
from thanos_lightning.solver.pattern import NM, Channels, Experts, Pattern, Structured, Unstructured, parse_pattern

__all__ = [
    "NM",
    "Channels",
    "Experts",
    "FactorizationError",
    "HessianAccumulator",
    "NonFiniteError",
    "Pattern",
    "PrunedLayer",
    "SolverError",
    "Structured",
    "Unstructured",
    "parse_pattern",
    "prune",
]
