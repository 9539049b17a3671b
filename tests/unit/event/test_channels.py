from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from tiny_mixtures import tiny_mixture
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import (
    VOCABULARY,
    ResumableBatches,
    ToyLM,
    ZeroProbe,
    at,
    grouped,
    loader,
    tiny_gpt2,
    tiny_llama,
    tiny_of,
    trainer,
)

from thanos_lightning import FeedForward, SparsitySchedule, TargetOverride, ThanosPruningCallback
from thanos_lightning.checkpoints.export import export_checkpoint
from thanos_lightning.fit import announce

SIZED: dict[str, Any] = {"sparsity": None}


def channels(sparsity: float | None = 0.25, **options: Any) -> ThanosPruningCallback:
    settings: dict[str, Any] = {"schedule": SparsitySchedule(at=[1, 4]), "multiple_of": 4, "steps": 2}
    if "batches" in options:
        del settings["steps"]
    return ThanosPruningCallback(**grouped(**{"pattern": "channels", "sparsity": sparsity, **settings, **options}))


# what builds a model, the width of its blocks, where they are, and all that their channels own, their down layer first
KINDS: dict[str, tuple[Any, int, str, str]] = {
    "llama": (tiny_llama, 48, "model.layers", "down_proj.weight gate_proj.weight up_proj.weight"),
    "gpt2, transposed and with biases": (tiny_gpt2, 128, "transformer.h", "c_proj.weight c_fc.weight c_fc.bias"),
    "phi3, gate and up in one": (partial(tiny_of, "phi3"), 48, "model.layers", "down_proj.weight gate_up_proj.weight"),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_a_channel_owns_is_zero_after_every_step(tmp_path: Path, kind: str, precision: Any) -> None:
    build, width, where, names = KINDS[kind]
    blocks = [[f"model.{where}.{block}.mlp.{name}" for name in names.split()] for block in range(2)]
    torch.manual_seed(0)
    callback = channels()
    probe, module = ZeroProbe(callback), ToyLM(build())
    trainer(tmp_path, callback, probe, max_steps=8, precision=precision).fit(module, loader(32))
    assert 0 < probe.sparsities[0] < probe.sparsities[-1] == pytest.approx(0.25)
    assert callback.state_dict()["masks"].keys() == {name for block in blocks for name in block}
    named = dict(module.named_parameters())
    for down, *owned in blocks:
        columns = named[down].T if named[down].shape[1] == width else named[down]
        gone = columns.eq(0).all(1)
        assert int(gone.sum()) == width // 4
        for name in owned:
            rows = named[name] if named[name].shape[0] % width == 0 else named[name].T  # a layer of GPT-2 has columns
            assert all(part[gone].eq(0).all() for part in rows.split(width))
    solved = {layer.name for layer in callback.report.events[-1].layers}
    assert solved == {down.removesuffix(".weight") for down, *_ in blocks}
    assert callback.report.events[-1].target == pytest.approx(0.25)


def test_each_block_keeps_the_nearest_multiple(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = channels(0.3, multiple_of=16)
    trainer(tmp_path, callback, max_steps=5).fit(ToyLM(), loader(32))
    assert {layer.sparsity for layer in callback.report.events[-1].layers} == {1 / 3}
    assert callback.report.events[-1].target == 1 / 3
    said = capsys.readouterr().out
    assert "Pruning 6 of 15 Linear layers to channels 0.3333" in said
    assert "blocks  32 of 48 channels stay in each of 2 feed-forward blocks" in said


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"parameters": 13_000}, "32-true"),
        ({"parameters": 13_000, "multiple_of": 16}, "bf16-mixed"),
        ({"file_gib": 13_000 * 4 / 2**30}, "32-true"),
        ({"file_gib": 13_000 * 2 / 2**30}, "bf16-true"),
        ({"pattern": "2:4"}, "32-true"),
        ({"pattern": "unstructured", "sparsity": 0.6}, "bf16-true"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*names no tokenizer.*")
def test_an_export_is_what_was_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], precision: Any
) -> None:
    announced: list[tuple[Any, int]] = []
    monkeypatch.setattr(announce, "_exported", lambda targets, dense: announced.append(targets.after(dense)) or "")
    of_size = "pattern" not in options
    saving = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=5)
    callback = channels(**SIZED | ({} if of_size else {"multiple_of": 64}) | options)
    fitted = trainer(tmp_path, callback, saving, max_steps=5, precision=precision, enable_checkpointing=True)
    fitted.fit(ToyLM(tiny_llama()), loader(32))
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    [(size, nonzeros)] = announced
    assert size.weights == sum(tensor.numel() for tensor in tensors.values())
    assert nonzeros == pytest.approx(sum(int(tensor.count_nonzero()) for tensor in tensors.values()), rel=1e-3)
    assert round(size.gib * 2**30) == sum(tensor.nbytes for tensor in tensors.values())
    if of_size:
        a_step = 2 * 3 * 32 * options.get("multiple_of", 4)  # of two blocks, in and out of 32 numbers of the stream
        assert 13_000 - a_step < size.weights <= 13_000


