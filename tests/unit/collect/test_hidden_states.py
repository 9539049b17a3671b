from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from toy import batch, tiny_llama

from thanos_lightning.collect.hidden_states import HiddenStates, Reference, SharedStates, collect_calls
from thanos_lightning.collect.tokens import token_mask
from thanos_lightning.layers.blocks import find_blocks
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.ranks.access import ParameterAccess

NONE = "no hidden states (batch, length, width) first, but"
MODE = "torch.inference_mode, whose tensors can't be trained on"


def resolved(value: Any, states: HiddenStates) -> Any:
    return apply_to_collection(value, Reference, lambda one: states.others[one.digest])


def of(model: nn.Module, steps: int = 64) -> HiddenStates:
    blocks = find_blocks(model, find_targets(model))
    states = HiddenStates({name: block.module for name, block in blocks.items()}, steps)
    states.start()
    return states


def llama(steps: int = 64) -> tuple[Any, HiddenStates]:
    model = tiny_llama().eval()
    return model, of(model, steps)


def test_a_block_gets_what_the_one_before_gave() -> None:
    model, states = llama()
    seen: list[Tensor] = []
    handle = model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    inputs = batch()
    with states.recording(0, None):
        logits = model(**inputs, use_cache=True).logits
    handle.remove()
    first, second = (states.calls[f"model.layers.{index}"][0] for index in (0, 1))
    assert second.inputs is first.outputs, "kept once"
    torch.testing.assert_close(second.inputs.float(), seen[0], rtol=1e-2, atol=1e-3)
    assert second.inputs.dtype == torch.bfloat16
    assert second.dtype == torch.float32
    assert second.computes_in is None
    plain = (type(None), bool, tuple, Reference)  # and no cache
    assert all(isinstance(value, plain) for value in (*first.kwargs.values(), *second.kwargs.values()))
    states.stop()
    with torch.no_grad():  # what was recorded is all that the block takes
        block = model.model.layers[1]
        kwargs = resolved(second.kwargs, states)
        given = block(second.inputs.float(), *resolved(second.args, states), **kwargs)
        head = model.lm_head(model.model.norm(given))
    torch.testing.assert_close(head, logits, rtol=5e-2, atol=2e-2)


def test_nothing_is_recorded_outside_of_a_recording_or_of_another_rank() -> None:
    model, states = llama()
    model(**batch())
    states.stop()
    with states.recording(1, None):
        model(**batch())
    assert states.calls == {}


def test_as_many_batches_are_recorded_as_the_steps_take() -> None:
    for numbers, ranks, taken in ((range(8), 1, [0, 1, 2, 3]), (range(1, 8, 2), 2, [1, 3])):  # each rank has its share
        model, states = llama(steps=4)
        for number in numbers:
            with states.recording(number, None, ranks=ranks):
                model(**batch())  # one step has up to 64 such sequences
        assert list(states.calls["model.layers.0"]) == taken


def test_the_mask_of_tokens_and_the_other_inputs_are_kept_once() -> None:
    model, states = llama()
    for number, padding in enumerate((2, 2, 0)):
        inputs = batch(padding)
        with states.recording(number, lambda inputs=inputs: token_mask(inputs)):  # type: ignore[misc]
            model(**inputs)
    calls = states.calls["model.layers.1"]
    assert calls[0].counted == calls[1].counted
    assert calls[2].counted is None
    assert resolved(calls[0].counted, states).equal(batch(2)["attention_mask"].bool())
    assert calls[0].kwargs["position_embeddings"] == calls[2].kwargs["position_embeddings"]
    assert len({one.data_ptr() for one in states.others.values()}) == len(states.others) < 8


class Block(nn.Module):
    def __init__(self, gives: Callable[[Tensor], Any] = lambda hidden: hidden) -> None:
        super().__init__()
        self.up, self.down, self.gives = nn.Linear(4, 8), nn.Linear(8, 4), gives

    def forward(self, hidden: Tensor, state: Any = None) -> Any:
        return self.gives(self.down(self.up(hidden.float())))


def alone(block: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"layers": nn.ModuleList([block])})


@pytest.mark.parametrize(
    ("call", "gives", "why"),
    [
        (lambda block, x: block(block(x)), lambda x: x, "is called more than once in a forward"),
        (lambda block, x: block(x, state=object()), lambda x: x, "gets state=a object"),
        (lambda block, x: block(x[:, 0].long()), lambda x: x, f"gets {NONE} a tensor (2, 4) of torch.int64"),
        (lambda block, x: block(x[:, 0]), lambda x: x, f"gets {NONE} a tensor (2, 4) of torch.float32"),
        (lambda block, x: block(x), lambda x: {"hidden": x}, f"gives {NONE} a dict"),
        (lambda block, x: block(x), lambda x: x.mean(1), f"gives {NONE} a tensor (2, 4) of torch.float32"),
        (torch.inference_mode()(lambda block, x: block(x + 1)), lambda x: x, f"is called under {MODE}"),
        (lambda block, x: block(x[:, :2]), lambda x: x, "gets (2, 2) hidden states, of which no mask says which count"),
    ],
)
def test_a_block_that_can_not_be_called_again_says_why(call: Any, gives: Any, why: str) -> None:
    block = Block(gives)
    states = of(alone(block))
    for number in range(2):
        with states.recording(number, lambda: torch.tensor([[True, True, False]] * 2)):
            call(block, torch.randn(2, 3, 4))
    assert states.refused == {"layers.0": why}
    assert states.calls == {}


def test_one_rank_collects_its_own_calls_and_forgets_them() -> None:
    (model, states), access = llama(), ParameterAccess()
    for number in range(2):
        with states.recording(number, None):
            model(**batch())
    expected = dict(states.calls["model.layers.0"])
    shared = SharedStates.of(states, access)
    assert collect_calls("model.layers.0", states, shared, 0, access) == list(expected.values())
    assert list(states.calls) == ["model.layers.1"]
