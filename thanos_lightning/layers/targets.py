"""Which layers of a model are pruned, in which order, and how their weights lie in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from thanos_lightning.layers.experts import ExpertMatrix, matrices_of, unknown_experts
from thanos_lightning.layers.lora import MaskedAdapter, base_of, saved_modules, tuner_layers
from thanos_lightning.ranks.view import View, whole_shape

# or what peft puts in the place of the first two, which has its weight and its bias
PrunableModule: TypeAlias = nn.Linear | Conv1D | ExpertMatrix
PRUNABLE = (nn.Linear, Conv1D)
IGNORED = ("lm_head",)  # by default; not every model has an lm_head


@dataclass(frozen=True)
class Layer(View):
    """A weight matrix that can be pruned, and the modules that multiply by it."""

    # one module, unless layers share the weight; of an expert's matrix, what shows it
    modules: tuple[PrunableModule, ...] = ()

    @property
    def holders(self) -> list[nn.Module]:
        """The modules of the model that have the parameter."""
        return list(self.modules) if self.part is None else [self.holder]

    @property
    def bias(self) -> View | None:
        """The bias of the layer, or None if it has none."""
        if not isinstance(self.modules[0].bias, nn.Parameter):
            return None
        parameter_name = f"{self.parameter_name.removesuffix('.weight')}.bias"
        return View(f"{self.name}.bias", parameter_name, self.holder, "bias", self.rows, 1)


def layer_of(name: str, *modules: PrunableModule) -> Layer:
    """The layer of modules that hold one weight."""
    module = modules[0]
    if isinstance(module, ExpertMatrix):
        parameter_name = f"{name.rsplit('.', 2)[0]}.{module.parameter}{module.part}"
        matrix = parameter_name, module.experts, module.parameter, *module.shape, module.transposed, module.part
        return Layer(name, *matrix, modules)
    parameter_name = f"{name}.base_layer.weight" if isinstance(module, MaskedAdapter) else f"{name}.weight"
    transposed = isinstance(base_of(module), Conv1D)
    shape = whole_shape(module.weight)
    rows, cols = reversed(shape) if transposed else shape
    return Layer(name, parameter_name, module, "weight", rows, cols, transposed, None, modules)


def matches(name: str, expression: str) -> bool:
    """Whether a glob or a `re:` expression matches a module's name.

    A glob may begin at any dot: `lm_head` means `model.lm_head` too, and `*` crosses dots. A regular expression must
    match the whole name. An invalid one raises ValueError.

    Examples:
        >>> matches("model.layers.0.mlp.up_proj", "mlp.*"), matches("model.layers.0.mlp.up_proj", "re:.*[.]0[.].*")
        (True, True)
    """
    if expression.startswith("re:"):
        try:
            return re.fullmatch(expression.removeprefix("re:"), name) is not None
        except re.error as error:
            raise ValueError(f"{expression!r} is not a regular expression ({error}): correct it") from error
    return fnmatchcase(name, expression) or fnmatchcase(name, f"*.{expression}")


def _matching(names: Iterable[str], targets: Sequence[str], ignore: Sequence[str] = ()) -> list[str]:
    """The names that one of the targets matches, and nothing that is ignored."""
    return [
        name
        for name in names
        if any(matches(name, expression) for expression in targets)
        and not any(matches(name, expression) for expression in ignore)
    ]


def check_expressions(argument: str, expressions: str | Sequence[str]) -> tuple[str, ...]:
    """Return the expressions as a tuple, even if only one string was given. If they are none, raise ValueError."""
    if isinstance(expressions, str):  # a lone string would be read letter by letter
        expressions = [expressions]
    if not isinstance(expressions, Sequence):
        raise ValueError(
            f"{argument} is {expressions!r}: give a list of globs or 're:' expressions, such as ['*.mlp.*']"
        )
    for expression in expressions:
        if not isinstance(expression, str) or not expression:
            raise ValueError(f"{argument} holds {expression!r}: give globs or 're:' expressions as strings")
        matches("", expression)  # raises if the expression is invalid
    return tuple(expressions)


def examples(names: Iterable[str]) -> str:
    """List the first three names, for a message."""
    names = list(names)
    shown = ", ".join(names[:3])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 3 else shown or "none"


def did_you_mean(expression: str, names: Iterable[str]) -> str:
    """Suggest the part of a name that is nearest to the expression, or return "" if none is near."""
    parts = {part for name in names for part in name.split(".")}
    found = get_close_matches(expression.removeprefix("re:").strip("*.").rpartition(".")[2], parts, n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _check_ignored(model: nn.Module, expressions: Sequence[str], prunable: Iterable[str]) -> None:
    """Refuse an expression that leaves nothing out. It is most likely misspelt, and what it means would be pruned."""
    for expression in expressions:
        if expression in IGNORED or _matching(prunable, [expression]):
            continue
        meant = _matching(dict(model.named_modules()), [expression])
        if not meant:
            near = did_you_mean(expression, prunable)
            raise ValueError(
                f"ignore {expression!r} matches no layer{near}: correct it or leave it out. The model has: "
                f"{examples(prunable)}"
            )
        if any(layer.startswith(f"{name}.") for name in meant for layer in prunable):
            raise ValueError(
                f"ignore {expression!r} matches {meant[0]}, but none of the layers inside of it, which would be "
                f"pruned: write '{expression}.*'"
            )


def prunable_modules(model: nn.Module) -> dict[str, PrunableModule]:
    """All Linear and Conv1D layers, and matrices of fused experts, by name.

    A layer that peft has adapted is under the name that it had before.
    """
    adapted = {name: base_of(module) for name, module in tuner_layers(model).items()}
    layers = {name: base for name, base in adapted.items() if isinstance(base, PRUNABLE)}
    inside = (*(f"{name}." for name in layers), *saved_modules(model))
    inside += tuple(f"{name}." for name, module in model.named_modules() if _is_router(module))
    found: dict[str, PrunableModule] = {}
    for name, module in model.named_modules():
        if not name.startswith(inside):
            if isinstance(layers.get(name, module), PRUNABLE) and not _is_router(module):
                found[name] = module
            prefix = f"{name}." if name else ""
            found |= {f"{prefix}{matrix}": own for matrix, own in matrices_of(module).items()}
    return found


def _is_router(module: nn.Module) -> bool:
    """Whether it is one of transformers' routers, which are Linear layers in some models and hold one in others."""
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and kind.__name__.endswith(("Router", "MoEV1Gate"))


