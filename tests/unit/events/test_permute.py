import pytest
import torch
from toy import VOCABULARY, tiny_gpt2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from thanos_lightning.calibration.fisher import sampled_loss
from thanos_lightning.events.permute import permute_channels
from thanos_lightning.models.channels import exchangeable_channels
from thanos_lightning.models.targets import find_targets
from thanos_lightning.solver import NM, Unstructured

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


READERS = (*(f"self_attn.{n}_proj" for n in "qkv"), "mlp.gate_proj", "mlp.up_proj")


def batches(number=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(VOCABULARY, (4, 12), generator=generator)} for _ in range(number)]


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """With weights, biases and norms that are all different, so that nothing hides behind a one or a zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if parameter.ndim == 2:
                parameter.mul_(torch.rand(parameter.shape[1], generator=generator) ** 2 * 3)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**batches(1, seed=9)[0]).logits


MODELS = {
    "llama": lambda: tiny_llama(head_dim=32),
    "untied": lambda: tiny_llama(head_dim=32, tie_word_embeddings=False),
    "with biases": lambda: tiny_llama(head_dim=32, attention_bias=True, mlp_bias=True),
    "as many heads as queries": lambda: tiny_llama(head_dim=32, num_key_value_heads=4),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_what_it_did(name):
    model = spread(MODELS[name]()).double()
    expected, before = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    reordered = permute_channels(model, batches())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)  # norms compute in float32
    assert expected.std() > 0.1
    heads = {"as many heads as queries": 4}.get(name, 2)
    assert len(reordered) == 1 + 2 * (1 + heads)
    for found in reordered:
        assert found.order.tolist() != list(range(found.channels.size))
        assert found.kept > found.kept_before
    for parameter_name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[parameter_name])
        assert same == ("q_norm" in parameter_name or "k_norm" in parameter_name or parameter_name.endswith(
            ("q_proj.bias", "k_proj.bias")
        )), parameter_name  # fmt: skip


def inputs_of(model):
    inputs = {}
    layers = {name: layer.modules[0] for name, layer in find_targets(model).items()}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, 1))
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches():
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: (layers[name].weight.detach().double(), torch.cat(inputs[name]).double()) for name in layers}


def scores_of(weight, X):
    """In float64, from the whole inputs."""
    H = 2 * X.T @ X / len(X)
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
    S = weight**2 * (H.diagonal() / torch.linalg.inv(H).diagonal()).sqrt()
    return S / S.sum()


def kept_of(S, pattern):
    return float(S.reshape(-1, pattern.m).sort(dim=1).values[:, -pattern.n :].sum())


def lost(model, pattern):
    """The parts of the layers' worth that the pattern takes, on average."""
    layers = inputs_of(model)
    return 1 - sum(kept_of(scores_of(*layer), pattern) for layer in layers.values()) / len(layers)


def gradients_of(model):
    """Sums of squares at the outputs of the layers, by ordinary gradients of the labels that the model draws."""
    layers = {name: layer.modules[0] for name, layer in find_targets(model).items()}
    outputs = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
        for name, layer in layers.items()
    ]
    scores = model(**batches()[0]).logits  # of four batches, one
    for handle in handles:
        handle.remove()
    counted = torch.ones(scores.shape[:2], dtype=torch.bool)
    counted[:, -1] = False
    found = torch.autograd.grad(sampled_loss(scores, counted, seed=0), list(outputs.values()))
    return {name: one.double().square().sum((0, 1)) for name, one in zip(outputs, found, strict=True)}


