import itertools
import sys
from pathlib import Path

import datasets
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import trainer
from transformers import AutoTokenizer

from thanos_lightning.lm import TextData, text

END = 0


def _data(text_files, tiny, **kwargs):
    return TextData(text_files, tiny, **{"block_size": 8, "batch_size": 4, **kwargs})


def _ready(*args, **kwargs):
    data = _data(*args, **kwargs)
    data.prepare_data()
    data.setup("fit")
    return data


def _in_order(data):
    return data._in_order(data._ready(data._train_blocks), 4)


def _flat(lists):
    return list(itertools.chain.from_iterable(lists))


def _rows(loader):
    return [row for batch in loader for row in batch["input_ids"].tolist()]


def test_batches(text_files, tiny):
    data = _ready(text_files, tiny)
    for name in ("train", "val", "test", "calibration"):
        batch = next(iter(getattr(data, f"{name}_dataloader")()))
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(tensor.dtype == torch.int64 and tensor.shape == (4, 8) for tensor in batch.values())
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["attention_mask"].all()


def test_blocks_are_the_documents_joined_by_the_end_token(text_files, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    documents = [[*tokenizer(file.read_text()).input_ids, END] for file in Path(text_files).parent.glob("part*")]
    data = _ready(text_files, tiny)
    train, validation = _rows(_in_order(data)), _rows(data.val_dataloader())
    # 36 documents of 13 tokens to train on, 4 to validate on; what does not fill a block of 8 is dropped
    assert (len(train), len(validation)) == (36 * 13 // 8, 4 * 13 // 8)
    for tokens, whole_documents in ((_flat(train), 35), (_flat(validation), 3)):
        for index in range(whole_documents):
            assert tokens[index * 13 : (index + 1) * 13] in documents


def test_the_seed_chooses_what_is_held_back(text_files, tiny):
    first, again, other = (_rows(_ready(text_files, tiny, seed=seed).val_dataloader()) for seed in (0, 0, 1))
    assert first == again != other


def test_no_document_is_in_both_parts(text_files, tiny, tmp_path):
    for index in range(40):
        (tmp_path / f"part-{index:02d}.txt").write_text("cat " * index + "sat " * (40 - index))
    data = _ready(text_files, tiny, block_size=41)  # a document with its end
    train, validation = _rows(data.train_dataloader()), _rows(data.val_dataloader())
    assert len(train) == 36
    assert len({tuple(row) for row in train + validation}) == 40


def test_one_document_is_split_by_blocks(tiny, tmp_path):
    file = tmp_path / "one.txt"
    file.write_text("the cat sat on a mat and saw " * 20)
    data = _ready(str(file), tiny, validation_fraction=0.25)
    assert (len(data._train_blocks), len(data._val_blocks)) == (15, 5)


def test_empty_documents_are_left_out(text_files, tiny, tmp_path):
    before = _rows(_in_order(_ready(text_files, tiny)))
    (tmp_path / "part-98.txt").write_text("")
    (tmp_path / "part-99.txt").write_text(" \n ")
    assert _rows(_in_order(_ready(text_files, tiny))) == before


def test_a_tokenizer_that_adds_the_end_itself_gets_no_second_one():
    assert text._pack({"input_ids": [[5, END], [6], []]}, 1, END) == {"input_ids": [[5], [END], [6], [END], [END]]}


def test_limits(text_files, tiny):
    data = _ready(text_files, tiny, max_train_blocks=10, max_val_blocks=3, calibration_tokens=57, val_batch_size=2)
    assert len(_rows(data.train_dataloader())) == 10
    assert [len(batch["input_ids"]) for batch in data.val_dataloader()] == [2, 1]
    calibration = _rows(data.calibration_dataloader())
    assert len(calibration) == 8
    assert calibration == _rows(data.calibration_dataloader())
    assert all(row in _rows(data.train_dataloader()) for row in calibration)
    few = _ready(text_files, tiny, max_train_blocks=10, calibration_tokens=100)
    with pytest.warns(UserWarning, match=r"calibration_tokens is 100, but .*only 10 block\(s\) of 8"):
        assert len(_rows(few.calibration_dataloader())) == 10


def test_hub_splits_and_columns(tiny, monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        words = {"train": "cat", "test": "dog"}[split]
        return datasets.Dataset.from_dict({"body": [f"{words} " * 9] * 6, "id": list(range(6))})

    monkeypatch.setattr(text, "load_dataset", load_dataset)
    data = _ready("some/corpus", tiny, dataset_config="en", text_column="body", validation_split="test")
    assert set(asked) == {("some/corpus", "en", "train"), ("some/corpus", "en", "test")}
    cat, dog = AutoTokenizer.from_pretrained(tiny)("cat dog").input_ids
    assert set(_flat(_rows(data.train_dataloader()))) == {cat, END}
    assert set(_flat(_rows(data.val_dataloader()))) == {dog, END}
    with pytest.raises(ValueError, match="has no column 'text': set text_column to one of body, id"):
        _ready("some/corpus", tiny)


def test_python_reference(tiny):
    assert len(_ready("python-reference", tiny, block_size=64)._train_blocks) > 500


def test_a_python_without_its_reference_is_named(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match=r"which this build of Python .* leaves out"):
        next(text._python_reference("3.x"))


def test_a_second_setup_computes_nothing(text_files, tiny, monkeypatch):
    first = _ready(text_files, tiny)

    def fail(*args, **kwargs):
        raise AssertionError("tokenised again")

    # under the same names: a function that is looked up by name has the same fingerprint
    monkeypatch.setattr(text.PreTrainedTokenizerBase, "__call__", fail)
    second = _ready(text_files, tiny)
    assert second._train_blocks.cache_files == first._train_blocks.cache_files
    assert second._train_blocks._fingerprint == first._train_blocks._fingerprint
    with pytest.raises(AssertionError, match="tokenised again"):
        _ready("python-reference", tiny)


def test_another_text_or_tokenizer_is_not_taken_for_the_cached_one(text_files, tiny, tmp_path):
    first = _rows(_ready(text_files, tiny).val_dataloader())
    for file in tmp_path.glob("part-*.txt"):
        file.write_text("dog " * 12)
    changed_text = _rows(_ready(text_files, tiny).val_dataloader())
    assert changed_text != first
    tokenizer = tmp_path / "tiny" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"dog"', '"other"'))
    assert _rows(_ready(text_files, tiny).val_dataloader()) != changed_text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 1}, "block_size is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_val_blocks": 0}, "max_val_blocks is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"validation_fraction": 1.0}, r"validation_fraction is 1\.0"),
        ({"validation_split": "test"}, "validation_split is 'test', but dataset 'python-reference' is not from"),
        ({"dataset_config": "en"}, "dataset_config is 'en'"),
        *(({"dataset": value}, "matches no file") for value in ("*.nothing", "no.txt", "/no/such/file", ["missing"])),
        *(({"dataset": value}, "give 'python-reference', a hub name, or text files") for value in ("", [])),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextData(**{"dataset": "python-reference", "tokenizer": "any", **arguments})


def test_files_and_globs_can_be_mixed(text_files, tmp_path):
    one, other = str(tmp_path / "part-07.txt"), str(tmp_path / "a[b].md")
    Path(other).write_text("cat")
    files = TextData([one, text_files, other], "any")._files
    assert (files[0], len(files), files[-1]) == (one, 41, other)
    for of_the_hub in ("some/corpus", str(tmp_path)):
        assert TextData(of_the_hub, "any")._files == []


def test_too_little_text_is_named(text_files, tiny):
    with pytest.raises(ValueError, match=r"block_size is 4096, but the 36 .* have 468 tokens: give a smaller"):
        _ready(text_files, tiny, block_size=4096)


def test_no_text_is_named(tiny, tmp_path):
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(ValueError, match="has no text in its"):
        _ready(str(tmp_path / "empty.txt"), tiny)


def test_a_tokenizer_without_an_end_is_named(text_files, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tiny)
    with pytest.raises(ValueError, match="has no end-of-text token"):
        _ready(text_files, tiny)


def test_a_dataloader_before_setup_is_named(text_files, tiny):
    with pytest.raises(RuntimeError, match="call setup"):
        _data(text_files, tiny).train_dataloader()


class Recorder(LightningModule):
    """Keeps the training batches that it is given."""

    def __init__(self, asks_for_steps=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.asks_for_steps = asks_for_steps
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return self.weight * 0.0

    def configure_optimizers(self):
        if self.asks_for_steps:
            _ = self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters())


class SaveRanks(Callback):
    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.seen, Path(trainer.default_root_dir) / f"seen-{trainer.global_rank}.pt")


