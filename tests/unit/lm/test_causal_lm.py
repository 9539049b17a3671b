import math
import warnings
from functools import partial

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.nn import functional
from toy import at, loader, trainer

from thanos_lightning import CalibrationOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.lm import CausalLM
from thanos_lightning.lm.causal_lm import lr_factor
from thanos_lightning.lm.pretrained import load_pretrained

_trainer = partial(trainer, None, num_sanity_val_steps=0)  # which writes no file


def _batches(number=3, padding=0):
    return loader(2 * number, batch_size=2, length=9, padding=padding, vocabulary=12)


def _mean_nll(model, batches):
    batches = list(batches)
    with torch.no_grad():
        logits = [model(**{**batch, "labels": None}).logits[:, :-1].double().flatten(end_dim=1) for batch in batches]
    labels = [batch["labels"][:, 1:].flatten() for batch in batches]
    return functional.cross_entropy(torch.cat(logits), torch.cat(labels)).item()


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("chunk", [5, 2048])
def test_perplexity_is_exp_of_the_mean_nll(tiny, monkeypatch, padding, chunk):
    monkeypatch.setattr("thanos_lightning.lm.causal_lm._TOKENS_PER_CHUNK", chunk)
    batches, lm = _batches(padding=padding), CausalLM(tiny)
    expected = _mean_nll(load_pretrained(tiny), batches)
    for stage, run in (("val", _trainer().validate), ("test", _trainer().test)):
        (metrics,) = run(lm, batches, verbose=False)
        wanted = {f"{stage}/perplexity": math.exp(expected), f"{stage}/loss": expected}
        assert metrics == pytest.approx(wanted, rel=1e-5)


def test_fit_validates_after_validate(tiny):
    # Trainer.validate runs in inference mode, the validation of a fit does not
    lm, trainer = CausalLM(tiny), _trainer(max_steps=3)
    trainer.validate(lm, _batches(), verbose=False)
    trainer.fit(lm, _batches(), _batches())
    expected = math.exp(_mean_nll(lm.model, _batches()))
    assert trainer.callback_metrics["val/perplexity"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_learns(tiny, gradient_checkpointing):
    lm = CausalLM(tiny, learning_rate=1e-2, gradient_checkpointing=gradient_checkpointing)
    trainer = _trainer(max_epochs=10)
    trainer.fit(lm, _batches(1))
    assert trainer.callback_metrics["train/loss"] < 1.5  # log(12) = 2.48 before
    assert lm.model.is_gradient_checkpointing == gradient_checkpointing


def test_configure_model_loads_once_in_train_mode(tiny):
    lm = CausalLM(tiny)
    assert lm.model is None
    with pytest.raises(RuntimeError, match="is not loaded: call configure_model"):
        lm(input_ids=torch.zeros(1, 2, dtype=torch.int64))
    lm.configure_model()
    loaded = lm.model
    lm.configure_model()
    assert lm.model is loaded
    assert all(module.training for module in lm.model.modules())
    assert lm.tokenizer_name == tiny


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("32-true", None, torch.float32),
        ("bf16-mixed", None, torch.float32),
        ("bf16-true", None, torch.bfloat16),
        ("32-true", "bfloat16", torch.bfloat16),
    ],
)
def test_the_dtype_follows_the_precision(tiny, precision, dtype, expected):
    lm = CausalLM(tiny, dtype=dtype)
    _trainer(precision=precision, max_steps=1).fit(lm, _batches())
    assert {parameter.dtype for parameter in lm.parameters()} == {expected}


def test_takes_a_loaded_model_and_keeps_it_out_of_the_hyperparameters(tiny):
    model = load_pretrained(tiny)
    lm = CausalLM(model, learning_rate=1e-3)
    assert lm.model is model
    assert "model" not in lm.hparams
    assert lm.hparams["learning_rate"] == 1e-3
    assert lm.tokenizer_name == tiny
    assert CausalLM(tiny).hparams["model"] == tiny
    for argument in ({"dtype": "bfloat16"}, {"attn_implementation": "eager"}):
        with pytest.raises(ValueError, match="the model is loaded already"):
            CausalLM(model, **argument)


