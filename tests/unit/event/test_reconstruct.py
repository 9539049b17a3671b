from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import Sequences, ToyLM, loader, tiny_gpt2, tiny_llama, trainer

from thanos_lightning import CalibrationOptions, ThanosPruningCallback
from thanos_lightning.collect.hidden_states import HiddenStates, first_of
from thanos_lightning.event.reconstruct import Solved, needed_in_round, reconstruct
from thanos_lightning.layers.blocks import find_blocks
from thanos_lightning.layers.targets import Layer, find_targets
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import PruningError
from thanos_lightning.report.data import EventReport

FORWARDS = 16


def batch(number: int, padding: int = 0) -> dict[str, Tensor]:
    data = Sequences(4 * (number + 1), length=24, padding=padding)
    rows = [data[index] for index in range(4 * number, 4 * number + 4)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def recorded(model: nn.Module, steps: int = 64, padding: int = 0) -> HiddenStates:
    states = watched(model, steps)
    for number in range(FORWARDS):
        inputs = batch(number, padding)
        with states.recording(number, lambda inputs=inputs: inputs["attention_mask"].bool()):  # type: ignore[misc]
            model(**inputs)
    states.stop()
    return states


def watched(model: nn.Module, steps: int) -> HiddenStates:
    blocks = find_blocks(model, find_targets(model))
    states = HiddenStates({name: block.module for name, block in blocks.items()}, steps)
    states.start()
    return states


def alone(block: nn.Module, inputs: Sequence[Tensor], steps: int = 16) -> tuple[nn.ModuleDict, HiddenStates]:
    """A model of this block, called `layers.0`, which has been called with these hidden states."""
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    states = watched(model, steps)
    for number, hidden in enumerate(inputs):
        with torch.no_grad(), states.recording(number, None):
            block(hidden.clone())
    return model, states


def halves(layers: Mapping[str, Layer]) -> dict[str, Solved]:
    """The larger half of each layer's weights."""
    kept = {}
    for name, layer in layers.items():
        weight = layer.oriented(layer.parameter.detach()).clone()
        keep = weight.abs() > weight.abs().median()
        kept[name] = Solved(weight * keep, keep)
    return kept


def solved_llama(steps: int = 64, padding: int = 0) -> tuple[nn.Module, HiddenStates, dict[str, Solved]]:
    model = tiny_llama().eval()
    return model, recorded(model, steps, padding), halves(find_targets(model))


def weights_of(kept: Mapping[str, Solved]) -> dict[str, Tensor]:
    return {name: one.weight.clone() for name, one in kept.items()}


def trained(model: nn.Module, states: HiddenStates, kept: dict[str, Solved]) -> list[Any]:
    layers = find_targets(model)
    targets = {name: [layers[layer] for layer in block.layers] for name, block in find_blocks(model, layers).items()}
    owners, reports = reconstruct(states, targets, kept, dict.fromkeys(layers, 0), ParameterAccess(), "")
    assert owners == dict.fromkeys(layers, 0)
    return reports


def outputs(
    model: nn.Module, name: str, inputs: Mapping[str, Tensor], kept: Mapping[str, Solved]
) -> tuple[Tensor, Tensor]:
    """What a block gives with its own weights, and with these, on what it gets in the model."""
    calls: list[tuple[Any, Any]] = []
    block, layers = model.get_submodule(name), find_targets(model)
    handle = block.register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        model(**inputs, use_cache=False)
        handle.remove()
        ((args, kwargs),) = calls
        own = first_of(block(*args, **kwargs))
        weights = {one.parameter_name: one.oriented(kept[which].weight.double()) for which, one in layers.items()}
        inside = {which.removeprefix(f"{name}."): weight for which, weight in weights.items() if name in which}
        return own, first_of(torch.func.functional_call(block, inside, args, kwargs))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_each_block_gives_more_of_what_it_gave(build: Any) -> None:
    model = build().eval()
    layers = find_targets(model)
    states, kept = recorded(model), halves(layers)
    solved = {name: Solved(one.weight.clone(), one.keep.clone()) for name, one in kept.items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reports = trained(model, states, kept)
    assert [report.name for report in reports] == list(find_blocks(model, layers))
    assert all(value.equal(model.state_dict()[name]) for name, value in before.items()), "the model waits for the write"
    model.double()
    for report in reports:
        assert report.error < 0.8 * report.error_solved
        errors = []
        for seeds in (range(FORWARDS), [FORWARDS + 1]):
            for weights in (solved, kept):
                pairs = (outputs(model, report.name, batch(seed), weights) for seed in seeds)
                wanted, given = (torch.cat(parts) for parts in zip(*pairs, strict=True))
                errors.append(float(((given - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()))
        assert [report.error_solved, report.error] == pytest.approx(errors[:2], rel=0.2)
        assert errors[3] < 0.8 * errors[2], "text that was not seen gains, too"
    for name, one in kept.items():
        assert one.keep.equal(solved[name].keep)
        assert not one.weight[~one.keep].any()
        assert not one.weight.equal(solved[name].weight)


def test_padding_teaches_nothing() -> None:
    results: list[Any] = []
    for noise in (0.0, 1e4):
        model, states, kept = solved_llama(padding=10)
        for calls in states.calls.values():
            for call in calls.values():
                call.outputs[:, -10:] += noise  # where there is padding
        trained(model, states, kept)
        results.append(torch.cat([one.weight.flatten() for one in kept.values()]))
    torch.testing.assert_close(*results)


def test_what_gets_worse_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thanos_lightning.event.reconstruct._RATE", 1e3)
    model, states, kept = solved_llama()
    solved = weights_of(kept)
    assert all(report.error == report.error_solved for report in trained(model, states, kept))
    torch.testing.assert_close(weights_of(kept), solved, rtol=0, atol=0)


def test_the_same_calls_give_the_same_weights_and_leave_random_numbers_alone() -> None:
    results: list[Any] = []
    for _ in range(2):
        model, states, kept = solved_llama(steps=5)
        torch.manual_seed(len(results))
        state = torch.get_rng_state()
        trained(model, states, kept)
        assert state.equal(torch.get_rng_state())
        results.append(weights_of(kept))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_block_that_was_not_called_is_named() -> None:
    model, states, kept = solved_llama()
    del states.calls["model.layers.1"]
    with pytest.warns(UserWarning, match=r"1 block.*model.layers.1 was not called"):
        assert [report.name for report in trained(model, states, kept)] == ["model.layers.0"]


class Two(nn.Module):
    """A block of two layers and what a function makes of them."""

    def __init__(self, gives: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.other, self.gives = nn.Linear(8, 8), nn.Linear(8, 8), gives

    def forward(self, hidden: Tensor) -> Tensor:
        return self.gives(self, hidden)


def experts(block: Two, hidden: Tensor) -> Tensor:
    """The second expert gets the sequences whose first entry is positive, if there is one."""
    given, chosen = hidden + block.one(hidden), hidden[:, 0, 0] > 0
    return given.index_add(0, chosen.nonzero()[:, 0], block.other(hidden[chosen])) if chosen.any() else given


def test_an_expert_without_a_token_in_a_step_waits_for_one() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 600, 8) for _ in range(8)]
    for number, hidden in enumerate(inputs):
        hidden[0, 0, 0] = 1 if number == 3 else -1
    model, states = alone(Two(experts), inputs)
    solved = weights_of(kept := halves(find_targets(model)))
    (report,) = trained(model, states, kept)
    assert report.error < report.error_solved
    assert not any(one.equal(solved[name]) for name, one in weights_of(kept).items())


def test_a_block_that_changes_what_it_gets_is_given_a_copy() -> None:
    def in_place(block: Two, hidden: Tensor) -> Tensor:
        hidden.mul_(2)
        return hidden + block.other(block.one(hidden).relu())

    torch.manual_seed(0)
    given = [torch.randn(1, 600, 8, dtype=torch.bfloat16) for _ in range(8)]
    model, states = alone(Two(in_place).bfloat16(), given)
    calls = list(states.calls["layers.0"].values())
    (report,) = trained(model, states, halves(find_targets(model)))
    assert report.error < report.error_solved
    assert all(call.inputs.equal(hidden) for call, hidden in zip(calls, given, strict=True))


CALLS = count(1)


def another_at_each_call(block: Two, hidden: Tensor) -> Tensor:
    return next(CALLS) * experts(block, hidden)


def short(block: Two, hidden: Tensor) -> Tensor:
    if hidden.shape[1] > 4 and torch.is_grad_enabled():
        raise ValueError("too long")
    return experts(block, hidden)


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (another_at_each_call, r"1 block.*layers.0 gives something else.*calibration.block_steps=0"),
        (short, r"layers.0 fails when it is called on its own \(ValueError: too long\)"),
    ],
)
def test_a_block_that_can_not_be_trained_is_left_alone(gives: Any, words: str) -> None:
    model, states = alone(Two(gives), [torch.randn(2, length, 8) for length in (4, 8)], steps=4)
    solved = weights_of(kept := halves(find_targets(model)))
    with pytest.warns(UserWarning, match=words):
        assert trained(model, states, kept) == []
    torch.testing.assert_close(weights_of(kept), solved, rtol=0, atol=0)


def test_a_rank_without_a_block_reserves_what_passes_by() -> None:
    small, large = nn.Linear(2, 2, bias=False), nn.Linear(2, 8, bias=False)
    blocks = {"small": small, "large": large}
    assert needed_in_round(blocks, rank=0) == {"small": 16, "large": 64}
    assert needed_in_round(blocks, rank=1) == {"large": 128}
    assert needed_in_round(blocks, rank=2) == {"large": 64}


def test_a_failure_is_an_error_with_the_blocks_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr("thanos_lightning.event.reconstruct._descend", fail)
    with pytest.raises(PruningError, match=r"model.layers.0: MemoryError: no memory.*No layer of this window"):
        trained(*solved_llama())


# In a training


def run(folder: Path, targets: str = "*", **calibration: Any) -> EventReport:
    pruning = ThanosPruningCallback("2:4", targets=targets, calibration=CalibrationOptions(**calibration))
    trainer(folder, pruning, max_steps=2).fit(ToyLM(), loader())
    return pruning.report.events[0]


def test_a_calibration_set_trains_blocks_unless_told_otherwise(tmp_path: Path) -> None:
    batches = [batch(seed) for seed in range(8)]
    event = run(tmp_path, batches=batches)
    assert [block.name for block in event.blocks] == ["model.model.layers.0", "model.model.layers.1"]
    assert all(block.error < block.error_solved for block in event.blocks)
    assert event.reconstructing_seconds >= sum(block.seconds for block in event.blocks) > 0
    assert run(tmp_path, batches=batches, block_steps=0).blocks == run(tmp_path, steps=1).blocks == []


@pytest.mark.parametrize(
    ("number", "options", "words"),
    [
        (4, {}, r"has 384 tokens, on which a block is trained for 8 steps, not for 64: give"),
        (1, {"targets": "*q_proj", "block_steps": 8}, r"block_steps is 8, but no block .* has two layers to prune"),
        (4, {"block_steps": 8}, None),
    ],
)
def test_steps_for_which_there_are_no_tokens_or_blocks_are_said(
    number: int, options: dict[str, Any], words: str | None, tmp_path: Path, recwarn: Any
) -> None:
    run(tmp_path, batches=[batch(seed) for seed in range(number)], **options)
    said = [str(one.message) for one in recwarn if re.search("tokens|block_steps", str(one.message))]
    assert len(said) == (words is not None)
    assert all(re.search(words or "", text) for text in said)