def _fit(data, tmp_path, model=None, ckpt_path=None, callbacks=(), **kwargs):
    model = model or Recorder()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    made = trainer(tmp_path, *callbacks, enable_checkpointing=saves, num_sanity_val_steps=0, **kwargs)
    made.fit(model, data, ckpt_path=ckpt_path)
    return model.seen


def _saving(tmp_path):
    return ModelCheckpoint(tmp_path / "checkpoints", "{step}", save_top_k=-1, every_n_train_steps=1)


@pytest.mark.parametrize("length", [{"max_steps": 24}, {"max_epochs": 2}])
@pytest.mark.parametrize("asks_for_steps", [False, True])
def test_a_stopped_training_goes_on_with_the_batches_it_would_have_seen(
    text_files, tiny, tmp_path, length, asks_for_steps
):
    # 58 blocks, 15 batches an epoch
    whole = _fit(_data(text_files, tiny), tmp_path, Recorder(asks_for_steps), callbacks=[_saving(tmp_path)], **length)
    for step in (4, 14, 15, 20):
        checkpoint = tmp_path / "checkpoints" / f"step={step}.ckpt"
        resumed = _fit(_data(text_files, tiny), tmp_path, Recorder(asks_for_steps), checkpoint, **length)
        assert resumed == whole[step:], step


