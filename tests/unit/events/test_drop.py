import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn
from toy import VOCABULARY, tiny_llama

from thanos_lightning.events.drop import drop_layers

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": VOCABULARY}
GROUPED: dict[str, Any] = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}


def gpt2(**sizes: Any) -> t.PreTrainedModel:
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=4, n_head=4, **sizes))


# Four layers, four heads: the configuration has two entries that are the number of layers
MODELS: dict[str, Any] = {
    "llama": lambda: tiny_llama(num_hidden_layers=4),
    "gpt2": gpt2,
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED, head_dim=8)),
    "gemma2, every other layer with a window": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**GROUPED, head_dim=8, sliding_window=3)
    ),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=3)),
    "smollm3, a layer without positions": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**GROUPED, pad_token_id=0)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**GROUPED, pad_token_id=0)),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
    ),
    "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL, intermediate_size=48)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=2)),
}
STACKS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt-neox": "gpt_neox.layers"}


def batches(number: int = 2, **others: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(VOCABULARY, (2, 12), generator=generator), **others} for _ in range(number)]


def spread(model: t.PreTrainedModel) -> t.PreTrainedModel:
    """With layers that are all different, and none of them small."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


class Through(nn.Module):
    """A decoder layer that gives what it gets."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


@torch.no_grad()
def loss_without(model: t.PreTrainedModel, stack: str, gone: tuple[int, ...]) -> float:
    """By transformers' own loss, with other layers put in their place."""
    layers: Any = model.get_submodule(stack)
    whole = list(layers)
    for index in gone:
        through = Through()
        through.attention_type = getattr(whole[index], "attention_type", None)  # type: ignore[assignment]
        layers[index] = through
    losses = [model(**batch, labels=batch["input_ids"], use_cache=False).loss for batch in batches()]
    for index in gone:
        layers[index] = whole[index]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("name", MODELS)
def test_the_cheapest_layers_go_and_the_folder_loads(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, stack = spread(MODELS[name]()).eval(), STACKS.get(name, "model.layers")
    found = drop_layers(model, batches(), 2)
    gone: tuple[int, ...] = ()
    for went, loss in zip(found.layers, found.losses[1:], strict=True):
        tried = {one: loss_without(model, stack, (*gone, one)) for one in range(4) if one not in gone}
        assert went == min(tried, key=tried.__getitem__)
        assert math.isclose(loss, tried[went], rel_tol=1e-5)
        gone = (*gone, went)
    assert math.isclose(found.losses[0], loss_without(model, stack, ()), rel_tol=1e-5)
    found.model.save_pretrained(tmp_path)
    loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(loaded.get_submodule(stack)) == 2
    with torch.no_grad():
        losses = [loaded(**batch, labels=batch["input_ids"]).loss for batch in batches()]
    assert math.isclose(float(torch.stack(losses).mean()), found.losses[-1], rel_tol=1e-5)
    assert len(model.get_submodule(stack)) == 4  # type: ignore[arg-type]


def test_a_try_begins_after_the_layer_that_is_tried() -> None:
    model: Any = spread(MODELS["llama"]())
    calls = dict.fromkeys(range(4), 0)
    for index, layer in enumerate(model.model.layers):

        def count(*_: Any, index: int = index) -> None:
            calls[index] += 1

        layer.mlp.register_forward_hook(count)
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own  # as of a package that wraps it
    drop_layers(model, batches(1), 1)
    assert calls == {0: 2, 1: 3, 2: 4, 3: 5}  # of the whole model, tries of all layers before, of the check
    assert [layer.__dict__.get("forward") for layer in model.model.layers] == [None, own, None, None]


def test_a_layer_takes_its_kind_along() -> None:
    model: Any = spread(MODELS["gemma2, every other layer with a window"]())
    first = model.model.layers[0]
    with torch.no_grad():
        for adds in (first.self_attn.o_proj, first.mlp.down_proj):
            adds.weight.zero_()  # nothing, so that it is the cheapest
    found = drop_layers(model, batches(), 1)
    assert found.layers == [0]
    assert found.losses[1] == pytest.approx(found.losses[0], rel=1e-5)
    assert found.model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]


def test_only_what_counts_is_measured() -> None:
    model = spread(tiny_llama(num_hidden_layers=3))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, 8:] = 0
    shorter = [{"input_ids": batch["input_ids"][:, :8]} for batch in batches()]
    labels = [{**batch, "labels": batch["input_ids"].masked_fill(torch.arange(12) >= 8, -100)} for batch in batches()]
    expected = drop_layers(model, shorter, 2)
    for padded in (batches(attention_mask=mask), labels):
        found = drop_layers(model, padded, 2)
        assert found.layers == expected.layers
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def test_a_list_within_a_layer_is_no_stack() -> None:
    model = spread(MODELS["gpt-neox"]())
    expected = drop_layers(model, batches(), 1).layers
    for layer in model.gpt_neox.layers:
        layer.attention.experts = nn.ModuleList(nn.Identity() for _ in range(4))
    assert drop_layers(model, batches(), 1).layers == expected


