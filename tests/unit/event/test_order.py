from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from toy import ToyLM, grouped, loader, tiny_gpt2, tiny_llama, tiny_of, trainer
from transformers import PreTrainedModel

import thanos_lightning.event.window as room
from thanos_lightning import SparsitySchedule, TargetOverride, ThanosPruningCallback
from thanos_lightning.enforcement import MaskEnforcer
from thanos_lightning.event.order import of_ordered_inputs, order_channels
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.solver import NM, HessianAccumulator, PrunedLayer
from thanos_lightning.solver.ordering import kept_share

SET = list(loader(64, length=24))
BATCH = SET[0]["input_ids"]


def still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(BATCH).logits
    return logits


def pruned(folder: Path, model: Any, make: Any = still, lm: Any = ToyLM, **options: Any) -> ThanosPruningCallback:
    options = {"pattern": "2:4", "batches": SET, "block_steps": 0, **options}
    callback = ThanosPruningCallback(**grouped(**options))
    trainer(folder, callback, max_steps=1).fit(lm(model, make_optimizer=make), loader())
    return callback


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The down layers whose channels have got another order, and that order."""
    found: dict[str, Tensor] = {}

    def order(*args: Any) -> dict[str, Tensor]:
        orders = order_channels(*args)
        assert not orders.keys() & found.keys(), "an order is found once"
        found.update(orders)
        return orders

    monkeypatch.setattr(room, "order_channels", order)
    return found


@pytest.fixture
def keeps_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver leaves every weight as it is."""

    def nothing(weight: Tensor, *_: Any) -> PrunedLayer:
        return PrunedLayer(weight.clone(), torch.ones_like(weight, dtype=torch.bool), 0.0, 0.0)

    monkeypatch.setattr(room, "prune_layer", nothing)


@pytest.mark.parametrize(
    ("build", "options", "down"),
    [
        (tiny_llama, {}, "model.layers.1.mlp.down_proj"),
        (tiny_llama, {"ignore": ["*gate_proj", "lm_head"]}, "model.layers.1.mlp.down_proj"),
        (tiny_llama, {"targets": ["*down_proj"]}, "model.layers.1.mlp.down_proj"),
        (tiny_llama, {"memory_gib": 1e-5}, "model.layers.1.mlp.down_proj"),  # in windows
        (tiny_gpt2, {}, "transformer.h.1.mlp.c_proj"),  # with biases, and transposed
        (lambda: tiny_of("phi3"), {}, "model.layers.1.mlp.down_proj"),  # gate and up are one layer
    ],
)
@pytest.mark.usefixtures("keeps_all")
def test_another_order_changes_nothing_that_the_model_computes(
    build: Callable[[], PreTrainedModel], options: dict[str, Any], down: str, tmp_path: Path
) -> None:
    model = build()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    before, now = logits_of(model), model.get_parameter(f"{down}.weight")
    weight, dim = now.clone(), 0 if build is tiny_gpt2 else 1
    pruned(tmp_path, model, **options)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-5)
    assert not now.equal(weight)
    assert now.sum(1 - dim).sort().values.allclose(weight.sum(1 - dim).sort().values)


def test_other_layers_lose_what_they_did_with_their_rows_in_the_new_order(
    tmp_path: Path, ordered: dict[str, Tensor]
) -> None:
    others, nonzero = [], []
    for reorder in (False, True):
        model = tiny_llama(hidden_size=64, intermediate_size=192)
        up = TargetOverride("*up_proj", "unstructured", 0.5)  # whose rows compete
        callback = pruned(tmp_path, model, reorder=reorder, overrides=[up], output_weights="diagonal")
        layers = callback.report.events[0].layers
        others.append([layer.relative_loss for layer in layers if not layer.name.endswith("down_proj")])
        nonzero.append(model.model.layers[1].mlp.up_proj.weight.count_nonzero(1))
    assert others[1] == pytest.approx(others[0], rel=1e-4)
    assert nonzero[0].unique().numel() > 4
    order = ordered["model.model.layers.1.mlp.down_proj"]
    assert (nonzero[1] == nonzero[0][order]).float().mean() > 0.9