def test_a_calibration_set_and_zeros_that_were_there(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, :8] = 0
    callback = channels(0.25, batches=list(loader(8)), schedule=SparsitySchedule(at=[0]))
    with pytest.warns(UserWarning, match="2 target.* are pruned already"):
        trainer(tmp_path, callback, max_steps=2).fit(ToyLM(model), loader(8))
    for layer in model.model.layers:
        gone = layer.mlp.down_proj.weight.eq(0).all(0)
        assert int(gone.sum()) == 12
        assert gone[:8].all()
        assert layer.mlp.up_proj.weight[gone].eq(0).all()


def test_the_search_leaves_the_training_as_it_was(tmp_path: Path) -> None:
    """A search that the pattern does not use changes no loss and no mode."""
    losses = []
    for callback in (channels(schedule=SparsitySchedule(at=[6])), None):
        model = tiny_llama(attention_dropout=0.2)
        module = ToyLM(model)
        torch.manual_seed(1)
        trainer(tmp_path, *([callback] if callback else []), max_steps=7).fit(module, loader(32))
        losses.append(module.losses[:6])
        assert model.training
    assert losses[0] == losses[1]


class Own(ToyLM):
    """A model of one's own, between an embedding, which an example may do without, and a head."""

    def __init__(self, model: Any, example: Any = None, blocks: list[FeedForward] | None = None) -> None:
        super().__init__(model)
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.example_input_array = example
        if blocks:
            self.feed_forwards = lambda: blocks

    def forward(self, inputs: Tensor) -> Any:  # type: ignore[override]
        return self.head(self.model(inputs if inputs.is_floating_point() else self.embed(inputs)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch["input_ids"])
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


IDS = torch.arange(8).unsqueeze(0)


class Twice(nn.Module):
    """A block that is called twice, so that the search leaves it out."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Any:
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)))
        return x


class Relu(nn.Module):
    """A gate that is zero for half of what it sees, and sums in place."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        given = self.down(self.act(self.gate(x)) * self.up(x))
        given += x
        return given


class FirstAlone(nn.ModuleList):
    """Experts of which the others are never called."""

    def forward(self, x: Tensor) -> Any:
        return self[0](x)


def routed() -> Own:
    module = Own(FirstAlone(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(2)), IDS)
    module.head = nn.Identity()  # type: ignore[assignment]
    return module


def three() -> nn.Module:
    """Its middle layer leads out of one block and into another."""
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 16))


