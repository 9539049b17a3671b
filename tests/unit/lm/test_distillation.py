import pytest
import torch
from torch import nn
from toy import loader, tiny_llama
from transformers import GraniteConfig, GraniteForCausalLM

from thanos_lightning.lm import distillation
from thanos_lightning.lm.distillation import Distillation, check_teacher, distil, divergence, head_losses

PADDED = loader(2, batch_size=2, length=8, padding=3, vocabulary=13)


@pytest.fixture(autouse=True, params=[3, 1024])
def _chunk(request, monkeypatch):
    monkeypatch.setattr(distillation, "TOKENS_PER_CHUNK", request.param)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(student, teacher):
    p, q = (logits.double().softmax(-1) for logits in (teacher, student))
    return (p * (p / q).log()).sum(-1)


def test_divergence_is_its_definition_and_so_is_its_gradient():
    student, teacher = ((3 * randn(2, 5, 7, seed=seed)).requires_grad_() for seed in (0, 1))
    loss = divergence(student, teacher)
    expected = by_definition(student, teacher).mean()
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(student.grad, torch.autograd.grad(expected, student)[0], rtol=1e-4, atol=1e-7)
    assert teacher.grad is None


def test_what_does_not_count_changes_nothing():
    counted = torch.tensor([[True, True, False, False], [True, True, True, False]])
    student, teacher = randn(2, 4, 6), randn(2, 4, 6, seed=1)
    expected = by_definition(student, teacher)[counted].mean()
    spoilt = torch.where(counted.unsqueeze(-1), student, torch.inf)
    for mask in (counted, counted.long()):
        assert float(divergence(spoilt, teacher, counted=mask)) == pytest.approx(float(expected), rel=1e-5)
    assert float(divergence(student, teacher, torch.zeros_like(counted))) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_in_float32(dtype):
    student, teacher = (10 * randn(2, 5, 50, seed=seed, dtype=dtype) for seed in (0, 1))
    assert float(divergence(student, teacher)) == pytest.approx(float(by_definition(student, teacher).mean()), rel=1e-4)
    assert divergence(student, teacher).dtype == torch.float32


@pytest.mark.parametrize("chunks", [1, 2, 7, 40])
def test_the_number_of_chunks_changes_no_loss(chunks):
    torch.manual_seed(0)
    heads = [nn.Linear(6, 11, bias=False) for _ in range(2)]
    student, teacher, labels = randn(3, 5, 6), randn(3, 5, 6, seed=1), torch.randint(11, (3, 5))
    expected = head_losses(student, teacher, *heads, labels)
    calls = []
    heads[0].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(head_losses(student, teacher, *heads, labels, chunks=chunks), expected)
    assert len(calls) == chunks
    nothing, _ = head_losses(student, teacher, *heads, torch.full_like(labels, -100))
    assert float(nothing) == 0


def test_a_teacher_that_does_not_fit_is_named():
    states = randn(1, 3, 4)
    with pytest.raises(ValueError, match=r"\(1, 3, 4\) and the teacher's \(1, 3, 5\): .*vocabulary"):
        divergence(states, randn(1, 3, 5))
    heads = nn.Linear(4, 6), nn.Linear(4, 7)
    with pytest.raises(ValueError, match=r"\(3, 6\) and the teacher's \(3, 7\): .*vocabulary"):
        head_losses(states, states, *heads, torch.zeros(1, 3, dtype=torch.int64))


def llama(seed=0, **config):
    return tiny_llama(seed, **{"vocab_size": 13, "initializer_range": 0.3, **config}).eval()


def test_distil_compares_what_both_models_say():
    student, teacher, batch = llama(), llama(seed=1, num_hidden_layers=3, hidden_size=64), next(iter(PADDED))
    check_teacher(student, teacher)
    own = student(**batch)
    with torch.no_grad():
        its = teacher(**batch).logits
    expected = own.loss, by_definition(own.logits, its)[batch["attention_mask"].bool()].mean()
    losses = distil(student, teacher, batch)
    for pair in zip(losses, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=0, check_dtype=False)
        gradients = (torch.autograd.grad(one, list(student.parameters()), retain_graph=True) for one in pair)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    sum(losses).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": -1.0}, "logits is -1.0"),
        ({"cross_entropy": float("nan")}, "cross_entropy is nan"),
        ({"logits": 0}, "nothing would be learnt from the teacher"),
        ({"logits": "1"}, "logits is '1': give a weight"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_a_distillation_that_can_not_be_right_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Distillation("start", **arguments)


def test_a_teacher_of_another_vocabulary_is_refused():
    student, other = llama(), llama(vocab_size=14)
    for name, words in (
        ("", "has a vocabulary of 14 tokens and the model one of 13"),
        ("some/where", "'some/where' has"),
    ):
        other.name_or_path = name
        with pytest.raises(ValueError, match=f"the teacher {words}"):
            check_teacher(student, other)


def test_a_model_that_caps_its_logits_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    scaled = GraniteForCausalLM(GraniteConfig(vocab_size=13, logits_scaling=8.0, **sizes))
    with pytest.raises(ValueError, match="GraniteForCausalLM does more to its logits than its head"):
        check_teacher(llama(), scaled)
