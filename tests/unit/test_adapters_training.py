"""Trainings of LoRA adapters on layers that are pruned before or meanwhile."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from require import only
from torch import Tensor
from toy import ResumableBatches, ToyLM, at, grouped, loader, tiny_gpt2, tiny_llama, trainer
from transformers import AutoModelForCausalLM

from thanos_lightning import (
    SparsitySchedule,
    ThanosPruningCallback,
    export_checkpoint,
    mask_adapters,
    verify_checkpoint,
)
from thanos_lightning.enforcement import ZeroViolationError
from thanos_lightning.ranks.masks import LayerMask
from thanos_lightning.solver import NM

BATCHES = list(loader(16))
DURING: dict[str, Any] = {"schedule": SparsitySchedule(at=[4, 8]), "steps": 2}
BEFORE: dict[str, Any] = {"schedule": SparsitySchedule(at=[0]), "batches": BATCHES}
BOTH: dict[str, Any] = {"schedule": SparsitySchedule(at=[0, 6]), "batches": BATCHES}


def adapt(model: Any, **config: Any) -> Any:
    """Inject adapters in place, as `CausalLM` does."""
    torch.manual_seed(2)
    inject_adapter_in_model(LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}), model)
    return model


def wrapped(model: Any) -> Any:
    """As peft's own documentation does it."""
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def in_16_bits(model: Any) -> Any:
    for parameter in model.parameters():  # buffers stay in float32, as in what is loaded
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    return model


class Lora(ToyLM):
    def __init__(self, model: Any) -> None:
        super().__init__(model, lambda ps: torch.optim.AdamW([p for p in ps if p.requires_grad], lr=1e-2))


ENDS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "wrapped": (lambda: wrapped(tiny_llama()), BOTH),
    "GPT-2": (lambda: adapt(tiny_gpt2()), BOTH),
    "during the training": (lambda: adapt(tiny_llama()), DURING),
    "before the training": (lambda: adapt(tiny_llama()), BEFORE),
    "with a trained base": (lambda: adapt(tiny_llama()).requires_grad_(True), BOTH),
    "with a trained norm": (lambda: adapt(tiny_llama(), modules_to_save=["norm"]), BOTH),
    "with a trained layer": (lambda: adapt(tiny_llama(), modules_to_save=["down_proj"]), BOTH),
    "with dropout": (lambda: adapt(tiny_llama(), lora_dropout=0.2), DURING),
    "in 16 bits": (lambda: adapt(in_16_bits(tiny_llama())), BOTH),
}


def pruning(options: dict[str, Any] = BEFORE, **others: Any) -> ThanosPruningCallback:
    return ThanosPruningCallback("2:4", **grouped(**options), **others)


def train(module: Any, root: Path, *callbacks: Callback, steps: int = 12, **options: Any) -> Any:
    torch.manual_seed(1)
    fit = trainer(root, *callbacks, max_steps=steps, **options)
    fit.fit(module, ResumableBatches())
    fit.save_checkpoint(root / "end.ckpt")
    return fit


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**BATCHES[0]).logits


def exported(root: Path, name: str = "exported", **options: Any) -> Any:
    with pytest.warns(UserWarning, match="no tokenizer"):
        export_checkpoint(root / "end.ckpt", root / name, **options)
    return AutoModelForCausalLM.from_pretrained(root / name)


@pytest.mark.parametrize("end", only(["wrapped", "GPT-2", "with a trained base"], [*ENDS]))
def test_what_is_exported_computes_what_was_trained_and_keeps_its_zeros(end: str, tmp_path: Path) -> None:
    build, options = ENDS[end]
    module = Lora(build())
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    train(module, tmp_path, pruning(options))
    assert {name for name, parameter in module.named_parameters() if not parameter.requires_grad} == frozen
    assert module.losses[-1] < module.losses[0]
    merged = exported(tmp_path)
    assert not hasattr(merged, "peft_config")
    assert torch.equal(logits(merged), logits(module))
    reports = verify_checkpoint(tmp_path / "exported")
    assert [(report.ok, report.sparsity) for report in reports] == [(True, 0.5)] * len(reports)
    assert len(reports) == {"GPT-2": 8, "with a trained layer": 12}.get(end, 14)
    dense = ["lm_head", *(["down_proj"] if end == "with a trained layer" else [])]
    for given in ({}, {"pattern": NM(2, 4), "ignore": dense}):
        assert all(report.ok for report in verify_checkpoint(tmp_path / "end.ckpt", **given))
    if isinstance(module.model, PeftModel):  # the same without the callback: peft's own merge
        assert torch.equal(logits(module.model.merge_and_unload()), logits(merged))


