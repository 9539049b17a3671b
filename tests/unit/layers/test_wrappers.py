from __future__ import annotations

from functools import wraps

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from thanos_lightning.layers.wrappers import compile_in_place, compiled_calls, run_eagerly


def model_of(counter: CompileCounter) -> nn.Module:
    inner = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), backend=counter)
    head = torch.compile(nn.Linear(4, 2), backend=counter)
    return nn.ModuleDict({"list": nn.ModuleList([inner]), "head": head})


def test_modules_of_classes_of_torch_stay_compiled() -> None:
    counter = CompileCounter()
    model, inputs = model_of(counter), torch.randn(3, 4)
    compile_in_place(model)
    for _ in range(2):
        model["head"](model["list"][0](inputs))
    assert counter.frame_count == 2


def test_only_what_compile_itself_has_made_is_put_aside() -> None:
    class Decorated(nn.Linear):
        @torch.compile(backend="eager")  # type: ignore[untyped-decorator]
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs)

    bound = Decorated(2, 2)
    vars(bound)["forward"] = bound.forward  # as Lightning's redirection of a forward leaves it
    wrapped = nn.Linear(2, 2)
    compiled = torch.compile(wrapped.forward, backend="eager")
    wrapped.forward = wraps(compiled)(lambda inputs: 2 * compiled(inputs))  # as accelerate's hooks do
    root = nn.ModuleList([bound, wrapped])
    assert not list(compiled_calls(root))
    wrapped.forward = compiled
    assert list(compiled_calls(root)) == [(wrapped, "forward")]
    undo = run_eagerly(root)
    assert wrapped.forward is compiled._torchdynamo_orig_callable
    undo()
    assert wrapped.forward is compiled


def test_what_is_compiled_anew_meanwhile_stays_so() -> None:
    model = nn.Linear(2, 2)
    model.compile(backend="eager")
    undo = run_eagerly(model)
    assert model._compiled_call_impl is None
    model.compile(backend="eager")
    anew = model._compiled_call_impl
    undo()
    assert model._compiled_call_impl is anew


def test_a_wrapper_with_hooks_of_its_own_is_refused() -> None:
    model = model_of(CompileCounter())
    model["list"][0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'list.0' is a wrapper of torch.compile that has hooks .* add them to"):
        compile_in_place(model)
