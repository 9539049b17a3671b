"""What a training computes with is what an export, loaded, computes with: buffers that no checkpoint holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
import transformers as t
from checkpoint_cases import SIZES
from lightning.pytorch import Callback, Trainer
from tiny_mixtures import tiny_mixture
from torch import Tensor, nn
from toy import VOCABULARY, ToyLM, grouped, loader, momentum_sgd, tiny_llama, trainer

from thanos_lightning import SparsitySchedule, ThanosPruningCallback
from thanos_lightning.checkpoints.export import export_checkpoint
from thanos_lightning.checkpoints.huggingface import uncast_buffers

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (toy.FAMILIES[name][0], {}) for name in ("llama", "gpt2", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")},
    "gpt-neox": (t.GPTNeoXConfig, {"rotary_pct": 1.0}),
    # a table of sines and cosines; the heads are at least 4
    "codegen": (t.CodeGenConfig, {"n_embd": 32, "num_attention_heads": 4, "rotary_dim": 8}),
    "llama, long": (t.LlamaConfig, {"rope_parameters": YARN, "max_position_embeddings": 256}),
}
REST = [(family, half) for family in FAMILIES if family != "llama" for half in ("16-true", "bf16-mixed")]
REST += [("llama", "16-mixed")]
MIXTURES = ("olmoe", "deepseek 3", "gpt-oss")
TOKENS = torch.arange(3 * 40).view(3, 40) * 7 % VOCABULARY


def built(family: str) -> Any:
    if family in MIXTURES:
        own = {"moe_intermediate_size": 16} if family == "deepseek 3" else {}
        return tiny_mixture(family, 4, **own)
    torch.manual_seed(0)
    config, own = FAMILIES[family]
    return t.AutoModelForCausalLM.from_config(config(**{**SIZES, **own}))


def module(model: Any) -> ToyLM:
    return ToyLM(model, make_optimizer=momentum_sgd)  # Adam divides by 0 in float16


class Logits(Callback):
    """What the model gives in the validation at the end, in the Trainer's own precision."""

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        with trainer.precision_plugin.val_step_context():
            self.last = pl_module(input_ids=TOKENS).logits


def unsaved(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict()
    return {name: value for name, value in model.named_buffers() if name not in saved}


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        *((family, "bf16-true") for family in (*FAMILIES, *MIXTURES)),
        *(("llama", precision) for precision in ("16-true", "bf16-mixed", "32-true")),
        *(pytest.param(*one, marks=pytest.mark.rest) for one in REST),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_exported_model_is_the_trained_one(family: str, precision: Any, tmp_path: Path) -> None:
    lm, logits = module(built(family)), Logits()
    cheap = grouped(pattern="2:4", method="magnitude", admm_steps=0, refine_steps=0)
    pruning = ThanosPruningCallback(**cheap, schedule=SparsitySchedule(at=[1]))
    fitting = trainer(tmp_path, pruning, logits, max_steps=2, val_check_interval=2, precision=precision)
    fitting.fit(lm, loader(8), loader(4))
    fitting.save_checkpoint(tmp_path / "trained.ckpt")
    export_checkpoint(tmp_path / "trained.ckpt", tmp_path / "exported")
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert loaded.dtype == lm.model.dtype
    own, its = unsaved(lm.model), unsaved(loaded)
    assert own.keys() == its.keys()
    for name, value in own.items():
        assert value.dtype == its[name].dtype, name
        assert torch.equal(value, its[name]), name
    with torch.no_grad(), fitting.precision_plugin.val_step_context():
        in_its_context = loaded(input_ids=TOKENS).logits
    assert torch.equal(logits.last, in_its_context)
    with torch.no_grad():
        assert torch.equal(lm.model.eval()(input_ids=TOKENS).logits, loaded(input_ids=TOKENS).logits)
    fitting.validate(lm, loader(4), verbose=False)  # which casts the model again
    assert torch.equal(logits.last, in_its_context)


def test_a_model_that_was_cast_by_hand_gets_its_values_back_and_other_modules_stay_cast() -> None:
    lm = module(tiny_llama())
    lm.register_buffer("own", torch.ones(3), persistent=False)
    lm.to(torch.bfloat16)
    before = torch.get_rng_state()
    uncast_buffers(lm)
    assert torch.equal(before, torch.get_rng_state())
    assert lm.get_buffer("own").dtype == torch.bfloat16
    for name, value in unsaved(tiny_llama()).items():
        assert torch.equal(unsaved(lm.model)[name], value)
