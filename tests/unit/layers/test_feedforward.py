from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn
from toy import FAMILIES, GROUPED, tiny_of

from thanos_lightning.layers.feedforward import FeedForward, check_feed_forwards, find_feed_forwards, in_any_order

LLAMA = ("model.layers.{}.mlp.down_proj", ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"))
# family -> the names of the layers of its blocks, down and ups
LAYERS: dict[str, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys(FAMILIES, LLAMA),
    "phi3": ("model.layers.{}.mlp.down_proj", ("model.layers.{}.mlp.gate_up_proj",)),
    "gpt2": ("transformer.h.{}.mlp.c_proj", ("transformer.h.{}.mlp.c_fc",)),
    "opt": ("model.decoder.layers.{}.fc2", ("model.decoder.layers.{}.fc1",)),
    "gpt-neox": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", ("gpt_neox.layers.{}.mlp.dense_h_to_4h",)),
    "bert": ("bert.encoder.layer.{}.output.dense", ("bert.encoder.layer.{}.intermediate.dense",)),
}


def run_of_tokens(model: nn.Module) -> Any:
    return lambda: model(input_ids=torch.arange(1, 9).unsqueeze(0))


def run_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    x = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return lambda: model(x)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_by_what_layers_do_and_proven(family: str) -> None:
    down, ups = LAYERS[family]
    run = run_of_tokens(model := tiny_of(family).eval())
    blocks = find_feed_forwards(model, run)
    assert blocks == [FeedForward(down.format(layer), tuple(up.format(layer) for up in ups)) for layer in range(2)]
    check_feed_forwards(model, blocks, run)
    assert in_any_order(model, blocks, run) == blocks


class Mixed(nn.Module):
    """Functions say what is between its layers, and what else is made of the channels."""

    def __init__(self, between: Any = torch.relu, also: Any = lambda result, hidden: result) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.between, self.also = nn.Linear(8, 12), nn.Linear(12, 8), between, also

    def forward(self, x: Tensor) -> Any:
        hidden = self.between(self.up(x))
        return self.also(self.down(hidden), hidden)


UP_AND_DOWN = [FeedForward("down", ["up"])]


def rolled() -> Mixed:
    return Mixed(lambda hidden: hidden.relu().roll(1, -1))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Mixed, 1),
        (rolled, 0),
        (lambda: Mixed(lambda hidden: nn.functional.layer_norm(hidden.relu(), (12,))), 0),
        (lambda: Mixed(also=lambda result, hidden: result + hidden[..., :8]), 0),
    ],
)
def test_only_rows_that_are_columns_make_a_block(make: Callable[[], Mixed], found: int) -> None:
    run = run_of(model := make().eval())
    assert len(find_feed_forwards(model, run)) == found
    if not found:
        with pytest.raises(ValueError, match="channels of the feed-forward block of down are read elsewhere"):
            check_feed_forwards(model, UP_AND_DOWN, run)


def test_the_gate_of_an_attention_keeps_the_order_of_what_it_gates() -> None:
    torch.manual_seed(0)
    config = t.AfmoeConfig(**GROUPED, head_dim=8, moe_intermediate_size=16, num_experts=2, num_dense_layers=2)
    model = t.AfmoeForCausalLM(config).eval()
    with torch.no_grad():
        for norm in (part for name, part in model.named_modules() if name.endswith("norm")):
            norm.weight.fill_(1)
    run = run_of_tokens(model)
    blocks = find_feed_forwards(model, run)
    check_feed_forwards(model, blocks, run)
    assert {block.down.rpartition(".")[2] for block in blocks} == {"o_proj", "down_proj"}
    free = in_any_order(model, blocks, run)
    assert {block.down for block in free} == {f"model.layers.{layer}.mlp.down_proj" for layer in range(2)}


class Shared(nn.Module):
    """Its layers are called twice, which the search leaves out and a user may declare."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + self.down(torch.tanh(self.up(x)))
        return x


def test_a_block_whose_channels_are_not_treated_alike_keeps_their_order() -> None:
    before, after, uncalled, scale = Mixed(), Mixed(), Mixed(), torch.linspace(0.5, 1, 12)
    before.up.register_forward_hook(lambda module, args, output: output * scale)
    after.down.register_forward_pre_hook(lambda module, args: (args[0] * scale,))
    uncalled.forward = torch.clone  # type: ignore[method-assign, assignment]
    nearly = Mixed(lambda hidden: torch.tanh(hidden) * torch.linspace(0.994, 1.006, 12))
    for number, model in enumerate((before, after, uncalled, nearly, Shared())):
        run = run_of(model.eval())
        check_feed_forwards(model, UP_AND_DOWN, run)  # and yet it can lose them
        assert in_any_order(model, UP_AND_DOWN, run) == [], number


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channel", range(12))
def test_a_single_channel_that_is_read_elsewhere_or_treated_otherwise_keeps_the_order(
    channel: int, dtype: torch.dtype
) -> None:
    read = Mixed(also=lambda result, hidden: (result, hidden[..., channel]))
    masked = Mixed(lambda hidden: torch.tanh(hidden) * (torch.arange(12) != channel))
    for model in (read, masked):
        run = run_of(model.eval().to(dtype), dtype)
        assert in_any_order(model, UP_AND_DOWN, run) == []


def test_one_odd_block_leaves_the_others_free() -> None:
    model = nn.Sequential(Mixed(), rolled(), nn.Linear(8, 8)).eval()
    model[0], model[1] = nn.Sequential(model[0]), nn.ModuleDict({"odd": model[1]})
    model[1].forward = lambda x: model[1]["odd"](x)
    blocks = [FeedForward("0.0.down", ["0.0.up"]), FeedForward("1.odd.down", ["1.odd.up"])]
    assert in_any_order(model, blocks, run_of(model)) == blocks[:1]
    with pytest.raises(ValueError, match=r"block of 1\.odd\.down are read elsewhere"):
        check_feed_forwards(model, blocks, run_of(model))
    twice = [FeedForward("0.0.down", ["0.0.up"]), FeedForward("1.odd.down", ["0.0.up"]), FeedForward("2", ["gone"])]
    assert in_any_order(model, twice, run_of(model)) == []


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (FeedForward("down", ["gate"]), "names 'gate', no Linear or Conv1D layer of the model"),
        (FeedForward("out", ["up"]), "names 'out', no"),
        (FeedForward("up", ["down"]), r"has 8 channels, .*\{'down': 12\}"),
        (FeedForward("down", []), "has 12 channels"),
    ],
)
def test_a_declared_block_of_other_layers(block: FeedForward, message: str) -> None:
    model = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 12)})
    with pytest.raises(ValueError, match=message):
        check_feed_forwards(model, [block], lambda: None)