def test_a_training_on_other_text_or_in_another_order_does_not_go_on_in_the_middle(text_files, tiny, tmp_path):
    _fit(_data(text_files, tiny), tmp_path, callbacks=[_saving(tmp_path)], max_steps=3)
    for other, what in (({"max_train_blocks": 40}, "dataset_length 58"), ({"seed": 8}, "seed 0")):
        message = f"saved in the middle of an epoch over data with .*{what}.*resume with the data and seed"
        with pytest.raises(ValueError, match=message):
            _fit(_data(text_files, tiny, **other), tmp_path, None, tmp_path / "checkpoints/step=3.ckpt", max_steps=5)


def test_overfit_batches_turns_shuffling_off(text_files, tiny, tmp_path):
    seen = _fit(_data(text_files, tiny), tmp_path, max_epochs=2, overfit_batches=2)
    in_order = [batch["input_ids"].tolist() for batch in _in_order(_ready(text_files, tiny))]
    assert seen == in_order[:2] * 2


def test_two_processes_share_the_blocks_and_go_on_where_one_was(text_files, tiny, tmp_path):
    whole = _fit(_data(text_files, tiny, batch_size=8), tmp_path, callbacks=[_saving(tmp_path)], max_epochs=1)
    checkpoint = tmp_path / "checkpoints" / "step=3.ckpt"
    ddp = {"strategy": "ddp_spawn", "devices": 2, "max_epochs": 2}
    _fit(_data(text_files, tiny), tmp_path, Recorder(asks_for_steps=True), checkpoint, [SaveRanks()], **ddp)
    ranks = [torch.load(tmp_path / f"seen-{rank}.pt") for rank in range(2)]
    shared = [sorted(_flat(batches)) for batches in zip(*ranks, strict=True)]
    assert shared[:5] == [sorted(batch) for batch in whole[3:]]
    assert shared[5:] != [sorted(batch) for batch in whole]  # the second epoch; 58 blocks need no padding
    assert sorted(_flat(shared[5:])) == sorted(_flat(whole))