def test_down_layers_lose_less_on_the_inputs_that_they_get_in_the_new_order(tmp_path: Path) -> None:
    errors = {}
    for reorder in (False, True):
        model = tiny_llama(hidden_size=64, intermediate_size=192)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data *= torch.logspace(-1, 1, 192)[torch.randperm(192)].unsqueeze(1)
            layer.mlp.down_proj.weight.data *= 5
        before = logits_of(model)
        pruned(tmp_path, model, reorder=reorder, targets=["*down_proj"])
        errors[reorder] = float((logits_of(model) - before).square().mean())
    assert errors[True] < 0.9 * errors[False]


def test_the_order_is_found_on_the_statistics_of_the_layer() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(400, 32) * torch.linspace(0.1, 3, 32)
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(32, 16))  # rows i and 32 + i are of channel i
    before, weight = (layer.weight.detach().clone() for layer in model)
    statistics = HessianAccumulator(32)
    statistics.update(inputs)
    layers = find_targets(model, "*", ())
    enforcer = MaskEnforcer(layers, ParameterAccess())
    enforcer.begin()
    keep = torch.rand(64, 8) < 0.5
    enforcer.set_mask("0", keep)
    (order,) = order_channels(
        {"1": [layers["0"]]}, layers, {"1": NM(2, 4)}, {"1": statistics}, {"1": 0}, enforcer, ""
    ).values()
    assert order.sort().values.equal(torch.arange(32))
    assert not order.equal(torch.arange(32))
    scores = weight.square() * inputs.square().sum(0)
    assert kept_share(scores[:, order], NM(2, 4)) > kept_share(scores, NM(2, 4))
    rows = torch.cat([order, 32 + order])
    assert model[1].weight.equal(weight[:, order])
    assert model[0].weight.equal(before[rows])
    assert enforcer.keep_mask("0").equal(keep[rows])
    assert enforcer.sparsity() == pytest.approx(float((~keep).sum()) / (keep.numel() + weight.numel()))
    moved = of_ordered_inputs(statistics, order)
    torch.testing.assert_close(moved.compute(), 2 / 400 * inputs[:, order].T @ inputs[:, order])
    assert moved.num_tokens == 400


@pytest.mark.parametrize(
    "options",
    [
        {"reorder": False},
        {"schedule": SparsitySchedule(at=[1])},
        {"pattern": "unstructured", "sparsity": 0.5},
        {"overrides": [TargetOverride("*down_proj", "unstructured", 0.5)]},
    ],
)
def test_the_order_stays_where_another_one_gains_nothing_or_was_not_asked_for(
    options: dict[str, Any], tmp_path: Path, ordered: dict[str, Tensor]
) -> None:
    pruned(tmp_path, tiny_llama(), **options)
    assert not ordered


def test_the_order_of_a_model_that_is_pruned_in_part_stays(tmp_path: Path, ordered: dict[str, Tensor]) -> None:
    model = tiny_llama()
    pruned(tmp_path, model, pattern="3:4", reorder=False)
    zeros = model.model.layers[0].mlp.down_proj.weight == 0
    with pytest.warns(UserWarning, match="pruned already"):
        pruned(tmp_path, model)
    assert not ordered
    now = model.model.layers[0].mlp.down_proj.weight == 0
    assert (now & zeros).equal(zeros)
    assert now.sum() == 2 * zeros.sum()


def test_it_says_whether_channels_get_another_order_which_a_later_event_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ordered: dict[str, Tensor]
) -> None:
    pruned(tmp_path, tiny_llama(), schedule=SparsitySchedule(at=[0, 1]))
    assert len(ordered) == 2
    assert "order   2 feed-forward blocks: channels are permuted so that N:M loses less" in capsys.readouterr().out
    pruned(tmp_path, tiny_llama(), targets=["*q_proj"])
    said = " ".join(capsys.readouterr().out.split())
    assert "order channels are not permuted: no target with N:M is the down layer of a feed-forward block" in said