def test_the_solver_sees_what_adapters_have_learnt(tmp_path: Path) -> None:
    """Merged before the event and pruned without adapters, the same weights get the same zeros."""
    module, peft = Lora(adapt(tiny_llama())), wrapped(tiny_llama())
    train(module, tmp_path, steps=6)
    mask_adapters(module)  # dense weights: masks that drop nothing
    peft.load_state_dict({f"base_model.model.{name}": value for name, value in module.model.state_dict().items()})
    masks, blocks = [], []
    for one in (module, ToyLM(peft.merge_and_unload().requires_grad_(True))):
        callback = ThanosPruningCallback("unstructured", 0.5, **grouped(**BEFORE))
        train(one, tmp_path, callback, steps=1)
        blocks.append([block.error_solved for block in callback.report.events[0].blocks])
        masks.append({name.replace(".base_layer", ""): kept for name, kept in masks_in(tmp_path / "end.ckpt").items()})
    assert masks[0].keys() == masks[1].keys()
    same = [float((kept == masks[1][name]).float().mean()) for name, kept in masks[0].items()]
    assert min(same) > 0.98, same  # sums in another order round otherwise
    assert len(blocks[0]) == 2
    assert blocks[0] == pytest.approx(blocks[1], rel=0.02)


def masks_in(checkpoint: Path) -> dict[str, Tensor]:
    states = torch.load(checkpoint, weights_only=True)["callbacks"]["ThanosPruningCallback"]["masks"]
    return {name: LayerMask.from_state(state).keep for name, state in states.items()}


def test_an_adapter_goes_on_after_an_event_from_what_it_had_learnt(tmp_path: Path) -> None:
    is_zero: list[bool] = []

    def look(trainer: Any, pl_module: Any, *_: Any) -> None:
        layer = pl_module.model.model.layers[0].mlp.up_proj
        up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        is_zero.append(not up.any())
        assert trainer.optimizers[0].state[up]["exp_avg"].any()
        assert down.any()

    train(Lora(adapt(tiny_llama())), tmp_path, pruning(DURING), at("on_train_batch_end", look), steps=9)
    # this callback looks after the one that prunes, at the steps 1 to 9: lora_B is 0 after an event and only then
    assert is_zero == [step in (4, 8) for step in range(1, 10)]


def test_the_adapter_beside_its_sparse_base_is_what_was_trained(tmp_path: Path) -> None:
    module = Lora(adapt(tiny_llama()))
    train(module, tmp_path, pruning(BOTH))
    base = exported(tmp_path, "beside", keep_adapter=True)
    assert all(report.ok for report in verify_checkpoint(tmp_path / "beside"))
    card = (tmp_path / "beside" / "README.md").read_text()
    assert "LoRA adapters lie beside it (default). They add nothing where a weight is 0" in card
    model = PeftModel.from_pretrained(base, tmp_path / "beside" / "default", torch_device="cpu")
    assert not torch.equal(logits(model), logits(module))
    mask_adapters(model)
    assert torch.equal(logits(model), logits(module))
    assert torch.equal(logits(model.merge_and_unload()), logits(exported(tmp_path)))


def test_there_is_no_adapter_to_keep(tmp_path: Path) -> None:
    train(ToyLM(), tmp_path, pruning(), steps=1)
    with pytest.raises(ValueError, match="no LoRA adapter of a pruned layer to keep: leave out --keep-adapter"):
        exported(tmp_path, keep_adapter=True)
    assert not (tmp_path / "exported").exists()


def test_masks_of_frozen_weights_are_not_held_and_still_proven(tmp_path: Path) -> None:
    module, callback = Lora(adapt(tiny_llama())), pruning(verify_every_n_steps=1)
    train(module, tmp_path, callback, steps=3)
    assert callback._run is not None
    enforcer = callback._run.enforcer
    assert len(enforcer.masked) == 14
    assert not enforcer._drops
    enforcer.verify()
    layer = module.model.model.layers[1].mlp.down_proj
    row = layer.weight.data[0]
    row[row == 0] = 1.0
    with pytest.raises(ZeroViolationError, match=r"24 of 768 pruned entries of model.*layers\.1\.mlp\.down_proj\.base"):
        enforcer.verify()


