"""Finds the blocks of a model, such as decoder layers, and copies one so that it computes on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from thanos_lightning.layers.targets import Layer
from thanos_lightning.layers.wrappers import class_of

_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class Block:
    """A module with several layers to prune, and their names in the model."""

    module: nn.Module
    layers: tuple[str, ...]


def find_blocks(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Block]:
    """Find each block with at least two of the layers, by name.

    A block is an entry of an `nn.ModuleList` that is in no other one. A layer that is outside of the block, too, since
    modules share its weight, is not counted.
    """
    blocks: dict[str, nn.Module] = {}
    lists: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{outer}.") for outer in lists):
            continue
        lists.append(name)
        blocks |= {f"{name}.{number}" if name else number: block for number, block in module.named_children()}
    inside = {name: set(block.modules()) for name, block in blocks.items()}
    found: dict[str, list[str]] = {}
    for layer in layers.values():
        homes = [name for name, modules in inside.items() if not modules.isdisjoint(layer.holders)]
        if len(homes) == 1 and inside[homes[0]].issuperset(layer.holders):
            found.setdefault(homes[0], []).append(layer.name)
    return {name: Block(blocks[name], tuple(own)) for name, own in found.items() if len(own) > 1}


def replica(module: _Module, values: Mapping[str, Tensor]) -> _Module:
    """Copy a module for computing on its own: without hooks, in evaluation mode, with these values as its parameters.

    The copy has its own modules and parameters, and shares all else, buffers and plain attributes. Whatever places the
    module's parameters on several ranks is left behind: hooks, and the class that `fully_shard` derives. `values` are
    whole, in any dtype, by the names of all of the module's parameters.
    """
    parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}
    first: dict[int, nn.Parameter] = {}
    for name, own in module.named_parameters(remove_duplicate=False):
        if name in parameters:
            first.setdefault(id(own), parameters[name])
    return _copied(module, first, {})


def _copied(module: _Module, parameters: Mapping[int, nn.Parameter], done: dict[nn.Module, nn.Module]) -> _Module:
    if module in done:
        return done[module]  # type: ignore[return-value]
    copy: _Module = object.__new__(class_of(module))
    copy.__dict__.update(vars(module))
    for own in ("forward", "_compiled_call_impl"):  # of what places, watches or has compiled this very module
        copy.__dict__.pop(own, None)
    copy.__dict__.update(vars(nn.Module()))  # without hooks
    done[module] = copy
    copy._parameters = {name: None if own is None else parameters[id(own)] for name, own in module._parameters.items()}
    copy._buffers = dict(module._buffers)
    copy._modules = {
        name: None if child is None else _copied(child, parameters, done) for name, child in module._modules.items()
    }
    copy.training = False
    return copy
