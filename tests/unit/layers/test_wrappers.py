from __future__ import annotations

from functools import wraps

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from thanos_lightning.layers.wrappers import compile_in_place, compiled_calls, run_eagerly


class Own(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        for part in self:
            inputs = part(inputs)
        return inputs


class OwnLinear(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight, self.bias)


def model_of(
    counter: CompileCounter, sequence: type[nn.Sequential] = Own, linear: type[nn.Linear] = OwnLinear
) -> nn.Module:
    inner = torch.compile(sequence(nn.Linear(4, 4), nn.ReLU()), backend=counter)
    head = torch.compile(linear(4, 2), backend=counter)
    return nn.ModuleDict({"list": nn.ModuleList([inner]), "head": head})


def test_wrappers_go_and_graphs_stay() -> None:
    torch.manual_seed(0)
    counter = CompileCounter()
    model, inputs = model_of(counter), torch.randn(3, 4)
    before = model["head"](model["list"][0](inputs))
    assert "list.0._orig_mod.0.weight" in model.state_dict()
    compile_in_place(model)
    assert list(model.state_dict()) == ["list.0.0.weight", "list.0.0.bias", "head.weight", "head.bias"]
    assert [module for module, _ in compiled_calls(model)] == [model["list"][0], model["head"]]
    after = model["head"](model["list"][0](inputs))
    assert torch.equal(after, before)
    assert counter.frame_count == 2  # of before; none of them was traced again
    compile_in_place(model)
    assert [module for module, _ in compiled_calls(model)] == [model["list"][0], model["head"]]


def test_modules_of_classes_of_torch_stay_compiled() -> None:
    counter = CompileCounter()
    model, inputs = model_of(counter, nn.Sequential, nn.Linear), torch.randn(3, 4)
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