def test_a_base_that_is_trained_from_some_step_on_keeps_its_zeros(tmp_path: Path) -> None:
    def unfreeze(trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            frozen = [one for one in pl_module.parameters() if not one.requires_grad]
            trainer.optimizers[0].add_param_group({"params": [one.requires_grad_(True) for one in frozen]})

    module = Lora(adapt(tiny_llama()))
    train(module, tmp_path, pruning(verify_every_n_steps=1), at("on_train_batch_start", unfreeze), steps=6)
    weight = module.model.model.layers[0].mlp.up_proj.weight
    assert NM(2, 4).violations(weight != 0) == 0
    assert not torch.equal(weight, tiny_llama().model.layers[0].mlp.up_proj.weight)


def test_adapters_that_are_put_on_in_setup_are_masked(tmp_path: Path) -> None:
    module: Any = Lora(tiny_llama())
    module.setup = lambda stage: adapt(module.model)
    train(module, tmp_path, pruning())
    assert torch.equal(logits(exported(tmp_path)), logits(module))


def test_adapters_that_an_export_cannot_merge_are_said(tmp_path: Path) -> None:
    module = Lora(adapt(tiny_llama(), target_modules=["up_proj", "embed_tokens"]))
    with pytest.warns(UserWarning, match=r"1 adapter\(s\) of peft are no plain LoRA .* such as model.*embed_tokens"):
        train(module, tmp_path, pruning(), steps=1)


def test_a_kept_weight_of_zero_is_not_taken_for_pruned(tmp_path: Path) -> None:
    module = Lora(adapt(tiny_llama()))
    module.model.model.layers[0].mlp.up_proj.weight.data[:, :3] = 0  # more than 2:4 may drop
    train(module, tmp_path, pruning(), steps=2)
    masks = masks_in(tmp_path / "end.ckpt")
    assert NM(2, 4).violations(masks["model.model.layers.0.mlp.up_proj.base_layer.weight"]) == 0
    assert {float(keep.float().mean()) for keep in masks.values()} == {0.5}


@pytest.mark.parametrize("pattern", ["channels", pytest.param("structured", marks=pytest.mark.rest)])
def test_adapters_of_whole_columns_and_channels_are_merged_and_taken_out(pattern: str, tmp_path: Path) -> None:
    module = Lora(adapt(tiny_llama()))
    options: dict[str, Any] = {"multiple_of": 8} if pattern == "channels" else {}
    train(module, tmp_path, ThanosPruningCallback(pattern, 0.5, **options, **grouped(**DURING)))
    smaller = exported(tmp_path)
    torch.testing.assert_close(logits(smaller), logits(module), rtol=1e-4, atol=1e-5)
    assert all(report.ok for report in verify_checkpoint(tmp_path / "exported"))
    if pattern == "channels":
        with pytest.raises(ValueError, match="as wide as the model was in training: give --keep-shape"):
            exported(tmp_path, "beside", keep_adapter=True)
        base = exported(tmp_path, "beside", keep_adapter=True, keep_shape=True)
        model = PeftModel.from_pretrained(base, tmp_path / "beside" / "default", torch_device="cpu")
        mask_adapters(model)
        torch.testing.assert_close(logits(model), logits(module), rtol=1e-4, atol=1e-5)
    assert smaller.config.intermediate_size == (24 if pattern == "channels" else 48)


def test_adapters_of_layers_that_are_not_pruned_are_said_and_merged(tmp_path: Path) -> None:
    module = Lora(adapt(tiny_llama()))
    said = r"8 adapter\(s\) of peft are on layers that are not pruned, such as model\.mod"
    with pytest.warns(UserWarning, match=said):
        train(module, tmp_path, pruning(targets="*.mlp.*"))
    merged = exported(tmp_path)
    assert torch.equal(logits(merged), logits(module))
    assert bool((merged.model.layers[0].self_attn.q_proj.weight != 0).all())
    assert len(verify_checkpoint(tmp_path / "exported")) == 6


def test_validation_without_a_fit_computes_what_was_trained(tmp_path: Path) -> None:
    module = Lora(adapt(tiny_llama()))
    fit = train(module, tmp_path, pruning())
    (expected,) = fit.validate(module, loader(8), verbose=False)
    other = trainer(tmp_path, pruning())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,) = other.validate(Lora(adapt(tiny_llama())), loader(8), str(tmp_path / "end.ckpt"), verbose=False)
    assert found == expected


@pytest.mark.rest
def test_compiled_adapters_are_trained_as_if_they_were_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # whose checks torch.compile can't trace
    torch._dynamo.reset()
    ends = []
    for compiled in (False, True):
        module = Lora(adapt(tiny_llama()))
        for block in module.model.model.layers if compiled else ():
            block.compile(backend="eager", fullgraph=True)
        train(module, tmp_path / str(compiled), pruning(DURING))
        ends.append(module.state_dict())
    torch.testing.assert_close(*ends)