def test_zeros_of_an_earlier_window_hold(tmp_path: Path, ordered: dict[str, Tensor]) -> None:
    model = tiny_llama()
    callback = pruned(tmp_path, model, torch.optim.AdamW, memory_gib=1e-5)  # which counts violations at the end
    assert callback._run is not None
    assert len(callback._run.windows) > 4
    assert list(ordered) == [f"model.model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    for name, part in model.named_modules():
        if name.endswith("proj"):
            assert (part.weight.unflatten(1, (-1, 4)) == 0).sum(-1).min() == 2


class Scaled(nn.Linear):
    """A quantised layer, as it were: its rows have scales."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__(cols, rows)
        self.register_buffer("scales", torch.linspace(0.5, 1, rows))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scales


class Adapted(nn.Module):
    """A layer with a low-rank adapter, which has its own rows for the channels."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.a = inner, nn.Linear(inner.in_features, 4, bias=False)
        self.b = nn.Linear(4, inner.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.b(self.a(x))


class Quantised(nn.Linear):
    """It multiplies by a weight whose precision depends on groups of inputs, as in a training for quantisation."""

    def forward(self, x: Tensor) -> Tensor:
        groups = self.weight.unflatten(1, (-1, 8))
        step = groups.abs().amax(-1, keepdim=True) / 7
        return nn.functional.linear(x, ((groups / step).round() * step).flatten(1))


def having(layer: nn.Module, **parameters: nn.Parameter) -> nn.Module:
    for name, value in parameters.items():
        setattr(layer, name, value)
    return layer


BIAS = nn.Parameter(torch.linspace(-1, 1, 48))
# what -> the layer of a block that becomes another one, made from the block's and the first block's mlp
INDEXED: dict[str, tuple[str, Callable[[Any, Any], nn.Module]]] = {
    "scales": ("up_proj", lambda mlp, _: Scaled(*mlp.up_proj.weight.shape)),
    "an adapter before": ("up_proj", lambda mlp, _: Adapted(mlp.up_proj)),
    "an adapter after": ("down_proj", lambda mlp, _: Adapted(mlp.down_proj)),
    "a computed weight": ("up_proj", lambda mlp, _: parametrizations.weight_norm(mlp.up_proj)),
    "a weight for two": ("up_proj", lambda mlp, _: having(mlp.up_proj, weight=mlp.gate_proj.weight)),
    "a weight for blocks": ("up_proj", lambda mlp, first: having(mlp.up_proj, weight=first.up_proj.weight)),
    "a bias for blocks": ("up_proj", lambda mlp, _: having(mlp.up_proj, bias=BIAS)),
    "a quantised weight": ("down_proj", lambda mlp, _: Quantised(*reversed(mlp.down_proj.weight.shape))),
}


@pytest.mark.parametrize("what", INDEXED)
@pytest.mark.usefixtures("keeps_all")
def test_what_something_else_indexes_keeps_its_order(what: str, tmp_path: Path, ordered: dict[str, Tensor]) -> None:
    model = tiny_llama()
    name, make = INDEXED[what]
    for layer in model.model.layers:
        setattr(layer.mlp, name, make(layer.mlp, model.model.layers[0].mlp))
    before = logits_of(model)
    pruned(tmp_path, model, ignore=["*up_proj", "lm_head"] if what == "a computed weight" else "lm_head")
    assert not [name for name in ordered if name.endswith(("down_proj", "inner"))]
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-5)


class NotOfOne(ToyLM):
    def forward(self, **batch: Any) -> Any:
        if len(batch["input_ids"]) == 1:
            raise RuntimeError("not this way")
        return super().forward(**batch)


def fail(*_: Any, **__: Any) -> None:
    raise KeyError("layer")


@pytest.mark.parametrize(
    ("where", "lm", "words"),
    [
        ("order.search_order", ToyLM, r"2 feed-forward block\(s\) keep their order, .*mlp.down_proj \(KeyError"),
        ("channels.find_feed_forwards", ToyLM, "not permuted: the search for feed-forward blocks ended in KeyError"),
        (None, NotOfOne, "order channels are not permuted: "),
    ],
)
def test_a_search_that_fails_leaves_the_order(
    where: str | None, lm: Any, words: str, tmp_path: Path, ordered: Any, monkeypatch: Any, capsys: Any, recwarn: Any
) -> None:
    if where is not None:
        monkeypatch.setattr(f"thanos_lightning.event.{where}", fail)
    pruned(tmp_path, tiny_llama(), lm=lm)
    assert not ordered
    said = [*(str(one.message) for one in recwarn), " ".join(capsys.readouterr().out.split())]
    assert any(re.search(words, text) for text in said)


@pytest.mark.usefixtures("impatient")
def test_a_search_that_takes_long_says_what_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("thanos_lightning.collect.tiny_input.hidden", lambda _: nullcontext())  # no progress bar here
    pruned(tmp_path, tiny_llama())
    assert re.search(r"Looking for feed-forward blocks: 1\d forwards in ", capsys.readouterr().err)
