"""Small models, data and trainers that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers as t
from lightning.pytorch import Callback, LightningModule, Trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from thanos_lightning import CalibrationOptions, SolverOptions, ThanosPruningCallback
from thanos_lightning.collect.inputs import InputStatistics
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.solver import HessianAccumulator

VOCABULARY = 64


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
# family -> class of its configuration, and its settings
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (t.LlamaConfig, GROUPED),
    "gpt2": (t.GPT2Config, SMALL),
    "mistral": (t.MistralConfig, GROUPED),
    "qwen2": (t.Qwen2Config, GROUPED),
    "qwen3": (t.Qwen3Config, {**GROUPED, "head_dim": 8}),
    "gemma2": (t.Gemma2Config, {**GROUPED, "head_dim": 8}),
    "gemma3": (t.Gemma3TextConfig, {**GROUPED, "head_dim": 8}),
    "phi3": (t.Phi3Config, {**GROUPED, "pad_token_id": 0}),
    "opt": (t.OPTConfig, {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt-neox": (t.GPTNeoXConfig, {**SMALL, "intermediate_size": 48}),
    "bert": (t.BertConfig, {**SMALL, "intermediate_size": 48}),
}


def tiny_of(family: str) -> Any:
    config, settings = FAMILIES[family]
    torch.manual_seed(0)
    kind = t.AutoModelForMaskedLM if family == "bert" else t.AutoModelForCausalLM
    return kind.from_config(config(**settings))


def tiny_llama(seed: int = 0, **config: Any) -> t.LlamaForCausalLM:
    torch.manual_seed(seed)
    return t.LlamaForCausalLM(t.LlamaConfig(**{**GROUPED, "tie_word_embeddings": True, **config}))


def tiny_gpt2(seed: int = 0) -> t.GPT2LMHeadModel:
    torch.manual_seed(seed)
    return t.GPT2LMHeadModel(t.GPT2Config(**SMALL, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


LETTERS = ["<end>", "<unknown>", *"abcdefghijklmnopqrstuvwxyz"]


def save_tiny(folder: Path, words: Sequence[str], **config: Any) -> str:
    """A model with its tokenizer, as a folder: one word, one token; the first one ends a text."""
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[0]).save_pretrained(folder)
    tiny_llama(vocab_size=len(words), tie_word_embeddings=False, **config).save_pretrained(folder)
    return str(folder)


def tiny_files(folder: Path) -> tuple[str, Path]:
    """A model with its tokenizer, as a folder, and a text, as a file, for programs that read such."""
    model, text = save_tiny(folder / "tiny", LETTERS), folder / "text.txt"
    text.write_text(" ".join(LETTERS[2 + (3 * index + index // 7) % 26] for index in range(4000)))
    return model, text


def grouped(**options: Any) -> dict[str, Any]:
    """Arguments of the callback, of which those in its groups are given by their own names."""
    for group, kind in (("solver", SolverOptions), ("calibration", CalibrationOptions)):
        own = {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}
        if own:
            options[group] = kind(**own)
    return options


class OfTwo(ParameterAccess):
    """The first of two ranks, of which the other one tells what it is given."""

    def __init__(self, other: Any = None) -> None:
        super().__init__(world_size=2)
        self.other = other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


class Alike(ParameterAccess):
    """One of several ranks, of which the others say what it says."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size


class Stranger:
    """What a pickle that means harm has in it: a call. It makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return Path.touch, (self.made,)


class Sequences(Dataset[dict[str, Tensor]]):
    """Learnable token sequences: each next token is the one before plus a step that the sequence keeps."""

    def __init__(self, number: int, length: int = 16, padding: int = 0, vocabulary: int = VOCABULARY) -> None:
        generator = torch.Generator().manual_seed(1)
        start = torch.randint(vocabulary, (number, 1), generator=generator)
        step = torch.randint(1, 5, (number, 1), generator=generator)
        self.tokens = (start + step * torch.arange(length)) % vocabulary
        self.mask = torch.ones_like(self.tokens)
        if padding:
            self.mask[:, length - padding :] = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, mask = self.tokens[index], self.mask[index]
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def loader(number: int = 32, batch_size: int = 4, **kwargs: Any) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Sequences(number, **kwargs), batch_size=batch_size)


def batch(padding: int = 0, number: int = 3) -> dict[str, Tensor]:
    return next(iter(loader(number, number, length=8, padding=padding)))


class ResumableBatches:
    """A dataloader that goes on where its saved state was."""

    def __init__(self, number: int = 64, **kwargs: Any) -> None:
        self.batches = list(loader(number, **kwargs))
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def started(model: nn.Module) -> InputStatistics:
    statistics = InputStatistics(find_targets(model))
    statistics.start()
    return statistics


def counted(model: nn.Module, *inputs: Tensor, mask: Tensor | None = None) -> dict[str, HessianAccumulator]:
    """What is counted of these inputs in one batch."""
    statistics = started(model)
    with statistics.counting(mask):
        for one in inputs:
            model(one)
    statistics.stop()
    return statistics.accumulators


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


def momentum_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


class ToyLM(LightningModule):
    """A user's own module around a Hugging Face model; records what a test wants to see after each step."""

    def __init__(
        self, model: t.PreTrainedModel | None = None, make_optimizer: Callable[[Any], torch.optim.Optimizer] = adamw
    ) -> None:
        super().__init__()
        self.model = model if model is not None else tiny_llama()
        self.make_optimizer = make_optimizer
        self.losses: list[float] = []

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def at(hook: str, act: Callable[..., Any]) -> Callback:
    """A callback that acts in one hook."""
    callback = Callback()
    setattr(callback, hook, act)
    return callback


class ZeroProbe(Callback):
    """Looks after each batch whether each pruned entry is +0, of weights and moments, and whether it stays pruned.

    The gradients of pruned entries have to be 0 before they are clipped.
    """

    def __init__(self, pruning: ThanosPruningCallback) -> None:
        self.pruning = pruning
        self.keeps: dict[str, Tensor] = {}
        self.checked = 0  # tensors
        self.sparsities: list[float] = []  # of what has a mask, after each batch

    def on_before_optimizer_step(self, *_: Any) -> None:
        for name, keep in self.keeps.items():
            layer = self.pruning._run.masked[name]
            if layer.parameter.grad is not None:
                assert not layer.oriented(layer.part_of(layer.parameter.grad))[~keep].any(), f"a gradient of {name}"

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        run = self.pruning._run
        assert self.keeps.keys() <= set(run.enforcer.masked)
        for name in run.enforcer.masked:
            keep, layer = run.enforcer.keep_mask(name), run.masked[name]
            assert not (keep & ~self.keeps.get(name, keep)).any(), f"a pruned weight of {name} is kept again"
            self.keeps[name] = keep.clone()
            states = [optimizer.state.get(layer.parameter, {}) for optimizer in trainer.optimizers]
            for what, tensor in [("weight", layer.parameter), *(one for state in states for one in state.items())]:
                if torch.is_tensor(tensor) and tensor.shape == layer.parameter.shape:
                    pruned = layer.oriented(layer.part_of(tensor.detach()))[~keep]
                    assert not (pruned.ne(0) | pruned.signbit()).any(), f"{what} of {name} is not 0 where it is pruned"
                    self.checked += 1
        if self.keeps:
            zeros = sum(int((~keep).sum()) for keep in self.keeps.values())
            self.sparsities.append(zeros / sum(keep.numel() for keep in self.keeps.values()))


def trainer(root: Path, *callbacks: Any, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": root,
        "callbacks": list(callbacks),
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**settings, **kwargs})