@pytest.mark.parametrize(("body", "down", "up"), [(Twice, "model.down", "model.up"), (three, "model.2", "model.0")])
def test_a_block_of_ones_own_is_declared(tmp_path: Path, body: Any, down: str, up: str) -> None:
    module, callback = Own(body(), IDS, [FeedForward(down, [up])]), channels()
    trainer(tmp_path, callback, max_steps=6).fit(module, loader(32))
    assert callback.state_dict()["masks"].keys() == {f"{down}.weight", f"{up}.weight", f"{up}.bias"}
    named = dict(module.named_parameters())
    gone = named[f"{down}.weight"].eq(0).all(0)
    assert int(gone.sum()) == 8
    assert named[f"{up}.bias"][gone].eq(0).all()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
@pytest.mark.parametrize(
    "example", [IDS, torch.randn(1, 8, 16), torch.zeros(1, 8, 16)], ids=["tokens", "floats", "zeros"]
)
def test_an_example_is_converted_as_batches_are_and_a_gate_that_is_zero_hides_nothing(
    tmp_path: Path, example: Tensor, precision: Any
) -> None:
    torch.manual_seed(0)
    callback = channels()
    module = Own(nn.Sequential(Relu(), Relu()), example)
    trainer(tmp_path, callback, max_steps=5, precision=precision).fit(module, loader(32))
    owned = ("gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight")
    assert callback.state_dict()["masks"].keys() == {f"model.{block}.{name}" for block in range(2) for name in owned}


def unequal() -> Any:
    model = tiny_llama()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
    mlp.down_proj = nn.Linear(64, 32, bias=False)
    return model


def shared(name: str) -> Any:
    model = tiny_llama()
    first, second = (layer.mlp for layer in model.model.layers)
    second.get_submodule(name).weight = first.get_submodule(name).weight
    return model


def over(*args: Any) -> dict[str, Any]:
    return {"overrides": [TargetOverride(*args)]}


def half_pruned() -> Any:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[:, :24] = 0
    return model


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (tiny_llama, {"sparsity": 0.95}, r"leaves 2.4 of 48 channels, fewer than 4 \(multiple_of\)"),
        (tiny_llama, {"sparsity": 0.01}, "takes 0.48 of 48 channels, which rounds to none"),
        (tiny_llama, {**SIZED, "parameters": 1e3}, "is 1000, and with 4 of 48 channels .*: give at least 9120"),
        (tiny_llama, {**SIZED, "file_gib": 1}, "is 1, and the dense model has no more than 6.545e-05: give less"),
        (tiny_llama, {"multiple_of": 64}, "multiple_of is 64, which does not divide the 48 channels .* such as 48"),
        (tiny_llama, {"multiple_of": 7}, "multiple_of is 7, which does not divide .* such as 6"),
        (tiny_llama, {"targets": ["*.q_proj"]}, "no target is the down layer of one: add to targets model.*down_proj"),
        (tiny_llama, {"ignore": ["*.0.mlp.down_proj", "lm_head"]}, "all 2 .* and model.*0.mlp.down_proj is not among"),
        (
            tiny_llama,
            over("*.up_proj", "2:4"),
            "layer model.*.0.mlp.up_proj has .* but its rows .* or add it to ignore",
        ),
        (tiny_llama, over("*.1.mlp.down_proj", "2:4"), "and model.*1.mlp.down_proj has the pattern 2:4: give all"),
        (tiny_llama, over("*.1.*", "channels", 0.5), "lose 0.25 or 0.5 of their channels, but a model has one width"),
        (unequal, {}, r"unequal widths \(model.*layers.0.*has 48, model.*layers.1.*has 64\)"),
        (lambda: shared("down_proj"), {}, "shares its weight with another layer"),
        (lambda: shared("up_proj"), {}, "shares its weight with another layer"),
        (half_pruned, {}, r"24 of 48 channels of model.*layers.1.*are zero already, and 12 are to be"),
        (tiny_mixture, {}, "experts fused into one parameter, such as model.model.layers.0.*can't be pruned yet"),
        (lambda: Own(Twice(), IDS), {}, r"no feed-forward block was found in Own .* feed_forwards\(\)"),
        (lambda: Own(Twice(), torch.randn(1, 8)), {}, r"Own can't be run on a.*\(RuntimeError: .*example_input_array"),
        (lambda: Own(Twice()), {}, "set its example_input_array"),
        (routed, {}, r"2 layer\(s\), such as model.1.0, are named like those of feed-forward"),
        (lambda: Own(three(), IDS), {}, r"layer model.2 is in two feed-forward blocks.* name blocks in feed_forwards"),
    ],
)
def test_what_can_not_be_taken_out_is_refused_before_the_training(
    tmp_path: Path, build: Any, options: dict[str, Any], message: str
) -> None:
    model, begun = build(), []
    fit = trainer(tmp_path, channels(**options), at("on_train_batch_start", lambda *_: begun.append(1)), max_steps=5)
    with pytest.raises(ValueError, match=message):
        fit.fit(model if isinstance(model, ToyLM) else ToyLM(model), loader(32))
    assert not begun


