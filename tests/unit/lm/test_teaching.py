"""CausalLM with a teacher, in real trainings."""

from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from toy import loader, trainer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from thanos_lightning import CalibrationOptions, SparsitySchedule, ThanosPruningCallback
from thanos_lightning.lm import CausalLM, Distillation
from thanos_lightning.lm.distillation import other_vocabulary
from thanos_lightning.lm.pretrained import load_pretrained, load_tokenizer


def batches(number=6):
    return loader(2 * number, batch_size=2, length=9, vocabulary=12)


def taught(model, as_object, **arguments):
    return CausalLM(
        load_pretrained(model) if as_object else model,
        learning_rate=1e-2,
        lr_schedule="constant",
        distillation=Distillation(**arguments),
    )


def pruning(start=2):
    schedule = SparsitySchedule(start, start + 2, 2)
    return ThanosPruningCallback("2:4", schedule=schedule, calibration=CalibrationOptions(steps=1))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name].to(one[name].dtype)) for name in one)


@pytest.mark.parametrize("as_object", [False, True])
def test_a_teacher_in_bfloat16_computes_what_a_loaded_model_does(tiny, tmp_path, as_object):
    lm = taught(tiny, as_object)
    trainer(tmp_path, pruning(0), max_steps=2, precision="bf16-true").fit(lm, batches())
    wanted = dict(load_pretrained(tiny, "bfloat16").named_buffers())
    own = dict(lm._teacher.model.named_buffers())
    assert own.keys() == wanted.keys() != set()
    assert all(torch.equal(own[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(("strategy", "waits"), [(DDPStrategy, False), (ModelParallelStrategy, True)])
def test_a_step_waits_for_other_ranks_only_where_they_gather_a_head(tiny, monkeypatch, strategy, waits):
    asked = []
    monkeypatch.setattr(strategy, "reduce", lambda self, chunks, **_: asked.append(int(chunks)) or chunks)
    lm = taught(tiny, as_object=False)
    lm.trainer = SimpleNamespace(strategy=strategy(), world_size=2)
    assert lm._agreed_chunks({"input_ids": torch.zeros(2, 1024)}) == 2
    assert asked == ([2] if waits else [])


def test_learning_from_the_teacher_alone_lowers_the_divergence(tiny, tmp_path):
    teacher = load_pretrained(tiny)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    teacher.save_pretrained(tmp_path / "other")
    lm = taught(tiny, False, teacher=str(tmp_path / "other"), cross_entropy=0, dtype="float32")
    values = []
    for steps in (1, 30):
        fit = trainer(tmp_path, max_steps=steps)
        fit.fit(lm, batches(1))
        values.append(float(fit.callback_metrics["train/logits"]))
        assert fit.callback_metrics["train/loss"] == fit.callback_metrics["train/logits"]
    assert values[1] < 0.3 * values[0]


@pytest.mark.parametrize("as_object", [False, True])
def test_a_resumed_training_has_the_same_teacher_and_ends_alike(tiny, tmp_path, as_object):
    ends = []
    for start in (None, 5, 3):  # the first event is at step 4
        lm = taught(tiny, as_object, dtype="float32")
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit = trainer(tmp_path, pruning(), every, max_steps=8, enable_checkpointing=True)
        alike = DataLoader([*batches(1)] * 8, batch_size=None)  # whose place in the epoch doesn't matter
        fit.fit(lm, alike, ckpt_path=start and tmp_path / f"step={start}.ckpt")
        ends.append(weights(lm.model))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
    state = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert not any("teacher" in name for name in state["state_dict"])


@pytest.mark.parametrize("empty", [True, False])
def test_a_teacher_that_is_not_there_is_named(tiny, tmp_path, empty):
    nothing = tmp_path / "nothing"
    if empty:
        nothing.mkdir()
    message = r"the teacher '.*nothing' can't be loaded \((?!no model).*: give 'start'"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, max_steps=1).fit(CausalLM(tiny, distillation=Distillation(str(nothing))), batches())


def test_a_teacher_to_which_tokens_mean_something_else_is_refused(tiny, tmp_path):
    def fit():
        trainer(tmp_path, max_steps=1).fit(CausalLM(tiny, distillation=Distillation(str(other))), batches())

    other = tmp_path / "other"
    load_pretrained(tiny).save_pretrained(other)
    fit()  # it has no tokenizer: its tokens are taken for the model's
    load_tokenizer(tiny).save_pretrained(other)
    fit()
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat"', '"?"').replace('"dog"', '"cat"').replace('"?"', '"dog"'))
    message = r"the teacher '.*other' has another vocabulary than the model: 2 of 12 .* 3, which is 'cat' to the model"
    with pytest.raises(ValueError, match=message):
        fit()


def test_a_tokenizer_that_transformers_makes_up_says_nothing(tiny, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=12, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path / "qwen")
    assert len(load_tokenizer(str(tmp_path / "qwen"))) < 6  # without any file of one
    assert other_vocabulary(tiny, str(tmp_path / "qwen"), 12) is None
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    assert other_vocabulary(tiny, str(tmp_path / "broken"), 12) is None


def test_some_renamed_tokens_are_no_other_vocabulary(tmp_path):
    folders = [str(tmp_path / name) for name in ("base", "chat", "other")]
    for folder, renamed in zip(folders, (0, 2, 3), strict=True):
        names = [f"<chat {index}>" if index < renamed else f"<{index}>" for index in range(200)]
        vocabulary = {name: index for index, name in enumerate(names)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token=names[-1]))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    base, chat, other = folders
    assert other_vocabulary(base, chat, 200) is None
    assert "3 of 200 tokens are others, such as 0, which is '<0>' to" in other_vocabulary(base, other, 200)


def test_validation_loads_no_teacher(tiny, tmp_path):
    lm = CausalLM(tiny, distillation=Distillation())
    trainer(tmp_path).validate(lm, batches(), verbose=False)
    assert lm._teacher is None
    # and neither does loading a checkpoint to use it
    fit = trainer(tmp_path, pruning(), max_steps=6)
    fit.fit(lm, batches())
    fit.save_checkpoint(tmp_path / "lm.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "lm.ckpt", weights_only=False)
    assert same(weights(lm.model), weights(loaded.model))