@pytest.mark.parametrize("training", [True, False])
def test_modes_stay(training: bool) -> None:
    model = tiny_llama(num_hidden_layers=3).train(training)
    model.model.norm.train(not training)
    smaller = drop_layers(model, batches(), 1).model
    assert smaller.training == model.training == training
    assert model.model.norm.training != training


@pytest.mark.parametrize("number", [-1, 0, 4])
def test_a_number_that_can_not_go(number: int) -> None:
    with pytest.raises(ValueError, match=rf"^{number} of the 4 layers can't be dropped: give 1 to 3$"):
        drop_layers(MODELS["llama"](), batches(), number)


def test_models_without_a_stack_of_their_own() -> None:
    bert = t.BertForMaskedLM(t.BertConfig(**SMALL, intermediate_size=48))
    bart = t.BartForConditionalGeneration(
        t.BartConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            max_position_embeddings=64,
        )
    )
    of_two_kinds = MODELS["llama"]()
    of_two_kinds.model.layers[1] = nn.Identity()
    for model, why in (
        (bert, "BertForMaskedLM is no causal language model"),
        (bart, r"has 2 stacks of layers \(model.encoder.layers, model.decoder.layers\)"),
        (of_two_kinds, "has no stack of layers of one kind whose number is in its configuration"),
    ):
        with pytest.raises(ValueError, match=rf"{why}, and no layer can be dropped: prune it in another way$"):
            drop_layers(model, batches(), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_depend_on_where_they_are(dtype: torch.dtype) -> None:
    model = spread(gpt2(scale_attn_by_inverse_layer_idx=True)).to(dtype)
    with pytest.raises(ValueError, match=r"depends on where it is: .* \(\d+\.\d% of their norm\)\. Don't drop layers"):
        drop_layers(model, batches(), 2)


def test_a_layer_that_no_configuration_can_miss_stays() -> None:
    sizes = {**GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8}
    model: Any = spread(t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**sizes, mlp_only_layers=[0])))
    with torch.no_grad():
        for adds in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            adds.weight.zero_()  # it would be the cheapest
    found = drop_layers(model, batches(), 2)
    assert 0 not in found.layers
    assert found.model.config.num_hidden_layers == 2
    with pytest.raises(ValueError, match=r"^no configuration of \w+ describes it with 3 of its 4 layers: drop none$"):
        drop_layers(subclass_of_llama(), batches(), 1)


def subclass_of_llama() -> t.PreTrainedModel:
    """Which transformers does not have under its name."""

    class Own(t.LlamaForCausalLM):
        pass

    return Own(t.LlamaConfig(**GROUPED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_configuration_does_not_hold_stays(dtype: torch.dtype) -> None:
    model = tiny_llama(num_hidden_layers=3).to(dtype)
    model.set_attn_implementation("eager")
    model.config.eos_token_id = [2, 3, 4]  # as many as layers
    model.get_input_embeddings().weight.requires_grad_(False)
    smaller = drop_layers(model, batches(), 1).model
    assert smaller.config._attn_implementation == "eager"
    assert smaller.config.eos_token_id == [2, 3, 4]
    frozen = [name for name, parameter in smaller.named_parameters() if not parameter.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    assert {parameter.dtype for parameter in smaller.parameters()} == {dtype}
    assert smaller.generation_config is not model.generation_config


def test_a_loss_that_is_not_finite() -> None:
    model: Any = spread(MODELS["llama"]())
    embedded: list[torch.Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda _, __, output: embedded.append(output))

    def fail(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0] * torch.nan,) if torch.equal(args[0], embedded[-1]) else args

    model.model.layers[1].register_forward_pre_hook(fail)  # only where the first layer is left out
    found = drop_layers(model, batches(), 1)
    assert found.layers != [0]
    assert all(map(math.isfinite, found.losses))
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    embedded.clear()
    with pytest.raises(ValueError, match=r"^the loss on the batches is nan: load the model in another dtype$"):
        drop_layers(model, batches(), 1)
    assert len(embedded) == 1  # no try before it is said


@pytest.mark.parametrize("nothing", [[], batches(labels=torch.full((2, 12), -100))])
def test_nothing_to_predict(nothing: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="nothing to predict in the batches: give some"):
        drop_layers(MODELS["llama"](), nothing, 1)
