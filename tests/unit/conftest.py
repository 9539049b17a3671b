"""A tiny model and a tiny tokenizer in a folder, as a user's own local model would be."""

from pathlib import Path

import pytest

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run")
END = "<end>"


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A folder with a random two-layer Llama and a word tokenizer: one word, one token."""
    # here, since pytest-xdist's own process reads this file, too
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((END, "<unknown>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = str(tmp_path / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text_files(tmp_path: Path) -> str:
    """A glob of 40 files, each of 12 words; with the end token 13 tokens."""
    for index in range(40):
        words = (WORDS[(index * 7 + position * (1 + index % 3)) % len(WORDS)] for position in range(12))
        (tmp_path / f"part-{index:02d}.txt").write_text(" ".join(words))
    return str(tmp_path / "part-*.txt")