def uncalled_layers(
    model: nn.Module, targets: str | Sequence[str] = ("*",), ignore: str | Sequence[str] = ()
) -> list[str]:
    """Names of the targets whose inputs can't be collected, because torch's attention reads their weights itself.

    The arguments are as for `find_targets`.
    """
    names = [
        f"{name}.out_proj" if name else "out_proj"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    ]
    return _matching(names, check_expressions("targets", targets), check_expressions("ignore", ignore))


def find_targets(
    model: nn.Module, targets: str | Sequence[str] = ("*",), ignore: str | Sequence[str] = IGNORED
) -> dict[str, Layer]:
    """Find the layers to prune, in the order in which the model registers them. The order is the same on all ranks.

    Prunable layers are `torch.nn.Linear` and transformers' `Conv1D`, except those in `uncalled_layers`, and the
    matrices of experts that transformers keeps in one parameter, such as "…experts.7.down_proj". Layers that share one
    weight are one target. Both arguments are globs or `re:` expressions. Each of `targets` must match at least one
    prunable layer, and each of `ignore` but "lm_head" a module.

    Raises:
        ValueError: If an expression matches nothing, or all of them together do; if layers are quantised,
            reparametrised, or have adapters that can't keep zeros; if a target shares its weight with a module that is
            no target (a tied embedding); if a bare "*" matches a frozen teacher.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(find_targets(model, targets=["0"]))
        ['0']
    """
    targets, ignore = check_expressions("targets", targets), check_expressions("ignore", ignore)
    prunable = prunable_modules(model)
    for name in uncalled_layers(model):
        prunable.pop(name, None)
    for expression in targets:
        _check_known(model, expression)
        if not _matching(prunable, [expression]):
            raise ValueError(
                f"target {expression!r} matches no prunable layer (Linear or Conv1D, but not of nn.MultiheadAttention, "
                f"or experts){did_you_mean(expression, prunable)}. The model has: {examples(prunable)}"
            )
    _check_ignored(model, ignore, prunable)
    chosen = {name: prunable[name] for name in _matching(prunable, targets, ignore)}
    if not chosen:
        raise ValueError(
            f"targets {list(targets)} without ignore {list(ignore)} leave no layer to prune. "
            f"The model has: {examples(prunable)}"
        )
    _refuse_bystanders(model, chosen, targets)
    _check_adapters(chosen)
    _check_weights(chosen)
    return _joined(model, chosen)


