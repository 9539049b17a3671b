from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from require import only
from tiny_mixtures import DEEPSEEK, MIXTURES, tiny_mixture
from torch import Tensor, nn
from toy import ToyLM, ZeroProbe, at, grouped, loader, tiny_llama, trainer

from thanos_lightning import Allocation, SparsitySchedule, TargetOverride, ThanosPruningCallback
from thanos_lightning.layers.experts import Mixture, find_mixtures

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the model's weights")


def dropping(sparsity: float = 0.5, **options: Any) -> ThanosPruningCallback:
    settings: dict[str, Any] = {"schedule": SparsitySchedule(at=[2, 5]), "steps": 2}
    if "batches" in options:
        settings = {"schedule": SparsitySchedule(at=[0])}
    return ThanosPruningCallback(options.pop("pattern", "experts"), sparsity, **grouped(**{**settings, **options}))


def fit(folder: Path, model: Any, pruning: ThanosPruningCallback, *others: Callback, steps: int = 6) -> ToyLM:
    trainer(folder, pruning, *others, max_steps=steps).fit(module := ToyLM(model), loader())
    return module


def gone_of(mixture: Mixture) -> list[int]:
    """The experts whose matrices are all zero."""
    parameters = [mixture.experts.gate_up_proj, mixture.experts.down_proj]
    return [one for one in range(mixture.size) if all(not parameter[one].any() for parameter in parameters)]


def gone_from(module: nn.Module) -> list[list[int]]:
    return [gone_of(mixture) for mixture in find_mixtures(module).values()]


