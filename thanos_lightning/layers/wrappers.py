"""Modules on which `torch.compile` was called, without the wrappers that change their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.external_utils import wrap_inline


def compile_in_place(root: nn.Module) -> None:
    """Turn `parent.child = torch.compile(child)` inside of `root` into `child.compile()`, with the same options.

    A wrapper puts `_orig_mod.` into the names of what is in it. Compiled in place, a module keeps its names, and has
    the same graph. A module of torch's own class (nn.Sequential) that has run before is traced once more. The module
    still loads what was saved under the wrapper's names. Raises ValueError if a wrapper has hooks, which would be lost.
    """
    for name, parent in list(root.named_modules()):
        for child_name, child in parent._modules.items():
            if isinstance(child, OptimizedModule):
                if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks:
                    where = f"{name}.{child_name}".removeprefix(".")
                    raise ValueError(
                        f"{where!r} is a wrapper of torch.compile that has hooks of its own, which would be lost: add "
                        f"them to the module that it wraps, or compile that in place ({child_name}.compile())"
                    )
                inner: nn.Module = child._orig_mod
                call = inner._call_impl
                if inspect.isfunction(getattr(child.forward, "_torchdynamo_orig_callable", None)):
                    # A class of torch's own (nn.Sequential). The wrapper traces a function that calls the module, since
                    # torch traces no file of its own: before torch 2.14 the bare call would run uncompiled
                    call = wrap_inline(call)
                inner._compiled_call_impl = child.dynamo_ctx(call)
                inner.register_load_state_dict_pre_hook(_without_wrapper)  # type: ignore[no-untyped-call]
                parent._modules[child_name] = inner


def _without_wrapper(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename what was saved while the module was wrapped."""
    wrapped = f"{prefix}_orig_mod."
    for name in [name for name in state_dict if name.startswith(wrapped)]:
        state_dict[prefix + name.removeprefix(wrapped)] = state_dict.pop(name)


def compiled_calls(root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Module and attribute of each function that `torch.compile` made of a module's call, forward or training step."""
    for module in root.modules():
        if module._compiled_call_impl is not None:
            yield module, "_compiled_call_impl"
        for attribute in ("forward", "training_step"):
            function = vars(module).get(attribute)
            # Not methods, nor what wraps a compiled function: these only show the attributes of what is in them
            if getattr(function, "_torchdynamo_wrapper_id", None) == id(function):
                yield module, attribute


def run_eagerly(root: nn.Module) -> Callable[[], None]:
    """Let the compiled modules in `root` run as plain Python. Return what undoes it, after which the same graphs run.

    torch's stance "force_eager" alone can be overridden within a training step.
    """
    stance = torch.compiler.set_stance("force_eager")  # for what is compiled outside of modules
    changed = []
    for module, attribute in list(compiled_calls(root)):
        own = vars(module)
        function = own[attribute]
        own[attribute] = None if attribute == "_compiled_call_impl" else function._torchdynamo_orig_callable
        changed.append((own, attribute, function, own[attribute]))

    def undo() -> None:
        for own, attribute, function, plain in changed:
            if own.get(attribute) is plain:  # else it was compiled again, or is no longer
                own[attribute] = function
        stance.__exit__(None, None, None)

    return undo


_Module = TypeVar("_Module", bound=nn.Module)


def class_of(module: _Module) -> type[_Module]:
    """A module's own class: fully_shard puts another before it."""
    return next(kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed."))
