"""TextData: text from a hub data set, local files or Python's own documentation, as packed blocks of tokens."""

from __future__ import annotations

import glob
import importlib
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from thanos_lightning.checkpoints.hub import go_offline_without_hub
from thanos_lightning.lm.pretrained import load_tokenizer, nearest
from thanos_lightning.lm.resumable import ResumableDataLoader
from thanos_lightning.plan.options import check_whole
from thanos_lightning.report.progress import open_phase

PYTHON_REFERENCE = "python-reference"
CALIBRATION_TOKENS = 131_072  # the default
_PYTHON_REFERENCE_MODULE = "pydoc_data.topics"
_TOKENS = "input_ids"  # this name lets `datasets` keep them as int32


class TextData(LightningDataModule):
    """Turns text into tokens and full blocks of tokens, with an end-of-text token after each document.

    Documents are tokenised with the special tokens that the tokenizer adds by itself, joined, and cut into blocks. In
    each 1,000 documents, the tokens after the last full block are dropped. `datasets` keeps tokens and blocks in its
    cache, so that a second run, or another rank, only maps them into memory.

    A batch is `{"input_ids", "attention_mask", "labels"}`, each int64 of shape (batch_size, block_size). Training can
    resume in the middle of an epoch. Each of several processes gets its share of the training batches.

    Args:
        dataset: "python-reference" is the language reference that ships with Python: some 465,000 characters, which
            differ between versions of Python. A path, a glob or a list of both means local text files, each of which is
            one document. Any other value is a hub name or a local folder for `datasets.load_dataset`.
        tokenizer: A hub name, a local folder or "smollm2-135m".
        dataset_config: Name of the hub data set's configuration.
        text_column: The hub data set's column with the text.
        block_size: Tokens in a block.
        batch_size: Blocks in a batch, per process.
        val_batch_size: Blocks in a validation batch; None takes batch_size.
        train_split: Split to train on, in the syntax of `load_dataset`: "train", "train[:1%]". Local files and the
            Python reference have "train" only.
        validation_split: Split to validate on. None holds back `validation_fraction` of the training split.
        validation_fraction: Fraction of the documents to hold back. It is a fraction of the blocks if there are too few
            documents to hold one back.
        max_train_blocks: Highest number of blocks to train on. None takes all.
        max_val_blocks: Highest number of blocks to validate on. None takes all.
        calibration_tokens: Tokens in the batches of `calibration_dataloader`, rounded up to whole blocks.
        seed: Seed of the choice of the held-back text, and of the order of the training batches.
        num_workers: Worker processes of each dataloader.
        num_proc: Processes that tokenise. None uses this process.

    Raises:
        ValueError: If an argument is invalid. At `setup`, if there is no text, too little text to fill a block, or no
            such column.
        ModuleNotFoundError: At `setup`, if this Python ships without its reference.

    Examples:
        >>> data = TextData("python-reference", "smollm2-135m", block_size=64)  # doctest: +SKIP
        >>> data.setup("fit")  # doctest: +SKIP
        >>> next(iter(data.train_dataloader()))["input_ids"].shape  # doctest: +SKIP
        torch.Size([8, 64])
    """

    # More than eight parameters: each is a key of the recipes
    def __init__(
        self,
        dataset: str | list[str],
        tokenizer: str,
        *,
        dataset_config: str | None = None,
        text_column: str = "text",
        block_size: int = 128,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        validation_fraction: float = 0.1,
        max_train_blocks: int | None = None,
        max_val_blocks: int | None = None,
        calibration_tokens: int = CALIBRATION_TOKENS,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, least, of in (
            ("block_size", block_size, 2, "tokens"),  # a block of one token has nothing to predict
            ("batch_size", batch_size, 1, "blocks"),
            ("val_batch_size", val_batch_size, 1, "blocks"),
            ("max_train_blocks", max_train_blocks, 1, "blocks"),
            ("max_val_blocks", max_val_blocks, 1, "blocks"),
            ("calibration_tokens", calibration_tokens, 1, "tokens"),
            ("num_workers", num_workers, 0, "processes"),
            ("num_proc", num_proc, 1, "processes"),
        ):
            if value is not None:
                check_whole(name, value, least, of)
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction is {validation_fraction}: give a fraction in (0, 1), such as 0.1")
        if not dataset:
            raise ValueError(f"dataset is {dataset!r}: give {PYTHON_REFERENCE!r}, a hub name, or text files")
        self._files = _local_files(dataset)
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.dataset_config = dataset_config
        self.text_column = text_column
        self.block_size = block_size
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.train_split = train_split
        self.validation_split = validation_split
        self.validation_fraction = validation_fraction
        self.max_train_blocks = max_train_blocks
        self.max_val_blocks = max_val_blocks
        self.calibration_tokens = calibration_tokens
        self.seed = seed
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.save_hyperparameters()
        self._refuse_options_of_the_hub()
        self._train_blocks: Dataset | None = None
        self._val_blocks: Dataset | None = None
        self._train_loader: ResumableDataLoader | None = None
        self._train_state: dict[str, int] = {}  # loaded, for the next training dataloader

    def _refuse_options_of_the_hub(self) -> None:
        if self._files or self.dataset == PYTHON_REFERENCE:
            for name, default in (("train_split", "train"), ("validation_split", None), ("dataset_config", None)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(
                        f"{name} is {value!r}, but dataset {self.dataset!r} is not from the hub and has no splits or "
                        f"configurations: leave {name} out; validation_fraction holds back text to validate on"
                    )

    # What the Trainer calls, in order

    @override
    def prepare_data(self) -> None:
        """Download, tokenise and pack into the cache, in one process per machine."""
        self._prepare()

    @override
    def setup(self, stage: str) -> None:
        """Find the blocks in the cache, or make them. Later calls return at once."""
        if self._train_blocks is None:
            self._train_blocks, self._val_blocks = self._prepare()

    @override
    def train_dataloader(self) -> ResumableDataLoader:
        """Shuffled blocks, in an order that depends on the seed and the epoch alone."""
        sharing = (None if self.trainer is None else self.trainer.distributed_sampler_kwargs) or {}
        self._train_loader = ResumableDataLoader(
            self._ready(self._train_blocks),
            seed=self.seed,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_collate,
            **sharing,
        )
        if self._train_state:
            self._train_loader.load_state_dict(self._train_state)
            self._train_state = {}
        return self._train_loader

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """The blocks that were held back, in order."""
        return self._in_order(self._ready(self._val_blocks), self.val_batch_size or self.batch_size)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """The same blocks as validation: what was held back is never trained on."""
        return self.val_dataloader()

    def calibration_dataloader(self) -> DataLoader[Any]:
        """The first training blocks, in order, with `calibration_tokens` tokens; the same at every call and rank."""
        blocks = self._ready(self._train_blocks)
        wanted = -(-self.calibration_tokens // self.block_size)
        if len(blocks) < wanted and self.calibration_tokens != CALIBRATION_TOKENS:
            rank_zero_warn(
                f"calibration_tokens is {self.calibration_tokens:,}, but the text to train on fills only {len(blocks)} "
                f"block(s) of {self.block_size}: all of them are taken"
            )
        return self._in_order(_first(blocks, wanted), self.batch_size)

    # Lightning restores a dataloader's own state only while it makes the dataloader. That is before the checkpoint is
    # read if `configure_optimizers` asks for the number of steps. A datamodule's state is restored in time.

    @override
    def state_dict(self) -> dict[str, Any]:
        """How far training got in the current epoch."""
        return {} if self._train_loader is None else self._train_loader.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train_state = state_dict

    # Text -> blocks

    @open_phase("Preparing the text", adopts_bars=True)
    def _prepare(self) -> tuple[Dataset, Dataset]:
        """The blocks to train and to validate on."""
        tokenizer = load_tokenizer(self.tokenizer)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer {self.tokenizer!r} has no end-of-text token to put between documents: set eos_token in its "
                "configuration, or take another tokenizer"
            )
        documents = self._tokenise(self._load(self.train_split), tokenizer)
        if self.validation_split is not None:
            train = self._pack(documents, tokenizer)
            validation = self._pack(self._tokenise(self._load(self.validation_split), tokenizer), tokenizer)
        elif len(documents) * self.validation_fraction >= 1:
            train, validation = (self._pack(part, tokenizer) for part in self._hold_back(documents))
        else:
            train, validation = self._hold_back(self._pack(documents, tokenizer, at_least=2))
        return _first(train, self.max_train_blocks), _first(validation, self.max_val_blocks)

    def _load(self, split: str) -> Dataset:
        """Load a split as documents in a column `text`."""
        column = self.text_column
        if self._files:
            column = "text"
            try:
                dataset = load_dataset("text", data_files=self._files, split=split, sample_by="document")
            except DatasetsError as error:
                if not isinstance(error.__cause__, UnicodeDecodeError):
                    raise
                raise ValueError(
                    f"dataset {self.dataset!r} is no text ({error.__cause__}): give UTF-8 files"
                ) from error
        elif self.dataset == PYTHON_REFERENCE:
            column = "text"
            # The version enters the cache's key, because another Python has other text.
            dataset = Dataset.from_generator(
                _python_reference, gen_kwargs={"python_version": platform.python_version()}, split=split
            )
        else:
            if not os.path.exists(str(self.dataset)):
                go_offline_without_hub()
            try:
                dataset = load_dataset(self.dataset, self.dataset_config, split=split)
            except (OSError, ValueError, DatasetsError) as error:
                why = " ".join(str(error).split())
                raise ValueError(
                    f"dataset {self.dataset!r} can't be loaded ({why}): give a hub name that can be reached from here, "
                    f"a local folder or text files{nearest(str(self.dataset), PYTHON_REFERENCE)}"
                ) from error
        if column not in dataset.column_names:
            raise ValueError(
                f"dataset {self.dataset!r} has no column {column!r}: set text_column to one of "
                f"{', '.join(dataset.column_names)}"
            )
        return dataset.select_columns(column).rename_column(column, "text") if column != "text" else dataset

    def _tokenise(self, documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        tokens = documents.map(
            _tokenise,
            batched=True,
            fn_kwargs={"tokenizer": tokenizer},
            remove_columns=documents.column_names,
            num_proc=self.num_proc,
            desc="Tokenising",
        )
        if not len(tokens):
            raise ValueError(
                f"dataset {self.dataset!r} has no text in its {len(documents)} documents: give another one"
            )
        return tokens

    def _pack(self, documents: Dataset, tokenizer: PreTrainedTokenizerBase, at_least: int = 1) -> Dataset:
        blocks = documents.map(
            _pack,
            batched=True,
            fn_kwargs={"block_size": self.block_size, "eos_token_id": tokenizer.eos_token_id},
            num_proc=self.num_proc,
            desc="Packing",
        )
        if len(blocks) < at_least:
            num_tokens = sum(map(len, documents[_TOKENS])) + len(documents)
            raise ValueError(
                f"block_size is {self.block_size}, but the {len(documents)} document(s) of dataset {self.dataset!r} "
                f"to fill {at_least} block(s) have {num_tokens} tokens: give a smaller block_size, more text, "
                "or another validation_fraction"
            )
        return blocks

    def _hold_back(self, rows: Dataset) -> tuple[Dataset, Dataset]:
        parts = rows.train_test_split(test_size=self.validation_fraction, seed=self.seed)
        return parts["train"], parts["test"]

    # Blocks -> batches

    def _in_order(self, blocks: Dataset, batch_size: int) -> DataLoader[Any]:
        return DataLoader(blocks, batch_size=batch_size, num_workers=self.num_workers, collate_fn=_collate)

    def vocabulary(self) -> int:
        """How many tokens the tokenizer knows, whether or not they are in the text."""
        return len(load_tokenizer(self.tokenizer))

    def largest_token(self) -> int:
        """The highest token id in the text."""
        blocks = (self._ready(part) for part in (self._train_blocks, self._val_blocks))
        return max(int(batch[_TOKENS].max()) for part in blocks for batch in part.iter(1000))

    def _ready(self, blocks: Dataset | None) -> Dataset:
        if blocks is None:
            raise RuntimeError("the text is not ready: call setup('fit') before asking for a dataloader")
        return blocks.with_format("torch")


def _local_files(dataset: str | list[str]) -> list[str]:
    """List the local text files in order. The list is empty if `dataset` is a hub name or a folder."""
    if isinstance(dataset, str):
        is_files = glob.has_magic(dataset) or dataset.startswith(("~", "/", "./", "../")) or dataset.endswith(".txt")
        if (not is_files and not os.path.isfile(dataset)) or os.path.isdir(os.path.expanduser(dataset)):
            return []
    files: list[str] = []
    for pattern in [dataset] if isinstance(dataset, str) else dataset:
        expanded = os.path.expanduser(pattern)
        is_file = os.path.isfile(expanded)  # whose name may read as a glob
        matched = [expanded] if is_file else sorted(filter(os.path.isfile, glob.glob(expanded, recursive=True)))
        if not matched:
            where = "" if os.path.isabs(expanded) else f" (in {Path.cwd()})"
            raise ValueError(f"dataset {pattern!r} matches no file{where}: give a text file's path, or a glob")
        files.extend(matched)
    return list(dict.fromkeys(files))


def _python_reference(python_version: str) -> Iterator[dict[str, str]]:
    """Yield the topics of `help()` as one document each."""
    try:
        topics = importlib.import_module(_PYTHON_REFERENCE_MODULE).topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"dataset {PYTHON_REFERENCE!r} is {_PYTHON_REFERENCE_MODULE}, which this build of Python {python_version} "
            "leaves out: install Python's standard library in full, or give dataset a text file or a hub name"
        ) from error
    for name in sorted(topics):
        yield {"text": topics[name]}


def _tokenise(documents: dict[str, list[str | None]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    texts = [text for text in documents["text"] if text and not text.isspace()]
    # verbose=False hides warnings of texts that are too long for the model: they are cut into blocks later.
    return {_TOKENS: tokenizer(texts, verbose=False)[_TOKENS] if texts else []}


def _pack(documents: dict[str, list[list[int]]], block_size: int, eos_token_id: int) -> dict[str, list[list[int]]]:
    tokens: list[int] = []
    for document in documents[_TOKENS]:
        tokens.extend(document)
        if not document or document[-1] != eos_token_id:  # some tokenizers add it themselves
            tokens.append(eos_token_id)
    starts = range(0, len(tokens) - block_size + 1, block_size)
    return {_TOKENS: [tokens[start : start + block_size] for start in starts]}


def _first(blocks: Dataset, limit: int | None) -> Dataset:
    return blocks if limit is None or limit >= len(blocks) else blocks.select(range(limit))


def _collate(blocks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Blocks of shape (block_size,) -> a batch of shape (batch_size, block_size)."""
    input_ids = torch.stack([block[_TOKENS] for block in blocks]).long()
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids.clone()}