class Chosen(Callback):
    """Notes after each batch which experts are gone, and to which the batch went."""

    def __init__(self) -> None:
        self.gone: list[list[list[int]]] = []
        self.chosen: list[list[set[int]]] = []
        self._open: list[set[int]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for mixture in find_mixtures(pl_module).values():
            mixture.router.register_forward_hook(self._note)

    def _note(self, router: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        numbers = output[2] if len(output) == 3 else output[0].nonzero()[:, 1]
        self._open.append(set(numbers.flatten().tolist()))

    def on_train_batch_start(self, *_: Any) -> None:
        self._open = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.chosen.append(self._open)
        self.gone.append(gone_from(pl_module))


@pytest.mark.parametrize("family", only(["mixtral", "llama 4"], [*MIXTURES]))
def test_experts_that_went_stay_zero_and_get_no_token(tmp_path: Path, family: str) -> None:
    seen, pruning = Chosen(), dropping(0.75)
    probe = ZeroProbe(pruning)
    size = 16 if "groups" in family else 8  # so that each of two groups loses some at both events
    fit(tmp_path, tiny_mixture(family, size), pruning, seen, probe, steps=8)
    numbers = [[len(gone) for gone in mixtures] for mixtures in seen.gone]
    assert numbers == [[0, 0]] + 3 * [[size * 5 // 8] * 2] + 4 * [[size * 3 // 4] * 2]
    assert probe.checked
    for gone, chosen in zip(seen.gone, seen.chosen[1:], strict=False):
        assert all(not one & set(lost) for one, lost in zip(chosen, gone, strict=True))
    assert all(len(one) > 1 for one in seen.chosen[-1])
    if "groups" in family:
        assert all(sum(expert < 8 for expert in gone) == 6 for gone in seen.gone[-1])
    first, second = pruning.report.events
    assert [layer.name.rpartition(".")[2] for layer in second.layers] == ["experts", "experts"]
    assert [layer.sparsity for layer in (*first.layers, *second.layers)] == [0.625, 0.625, 0.75, 0.75]
    assert all(0 < layer.relative_loss < 1 for layer in second.layers)
    assert first.layers[0].tokens == 2 * 4 * 16 * (1 if family == "llama 4" else 2)


def given_by_experts(model: Any, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """For each mixture the mean of the squared norm of what each expert gives a token that it gets, times its share."""
    found: list[list[list[float]]] = [[[] for _ in range(8)] for _ in model.model.layers]

    def note(number: int, experts: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, shares = inputs
        for token, (numbers, own) in enumerate(zip(chosen, shares, strict=True)):
            for expert, share in zip(numbers.tolist(), own, strict=True):
                gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
                output = experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                found[number][expert].append(float((share * output).square().sum()))

    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda module, args, n=number: note(n, module, args))
        for number, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return [torch.tensor([sum(own) / max(1, len(own)) for own in experts]) for experts in found]


def test_those_go_that_give_least_to_the_tokens_that_they_get(tmp_path: Path) -> None:
    model, batches = tiny_mixture(), list(loader(16))
    given = given_by_experts(model, batches)
    fit(tmp_path, model, dropping(0.375, batches=batches), steps=1)
    assert gone_from(model) == [sorted(means.argsort()[:3].tolist()) for means in given]


def test_an_expert_that_no_token_reached_goes_first(tmp_path: Path) -> None:
    model: Any = tiny_mixture("deepseek 3")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias[3] = -10
            layer.mlp.experts.down_proj[0] = 0  # it gives nothing, to some tokens
            layer.mlp.experts.down_proj[3] *= 1000
    fit(tmp_path, model, dropping(0.125, batches=list(loader(16))), steps=1)
    assert gone_from(model) == [[3], [3]]


def test_an_expert_that_went_does_not_come_back_for_one_that_no_token_reached(tmp_path: Path) -> None:
    model: Any = tiny_mixture("deepseek 3")
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias[4:] = -10

    def shut(trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            for layer in model.model.layers:
                layer.mlp.gate.e_score_correction_bias[[0, 1]] = -10

    fit(tmp_path, model, dropping(0.625), at("on_train_batch_end", shut))
    assert gone_from(model) == [[0, 4, 5, 6, 7]] * 2


def test_experts_of_one_mixture_are_compared_in_one_window(tmp_path: Path) -> None:
    of_mixture = 8 * 4 * 24**2
    others = [TargetOverride(["*.self_attn.*"], "2:4")]  # with which a mixture does not fit, and without does
    settings: dict[str, Any] = {
        "schedule": SparsitySchedule(at=[4]),
        "memory_gib": 1.1 * of_mixture / 2**30,
        "steps": 1,
    }
    module = fit(tmp_path, tiny_mixture(), dropping(overrides=others, **settings))
    assert [len(gone) for gone in gone_from(module)] == [4, 4]
    with pytest.raises(ValueError, match=r"all experts of model.model.layers.0.mlp.experts.*Raise it to that"):
        fit(tmp_path, tiny_mixture(), dropping(memory_gib=0.9 * of_mixture / 2**30))


def test_other_layers_have_their_own_pattern_and_no_block_is_reconstructed(tmp_path: Path, capsys: Any) -> None:
    pruning = dropping(overrides=[TargetOverride(["*.self_attn.*"], "2:4")], batches=list(loader(8)))
    fit(tmp_path, model := tiny_mixture("qwen2"), pruning, steps=1)
    assert [layer.pattern for layer in pruning.report.events[0].layers] == ["2:4"] * 8 + ["experts"] * 2
    assert pruning.report.events[0].blocks == []
    assert "4 of 8 experts stay in each of 2 mixtures, 2 for each token" in " ".join(capsys.readouterr().out.split())
    assert model.model.layers[0].self_attn.q_proj.weight.eq(0).float().mean() == 0.5
    assert model.model.layers[0].mlp.shared_expert.up_proj.weight.ne(0).all()


@pytest.mark.rest
def test_a_scan_for_other_layers_passes_by_experts(tmp_path: Path) -> None:
    pruning = dropping(
        0.6, pattern="unstructured", schedule=SparsitySchedule(at=[4]), allocation=Allocation("loss"),
        overrides=[TargetOverride(["*.experts.*"], "experts", 0.25)], targets=["*.self_attn.*", "*.experts.*"],
    )  # fmt: skip
    module = fit(tmp_path, tiny_mixture(), pruning)
    layers = pruning.report.events[0].layers
    assert len({layer.sparsity for layer in layers if layer.pattern == "unstructured"}) > 1
    assert [len(gone) for gone in gone_from(module)] == [2, 2]


def test_a_loaded_checkpoint_is_validated_without_the_experts_that_went(tmp_path: Path) -> None:
    trained = trainer(tmp_path, dropping(0.5), max_steps=8)
    trained.fit(module := ToyLM(tiny_mixture()), loader())
    trained.save_checkpoint(tmp_path / "end.ckpt")
    expected = trainer(tmp_path).validate(module, loader(), verbose=False)
    found, without = (
        again.validate(ToyLM(tiny_mixture()), loader(), ckpt_path=tmp_path / "end.ckpt", verbose=False)
        for again in (trainer(tmp_path, dropping(0.5)), trainer(tmp_path))
    )
    assert found == expected
    assert without != expected  # a router of a module that knows nothing of it chooses among all


def test_a_new_callback_refuses_a_module_that_has_lost_experts(tmp_path: Path) -> None:
    module = ToyLM(tiny_mixture())
    first = trainer(tmp_path, dropping(), max_steps=6)
    first.fit(module, loader())
    first.fit_loop.epoch_loop.max_steps = 8
    first.fit(module, loader())  # the same Trainer goes on
    with pytest.raises(MisconfigurationException, match="another training has dropped experts of model"):
        trainer(tmp_path, dropping(), max_steps=6).fit(module, loader())


@pytest.mark.rest
def test_a_compiled_module_learns_which_experts_went(tmp_path: Path) -> None:
    losses = []
    for compiles in (False, True):
        model = tiny_mixture("qwen3")
        if compiles:
            model.compile(backend="aot_eager")
        losses.append(fit(tmp_path, model, dropping(0.75), steps=8).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def in_groups(open_groups: int = 1) -> t.PreTrainedModel:
    config = {**DEEPSEEK, "n_routed_experts": 16, "n_group": 4, "topk_group": open_groups}
    return t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**config))


def without_a_router() -> Any:
    model = tiny_mixture()
    for layer in model.model.layers:
        del layer.mlp.gate.top_k
    return model


def over(*args: Any) -> dict[str, Any]:
    return {"overrides": [TargetOverride(*args)]}


NO_BATCHES: dict[str, Any] = {"method": "magnitude", "admm_steps": 0, "refine_steps": 0}


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (tiny_mixture, {"sparsity": 0.05}, "which rounds to none: raise the sparsity to 0.125"),
        (tiny_llama, {}, "ToyLM has no mixture of experts that transformers keeps in one parameter"),
        (tiny_mixture, {"targets": ["*.self_attn.*"]}, "no target is a matrix of an expert: add to targets"),
        (tiny_mixture, {"ignore": ["*.1.mlp.*"]}, r"all 2 mixtures of a .*1.mlp.experts.0.down_proj is not among"),
        (
            tiny_mixture,
            over("*.up_proj", "2:4"),
            r"0.mlp.experts.0.up_proj has the pattern 2:4: give all their matrices",
        ),
        (tiny_mixture, over("*.0.mlp.*", "experts", 0.25), "lose 0.25 or 0.5 of their experts, but a model has one nu"),
        (tiny_mixture, over("*.self_attn.*", "channels", 0.25), "channels and experts can't go in one training"),
        (tiny_mixture, {"allocation": Allocation("loss")}, "experts go in equal number from each layer"),
        (tiny_mixture, NO_BATCHES, "looks at no batches"),
        (tiny_mixture, {"sparsity": 0.875}, r"1 of the 8 experts of .*, fewer than the 2 .*: lower .* to 0.75"),
        (in_groups, {"sparsity": 0.75}, r"4 groups, 1 of them in the 1 groups .*: lower .* to 0.5"),
        (in_groups, {"sparsity": 0.1}, r"each of 4 groups, which rounds to none: .* to 0.25"),
        (partial(in_groups, 4), {"sparsity": 0.75}, r"DeepseekV3TopkRouter\) can't choose among 4 of its 16 experts"),
        (without_a_router, {}, r"no router is known beside the experts model.model.layers.0.mlp"),
        (tiny_mixture, {"damping": 0.5}, "solver.damping is 0.5, but the pattern 'experts' sol"),
    ],
)
def test_what_can_t_be_dropped_is_refused_before_the_training(
    tmp_path: Path, build: Any, options: dict[str, Any], message: str
) -> None:
    module = ToyLM(build())
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, dropping(**options), max_steps=6).fit(module, loader())
    assert module.losses == []