def _joined(model: nn.Module, chosen: Mapping[str, PrunableModule]) -> dict[str, Layer]:
    """The layers of these modules. Modules that share a weight are one layer."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    layers: dict[str, Layer] = {}
    joined: set[int] = set()  # weights
    shared: dict[str, str] = {}  # layer -> module that shares its weight but is no target
    experts: dict[tuple[int, int], str] = {}
    for name, module in chosen.items():
        if isinstance(module, ExpertMatrix):
            layers[name] = layer_of(name, module)
            first = experts.setdefault((id(module.weight), layers[name].start), name)
            if first != name:
                raise ValueError(
                    f"layers {first} and {name} share one weight, and see other tokens each: untie the experts, or add "
                    f"{name!r} and all like it to ignore"
                )
            continue
        if id(module.weight) in joined:
            continue
        joined.add(id(module.weight))
        names = holders[id(module.weight)]
        if outside := [other for other in names if other not in chosen]:
            shared[name] = outside[0]
        layers[name] = layer_of(name, *(chosen[other] for other in names if other in chosen))
        if len(layers[name].modules) > 1 and any(isinstance(part, MaskedAdapter) for part in layers[name].modules):
            raise ValueError(
                f"layers {examples(names)} share a weight and have adapters, each of which would be merged into it: "
                f"add {to_add(names)} to ignore, or untie them"
            )
    if shared:
        pairs = [f"layer {name} shares its weight with {outside}" for name, outside in shared.items()]
        raise ValueError(
            f"{examples(pairs)}, which {'are no targets' if len(pairs) > 1 else 'is no target'}: pruning one would "
            f"prune the other. Add {to_add(shared)} to ignore"
        )
    return layers


def _check_known(model: nn.Module, expression: str) -> None:
    """Refuse a target that means experts which would stay dense. A bare "*" means all that can be pruned."""
    for name, experts in unknown_experts(model) if expression != "*" else ():
        if _matching([name, *(f"{name}.{parameter}" for parameter in experts._parameters)], [expression]):
            raise ValueError(
                f"target {expression!r} means {type(experts).__name__} ({name}), experts whose layout is not known: "
                "known are those of transformers 5, such as Mixtral, Qwen-MoE, OLMoE, DeepSeek, gpt-oss and Llama 4. "
                "Leave them out, or make them Linear layers"
            )


def _refuse_bystanders(model: nn.Module, chosen: Mapping[str, PrunableModule], targets: Sequence[str]) -> None:
    """Refuse a bare "*" that matches a teacher beside the trained model."""
    caught = _matching(chosen, ["*"], [other for other in targets if other != "*"])
    roots: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{root}.") or not root for root in roots):
            roots[name] = module
    frozen = {root for root, module in roots.items() if not any(p.requires_grad for p in module.parameters())}
    if len(frozen) < len(roots):
        for root in sorted(frozen):
            if any(name.startswith(f"{root}.") for name in caught):
                raise ValueError(
                    f"target '*' means the layers of {root!r} too, a model of which nothing is trained (a teacher?), "
                    f"beside one that is: add '{root}.*' to ignore, or to targets if you mean it"
                )


def _check_adapters(layers: Mapping[str, PrunableModule]) -> None:
    """Refuse adapters whose merge would write over zeros, or that would not fit what an event makes of their layer."""
    for name, module in layers.items():
        base = base_of(module)
        if isinstance(module, ExpertMatrix) and ".base_layer." in name:
            experts = name.partition(".base_layer.")[0]
            raise ValueError(
                f"the adapter of {experts} is on a parameter of all experts, and would add where they are pruned: give "
                f"peft target_modules without the experts (all-linear has them), or add '{experts}.*' to ignore"
            )
        if base is module:
            continue
        active: list[str] = getattr(module, "active_adapters", [])
        others = [adapter for adapter in getattr(module, "lora_A", {}) if adapter not in active]
        if getattr(module, "merged", False):
            why = "is merged already: call unmerge_adapter(), or merge_and_unload(),"
        elif others:
            why = f"has inactive ones beside it ({', '.join(others)}), which would no longer fit: delete_adapter() them"
        elif isinstance(module, MaskedAdapter) and module.is_plain:
            continue
        elif type(base).__module__.startswith("bitsandbytes"):
            why = f"is on a {type(base).__name__} of bitsandbytes, which can't be pruned: load it in bf16 or fp32"
        else:
            variants = [type(one).__name__ for one in getattr(module, "lora_variant", {}).values()]
            kind = f"{type(module).__module__}.{type(module).__name__}".removeprefix("peft.tuners.")
            why = (
                f"({', '.join([kind, *variants])}) does more than add a product of two matrices, or its layer more "
                "than multiply: take plain LoRA (peft.LoraConfig without use_dora or lora_bias), or merge it before,"
            )
        raise ValueError(f"the adapter of {name} {why} or add {name!r} to ignore")


def _check_weights(layers: Mapping[str, PrunableModule]) -> None:
    stored = {name: base_of(module) for name, module in layers.items() if not isinstance(module, ExpertMatrix)}
    computed = [
        name for name, module in stored.items() if not isinstance(module._parameters.get("weight"), nn.Parameter)
    ]
    if computed:
        raise ValueError(
            f"{len(computed)} target(s) have a weight that is computed, not stored (a parametrisation): "
            f"{examples(computed)}. Remove it first, or add {to_add(computed)} to ignore"
        )
    quantised = [name for name, module in layers.items() if not module.weight.is_floating_point()]
    if quantised:
        raise ValueError(
            f"{len(quantised)} target(s) are quantised, as {quantised[0]} to {layers[quantised[0]].weight.dtype}: load "
            f"the model in bf16 or fp32, or add {to_add(quantised)} to ignore"
        )


def to_add(names: Iterable[str]) -> str:
    """Return what to add to ignore, for a message."""
    names = list(names)
    return " and ".join(map(repr, names)) if len(names) < 3 else "them, or a glob that matches them,"