def test_norms_and_biases_do_not_decay(tiny):
    lm, trainer = CausalLM(tiny, weight_decay=0.1), _trainer(max_steps=1)
    trainer.fit(lm, _batches())
    decaying, others = trainer.optimizers[0].param_groups
    assert decaying["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert {parameter.ndim for parameter in others["params"]} == {1}
    assert len(decaying["params"]) + len(others["params"]) == len(list(lm.parameters()))


@pytest.mark.parametrize(
    ("schedule", "warmup", "training", "expected"),
    [
        ("linear", 1, {"max_epochs": 2, "accumulate_grad_batches": 2}, [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("constant", 0.5, {"max_steps": 6}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
    ],
)
def test_the_learning_rate_is_per_optimizer_step(tiny, schedule, warmup, training, expected):
    rates = []
    look = at("on_train_batch_start", lambda made, *_: rates.append(made.optimizers[0].param_groups[0]["lr"]))
    lm = CausalLM(tiny, learning_rate=1.0, warmup=warmup, lr_schedule=schedule)
    _trainer(look, **training).fit(lm, _batches(6))
    assert rates == pytest.approx([rate for rate in expected for _ in range(len(rates) // len(expected))])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_lr_factor(schedule):
    factors = [lr_factor(step, 4, 20, schedule) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[20] == pytest.approx(1.0 if schedule == "constant" else 0.0)
    assert factors[12] == pytest.approx(1.0 if schedule == "constant" else 0.5)
    assert all(factor > 0 for factor in factors[:20])


@pytest.mark.parametrize("arguments", [{"lr_schedule": "cosine"}, {"lr_schedule": "constant", "warmup": 0.1}])
def test_a_training_of_unknown_length_can_not_decay(tiny, arguments):
    with pytest.raises(ValueError, match="which is not known: set the Trainer's max_steps"):
        _trainer(max_epochs=-1).fit(CausalLM(tiny, **arguments), _batches())
    end = at("on_train_batch_end", lambda made, *_: setattr(made, "should_stop", True))
    lm = CausalLM(tiny, lr_schedule="constant", warmup=2)
    _trainer(end, max_epochs=-1).fit(lm, _batches())
    assert lm.trainer.global_step > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"warmup": -1}, "warmup is -1"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"lr_schedule": "step"}, "lr_schedule is 'step': choose one of linear, cosine, constant"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CausalLM("any", **arguments)


@pytest.mark.parametrize("warmup", ["4", "0.1"])
def test_every_argument_is_yaml_able(tiny, tmp_path, monkeypatch, warmup):
    monkeypatch.setattr("sys.argv", ["fit"])  # LightningCLI warns of arguments in both places
    own = f"model: {tiny}, warmup: {warmup}, lr_schedule: cosine, dtype: bfloat16, attn_implementation: eager"
    given = f"{{class_path: thanos_lightning.lm.CausalLM, init_args: {{{own}, gradient_checkpointing: true}}}}"
    (tmp_path / "lm.yaml").write_text(f"model: {given}\ntrainer: {{logger: false, accelerator: cpu}}\n")
    arguments = ["--config", str(tmp_path / "lm.yaml")]
    cli = LightningCLI(CausalLM, subclass_mode_model=True, run=False, args=arguments, save_config_callback=None)
    assert cli.model.warmup == float(warmup)
    assert isinstance(cli.model.warmup, int) == (warmup == "4")
    cli.model.configure_model()
    assert cli.model.model.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_gradients_can_be_clipped(tiny, precision):
    trainer = _trainer(max_steps=2, precision=precision, gradient_clip_val=1e-3)
    lm = CausalLM(tiny, learning_rate=1e-2)
    trainer.fit(lm, _batches())
    assert trainer.optimizers[0].defaults["fused"]  # the tests run on CPUs
    # first moments are a tenth of the clipped gradient after one step, and at most 0.19 of it after two
    moments = [state["exp_avg"].double().norm() for state in trainer.optimizers[0].state.values()]
    assert 0 < float(torch.stack(moments).norm()) <= 0.2e-3


@pytest.mark.parametrize("without", [(), ("attention_mask",), ("labels",), ("labels", "attention_mask")])
def test_a_calibration_step_draws_labels_for_the_tokens_that_have_a_next_one(tiny, monkeypatch, without):
    (batch,) = _batches(1, padding=4)
    given = {name: value for name, value in batch.items() if name not in without}
    seen = []

    def loss_of(logits, counted, *, seed):
        seen.append((counted, seed))
        return logits.sum()

    monkeypatch.setattr("thanos_lightning.lm.causal_lm.sampled_loss", loss_of)
    assert CausalLM(load_pretrained(tiny)).calibration_step(given).requires_grad
    ((counted, seed),) = seen
    last = 8 if without == ("labels", "attention_mask") else 4  # of the fifth the next one is padding
    assert torch.equal(counted, (torch.arange(9) < last).expand(2, 9))
    assert seed == batch["input_ids"].sum()


def test_a_calibration_step_without_gradients_draws_nothing(tiny, monkeypatch):
    (batch,) = _batches(1)
    monkeypatch.delattr("thanos_lightning.lm.causal_lm.sampled_loss")
    with torch.no_grad():
        output = CausalLM(load_pretrained(tiny)).calibration_step(batch)
    assert output.logits.shape == (2, 9, 12)
    assert output.loss is None  # nor is it computed of the labels


def test_a_pruned_model_is_not_trained_without_the_callback_in_silence(tiny, tmp_path):
    def fit(steps, *callbacks, start=None):
        fitted = _trainer(*callbacks, max_steps=steps)
        fitted.fit(CausalLM(tiny, lr_schedule="constant"), _batches(), ckpt_path=start)
        return fitted

    path, lost = tmp_path / "a.ckpt", "zeros will be lost with the first optimizer step"
    fit(2, ThanosPruningCallback(schedule=SparsitySchedule(1, 1, 1))).save_checkpoint(path)
    with pytest.warns(UserWarning, match=lost):
        fit(3, start=path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{lost}")
        fit(4, ThanosPruningCallback(schedule=SparsitySchedule(1, 1, 1)), start=path)


LORA = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


@pytest.mark.parametrize("loaded", [False, True])
def test_lora_trains_adapters_and_nothing_else(tiny, loaded):
    lm = CausalLM(load_pretrained(tiny) if loaded else tiny, learning_rate=1e-2, lora=LORA)
    before = dict(load_pretrained(tiny).named_parameters())
    _trainer(max_steps=4).fit(lm, _batches(4))
    after = {name.replace(".base_layer", ""): parameter for name, parameter in lm.model.named_parameters()}
    adapters = {name for name in after if ".lora_" in name}
    assert len(adapters) == 28
    assert {name for name, parameter in after.items() if parameter.requires_grad} == adapters
    assert after.keys() - adapters == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(bool(after[name].any()) for name in adapters if "lora_B" in name)


def test_a_pruned_model_with_adapters_computes_what_it_did_where_it_is_loaded_again(tiny, tmp_path):
    once = ThanosPruningCallback("2:4", schedule=SparsitySchedule(at=[1]), calibration=CalibrationOptions(steps=1))
    trainer, lm = _trainer(once, max_steps=6), CausalLM(tiny, learning_rate=1e-2, lora=LORA)
    trainer.fit(lm, _batches(6))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "end.ckpt")
    tokens = torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=tokens).logits, lm.eval()(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 0}, "which peft refuses .*should be a positive integer.*give arguments of its LoraConfig"),
        ({"rank": 4}, "which peft refuses .*unexpected keyword argument 'rank'"),
        ({"r": 2, "target_modules": ["q"]}, r"which peft refuses .*Target modules \{'q'\} not found"),
    ],
)
def test_arguments_that_peft_refuses_are_named(tiny, lora, message):
    with pytest.raises(ValueError, match=f"(?s)^lora is .*{message}"):
        CausalLM(tiny, lora=lora).configure_model()


def test_lora_without_peft_says_what_to_install(tiny, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lora needs peft: pip install 'thanos-lightning\[lora\]'"):
        CausalLM(load_pretrained(tiny), lora=LORA)