def test_an_image_model(tmp_path: Path) -> None:
    config = t.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=2,
        num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    module, callback = ToyLM(t.ViTForImageClassification(config)), channels(attention_mask_key=None)
    fit = trainer(tmp_path, callback, max_steps=6)
    fit.fit(module, DataLoader([batch] * 8, batch_size=None))  # type: ignore[arg-type]
    masks = callback.state_dict()["masks"]
    assert len(masks) == 6
    assert {name.rpartition(".")[2] for name in masks} == {"weight", "bias"}
    fit.save_checkpoint(tmp_path / "images.ckpt")
    export_checkpoint(tmp_path / "images.ckpt", tmp_path / "small")
    small = t.AutoModelForImageClassification.from_pretrained(tmp_path / "small").eval()
    assert small.config.intermediate_size == 36
    pixels = batch["pixel_values"]
    torch.testing.assert_close(small(pixels).logits, module.model.eval()(pixels).logits, rtol=1e-5, atol=1e-6)


def test_a_resumed_training_is_the_one_that_was_not_stopped(tmp_path: Path) -> None:
    """After an event gate and up of a channel are both zero, and hide each other from the search."""

    def trained(seed: int, start: Path | None = None) -> ToyLM:
        module = ToyLM(tiny_llama(seed=seed))
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        fit = trainer(tmp_path, channels(), saving, max_steps=8, enable_checkpointing=True)
        fit.fit(module, ResumableBatches(64), ckpt_path=start)
        return module

    whole = trained(0)
    for step in (3, 6):
        resumed = trained(5, tmp_path / f"step={step}.ckpt")
        assert resumed.losses == whole.losses[step:]
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


class Taught(ToyLM):
    """A frozen teacher runs in the forward, too."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.ModuleDict({"model": tiny_llama(seed=3)}).requires_grad_(False)

    def forward(self, **batch: Tensor) -> Any:
        self.teacher["model"](input_ids=batch["input_ids"])
        return self.model(**batch)


def test_a_teacher_in_the_forward_stays_as_it_is(tmp_path: Path) -> None:
    callback = channels(ignore=["lm_head", "teacher.*"])
    module = Taught()
    fit = trainer(tmp_path, callback, max_steps=6)
    fit.fit(module, loader(32))
    fit.save_checkpoint(tmp_path / "taught.ckpt")
    assert {name.split(".")[0] for name in callback.state_dict()["masks"]} == {"model"}
    export_checkpoint(tmp_path / "taught.ckpt", tmp_path / "small")
    assert t.AutoConfig.from_pretrained(tmp_path / "small").intermediate_size == 36


def test_a_configuration_that_knows_no_width_is_warned_of(tmp_path: Path) -> None:
    config = t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    with pytest.warns(UserWarning, match="BloomForCausalLM has no entry .* 96 channels wide"):
        trainer(tmp_path, channels(), max_steps=6).fit(ToyLM(t.BloomForCausalLM(config)), loader(32))
