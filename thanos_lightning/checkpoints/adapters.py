"""LoRA adapters in a trainer checkpoint: merged into the weights of an export, or written beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from thanos_lightning.checkpoints.foreign import inside
from thanos_lightning.checkpoints.lazy import LazyTensors
from thanos_lightning.layers.lora import Adapted, MaskedAdapter, saved_modules
from thanos_lightning.layers.targets import layer_of

_BASE, _SAVED, _ORIGINAL = ".base_layer.", ".modules_to_save.", ".original_module."
_PARTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class _LayerNote:
    transposed: bool
    scales: dict[str, float]


@dataclass(frozen=True)
class AdaptersNote:
    """The types of what `adapters_note` returns."""

    layers: dict[str, _LayerNote]
    configs: dict[str, dict[str, Any]]
    saved: dict[str, list[str]]


def adapters_note(model: nn.Module) -> dict[str, Any]:
    """What an export has to know of the adapters that keep zeros in a model; plain values.

    Returns layers: {layer name: {transposed, scales: {adapter name: scale}}}, configs: {adapter name: what peft would
    save}, and saved: as `saved_modules`. All are empty without adapters.
    """
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, MaskedAdapter):
            layer = layer_of(name, module)
            scales = {rank.name: rank.scale for rank in module.low_ranks()}
            layers[name] = {"transposed": layer.transposed, "scales": scales}
    configs: dict[str, Any] = {}
    for module in model.modules():
        by_adapter = getattr(module, "peft_config", None)
        if isinstance(by_adapter, Mapping):
            values = {name: config.to_dict() for name, config in by_adapter.items()}
            configs |= json.loads(json.dumps(values, default=_in_json))
    return {"layers": layers, "configs": configs if layers else {}, "saved": saved_modules(model)}


def _in_json(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, (set, frozenset)) else str(value)


def adapted_name(layer: str, note: Mapping[str, Any]) -> str:
    """The name of the module that holds a layer's weight in a checkpoint with this note."""
    return f"{layer}{_BASE[:-1]}" if layer in note["adapters"]["layers"] else layer


def plain_name(name: str) -> str:
    """The name that a parameter had before peft put an adapter on its layer.

    Examples:
        >>> plain_name("model.layers.0.mlp.up_proj.base_layer.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    return name.replace(_BASE, ".")


def merge_adapters(weights: Mapping[str, Tensor], adapters: Mapping[str, Any], *, keep: bool = False) -> LazyTensors:
    """Return the weights under the names of a model without adapters; what these add is added where a weight isn't 0.

    `weights` are those of the model with adapters, which `adapters` of `adapters_note` describe. `keep` leaves the
    adapters out instead, as with `write_adapters`.
    """
    layers: Mapping[str, Any] = adapters["layers"]
    merged: dict[str, Callable[[], Tensor]] = {}
    replaced: dict[str, Callable[[], Tensor]] = {}
    for name in weights:
        value = partial(weights.__getitem__, name)
        layer = name.partition(_BASE)[0]
        if name.partition(".lora_")[0] in layers and ".lora_" in name:
            continue
        if _ORIGINAL in name:
            merged.setdefault(name.replace(_ORIGINAL, "."), value)
        elif _SAVED in name:  # a copy that peft has trained in the place of the original
            before, _, after = name.partition(_SAVED)
            copy, _, rest = after.partition(".")
            if copy in adapters["saved"].get(f"{before}.", ()):
                replaced[f"{before}.{rest}"] = value
        elif not keep and layer in layers and name == f"{layer}{_BASE}weight":
            merged[plain_name(name)] = partial(_effective, layer, weights, layers[layer])
        else:
            merged[plain_name(name)] = value
    return LazyTensors(merged | replaced)


def _effective(layer: str, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> Tensor:
    weight = weights[f"{layer}{_BASE}weight"]
    matrices = {adapter: [_part(layer, part, adapter, weights) for part in _PARTS] for adapter in about["scales"]}
    added = [(down, up * about["scales"][adapter]) for adapter, (down, up) in matrices.items()]
    whole = Adapted(weight.t() if about["transposed"] else weight, added).merged()
    return (whole.t() if about["transposed"] else whole).contiguous()


def _part(layer: str, part: str, adapter: str, weights: Mapping[str, Tensor]) -> Tensor:
    name = f"{layer}.{part}.{adapter}.weight"
    if name not in weights:
        raise ValueError(f"the checkpoint lacks {name}, which its note names: it is damaged, give another one")
    return weights[name]


def write_adapters(
    folder: Path, weights: Mapping[str, Tensor], adapters: Mapping[str, Any], checkpoint: Path
) -> list[str]:
    """Write each adapter as peft does, into a folder of its name. Return the names; there has to be one."""
    names = sorted({adapter for about in adapters["layers"].values() for adapter in about["scales"]})
    if not names:
        raise ValueError("the checkpoint has no LoRA adapter of a pruned layer to keep: leave out --keep-adapter")
    for adapter in names:
        target = inside(folder, adapter, checkpoint)
        target.mkdir()
        save_file(
            {
                f"base_model.model.{layer}.{part}.weight": _part(layer, part, adapter, weights).contiguous()
                for layer, about in adapters["layers"].items()
                if adapter in about["scales"]
                for part in _PARTS
            },
            target / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        # The adapter is for these weights, which have the trained copies, and not for those before the training
        changed = {"inference_mode": True, "base_model_name_or_path": None, "modules_to_save": None}
        config = {**adapters["configs"].get(adapter, {}), **changed}
        (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    return names
