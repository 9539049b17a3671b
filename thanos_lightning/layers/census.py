"""Counts a model's weights: those in the layers to prune, and those that stay dense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from thanos_lightning.layers.experts import ExpertMatrix, layout_of
from thanos_lightning.layers.lora import adapters_of, base_of
from thanos_lightning.layers.targets import PRUNABLE, Layer, prunable_modules, uncalled_layers
from thanos_lightning.ranks.view import View, whole_shape


@dataclass
class Census:
    """Counts of a model's weights. A shared weight is counted once, and a sharded weight is counted whole."""

    num_targets: int  # layers to prune
    num_prunable: int  # layers that could be pruned
    prunable: str  # their kinds, such as "Conv1D and Linear"
    target_weights: int = 0  # of the layers to prune
    model_weights: int = 0  # all of them
    # kind -> weights that stay dense; a weight that an earlier kind shares adds 0
    dense: dict[str, int] = field(default_factory=dict)
    adapters: int = 0  # weights of adapters, which are no weights of the model: merged, they are gone
    num_adapted: int = 0  # layers to prune that have an adapter

    @property
    def share(self) -> float:
        """Fraction of the model's weights that are in layers to prune."""
        return self.target_weights / max(1, self.model_weights)

    def shares(self, least: float = 0.01) -> str:
        """List the kinds that stay dense, largest first, with their shares of the model if these are at least `least`.

        Examples:
            >>> Census(1, 1, "Linear", 70, 100, {"norms": 0, "Conv2d": 30}).shares()
            'Conv2d (30%), norms'
        """
        kinds = sorted(self.dense.items(), key=lambda kind: -kind[1])
        total = max(1, self.model_weights)
        return ", ".join(f"{kind} ({size / total:.0%})" if size / total >= least else kind for kind, size in kinds)


def take_census(model: nn.Module, layers: Mapping[str, View]) -> Census:
    """Count the weights of a model, of which `layers` are to be pruned."""
    uncalled = uncalled_layers(model)
    modules = [base_of(module) for name, module in prunable_modules(model).items() if name not in uncalled]
    names = {_name_of(module) for module in modules}
    weights = sum(isinstance(layer, Layer) for layer in layers.values())
    census = Census(weights, len(modules), " and ".join(sorted(names)))
    census.num_adapted = sum(bool(adapters_of(layer)) for layer in layers.values())
    targets: dict[int, int] = {}  # parameter -> its weights in layers to prune, which may be some of its experts
    for layer in layers.values():
        targets[id(layer.parameter)] = targets.get(id(layer.parameter), 0) + layer.rows * layer.cols
    counted: set[int] = set()
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            size = 0 if id(parameter) in counted else math.prod(whole_shape(parameter))
            counted.add(id(parameter))
            if ".lora_" in name:
                census.adapters += size
                continue
            census.model_weights += size
            pruned = min(size, targets.get(id(parameter), 0))
            census.target_weights += pruned
            if pruned < size or id(parameter) not in targets:
                kind = _kind(name, module, parameter_name, parameter)
                census.dense[kind] = census.dense.get(kind, 0) + size - pruned
    return census


def _name_of(module: nn.Module) -> str:
    if isinstance(module, ExpertMatrix):
        return "expert"
    return "Linear" if isinstance(module, nn.Linear) else type(module).__name__


def _kind(name: str, module: nn.Module, parameter_name: str, parameter: Tensor) -> str:
    """Return the kind of a weight that stays dense."""
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention's in_proj"
    if parameter_name == "bias" or parameter_name.endswith("_bias"):
        return "biases"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if "Norm" in kind:
        return "norms"
    if isinstance(module, PRUNABLE):
        return name.rpartition(".")[2]
    if len(whole_shape(parameter)) == 3 and not hasattr(module, "kernel_size"):
        return "fused experts" if layout_of(module) else f"fused experts of an unknown layout ({kind})"
    return kind if hasattr(module, "kernel_size") else f"{kind}.{parameter_name}"