def test_a_weight_is_worth_what_the_loss_would_feel():
    model = spread(tiny_llama())
    before, gradients = inputs_of(model), gradients_of(model)
    residual, mlp, *_ = permute_channels(model, batches())

    def worth(name):
        weight, X = before[name]
        g = gradients[name] + 0.01 * gradients[name].mean()
        H = 2 * X.T @ X / len(X)
        H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
        return g.unsqueeze(1) * weight**2 * (H.diagonal() / torch.linalg.inv(H).diagonal()).sqrt()

    together = torch.cat([worth(f"model.layers.{i}.{n}") for i in (0, 1) for n in READERS])
    together /= together.sum()
    assert residual.kept_before == pytest.approx(kept_of(together, NM(2, 4)), rel=1e-4)
    assert residual.kept == pytest.approx(kept_of(together[:, residual.order], NM(2, 4)), rel=1e-4)
    down = worth("model.layers.0.mlp.down_proj")
    assert mlp.kept == pytest.approx(kept_of((down / down.sum())[:, mlp.order], NM(2, 4)), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_model_has_gradients_at_its_outputs_too():
    trainable, frozen = spread(tiny_llama()), spread(tiny_llama()).requires_grad_(False)
    found = [[one.order.tolist() for one in permute_channels(model, batches())] for model in (trainable, frozen)]
    assert found[0] == found[1]


@pytest.mark.parametrize("pattern", ["2:4", "4:8", NM(1, 4)])
def test_the_pattern_takes_less(pattern):
    model = spread(tiny_llama())
    parsed = NM(*map(int, pattern.split(":"))) if isinstance(pattern, str) else pattern
    before = lost(model, parsed)
    permute_channels(model, batches(), pattern)
    assert lost(model, parsed) < 0.9 * before


def test_padding_does_not_count():
    plain = batches()
    padded = [
        {
            "input_ids": torch.cat([batch["input_ids"], torch.full((4, 20), 7)], 1),
            "attention_mask": torch.cat([torch.ones(4, 12), torch.zeros(4, 20)], 1).long(),
        }
        for batch in plain
    ]
    counted = [{"input_ids": batch["input_ids"]} for batch in padded]
    shares = [
        torch.tensor([found.kept_before for found in permute_channels(spread(tiny_llama()), these)])
        for these in (plain, padded, counted)
    ]
    torch.testing.assert_close(shares[0], shares[1], rtol=1e-5, atol=0)
    assert (shares[0] - shares[2]).abs().max() > 1e-3


def test_only_what_a_target_reads_is_reordered():
    reordered = permute_channels(spread(tiny_llama()), batches(), targets="down_proj")
    assert [found.channels.name for found in reordered] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_hessians_that_do_not_fit_together_are_made_one_after_another():
    at_once, in_turn = (spread(tiny_llama()) for _ in range(2))
    forwards = []
    in_turn.register_forward_hook(lambda *_: forwards.append(1))
    first = permute_channels(at_once, batches())
    second = permute_channels(in_turn, batches(), memory_gib=4 * 48**2 / 2**30)
    assert [a.order.tolist() for a in first] == [b.order.tolist() for b in second]
    # q and k, v and o, gate and up, down: four groups of each layer, two batches; and the first batch twice more, and
    # once for the gradients
    assert len(forwards) == 2 * 4 * 2 + 3


def test_only_some_rows_are_looked_at(monkeypatch):
    monkeypatch.setattr("thanos_lightning.events.permute._ROWS", 8)
    model = spread(tiny_llama())
    before = lost(model, NM(2, 4))
    permute_channels(model, batches())
    assert lost(model, NM(2, 4)) < before


def test_groups_wider_than_a_head_leave_the_heads():
    reordered = permute_channels(spread(tiny_llama()), batches(), "8:16")
    assert [found.channels.name for found in reordered] == [
        "residual stream",
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]


def test_a_bfloat16_model_and_one_that_trains():
    model = spread(tiny_llama()).bfloat16().train()
    permute_channels(model, batches())
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_saved_it_is_an_ordinary_model(tmp_path):
    model = spread(tiny_llama())
    expected = logits(model)
    permute_channels(model, batches())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=1e-3, atol=1e-4)


def test_a_model_that_is_not_what_it_seems_keeps_its_order():
    model = spread(tiny_llama())
    model.model.embed_tokens.register_forward_hook(lambda _, __, output: output * torch.arange(output.shape[-1]))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"computes other logits, by .* and has its old order again"):
        permute_channels(model, batches())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_whatever_fails_leaves_order_and_modes_as_they_were():
    model = spread(tiny_llama()).train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    forwards = []

    def fail(*_):
        forwards.append(1)
        if len(forwards) == 5:  # the first batch, it with gradients, both, and the first one reordered
            raise MemoryError

    handle = model.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        permute_channels(model, batches())
    handle.remove()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert [module.training for module in model.modules()] == modes
    permute_channels(model, batches())
    assert not torch.equal(model.lm_head.weight, before["model.embed_tokens.weight"])
    assert [module.training for module in model.modules()] == modes


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert permute_channels(spread(tiny_llama()), batches())


def test_layers_of_zeros_lose_nothing():
    model = spread(tiny_llama())
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.zero_()
    by_name = {found.channels.name: found for found in permute_channels(model, batches())}
    assert by_name["model.layers.1.mlp"].kept == by_name["model.layers.1.mlp"].kept_before == 1
    assert by_name["residual stream"].kept > by_name["residual stream"].kept_before


def test_models_that_are_not_known():
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel can't be reordered: known are decoders .*transformer\.wpe"):
        permute_channels(tiny_gpt2(), batches())
    model = tiny_llama()
    model.model.layers[1].gate = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match=r"its parameter model\.layers\.1\.gate is none of theirs"):
        exchangeable_channels(model)


def test_wrong_inputs():
    model = tiny_llama()
    with pytest.raises(ValueError, match="matters to N:M only"):
        permute_channels(model, batches(), Unstructured(0.5))
    with pytest.raises(ValueError, match="there are no batches"):
        permute_channels(model, [])
    with pytest.raises(ValueError, match=r"has no groups that lie within the channels .*32, 48, 8.*smaller M"):
        permute_channels(model, batches(), "32:64")
    with pytest.raises(ValueError, match="nothing"):
        permute_channels(model, batches(), targets="nothing")
    with pytest.raises(ValueError, match=r"no token of the batches reached layer model\.layers\.0"):
        permute_channels(model, [{**batches(1)[0], "attention_mask": torch.zeros(4, 12, dtype=torch.long)}])
    with pytest.raises(ValueError, match=r"more than memory_gib = 1e-06\. Raise it to that"):
        permute_channels(model, batches(), memory_gib=1e-6)
    model.model.layers[0].compile()
    with pytest.raises(ValueError, match="compiled"):
        permute_channels(model, batches())
