"""A tiny model and tokenizer in a folder, as a user's own would be; statistics that never stop; impatient progress."""

from collections.abc import Iterator
from pathlib import Path

import pytest

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run")
END = "<end>"


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A folder with a random two-layer Llama and a word tokenizer: one word, one token."""
    from toy import save_tiny  # here, since pytest-xdist's own process reads this file, too

    sizes = {"intermediate_size": 64, "num_attention_heads": 2, "bos_token_id": None, "eos_token_id": 0}
    return save_tiny(tmp_path / "tiny", [END, "<unknown>", *WORDS], **sizes)


@pytest.fixture
def text_files(tmp_path: Path) -> str:
    """A glob of 40 files, each of 12 words; with the end token 13 tokens."""
    for index in range(40):
        words = (WORDS[(index * 7 + position * (1 + index % 3)) % len(WORDS)] for position in range(12))
        (tmp_path / f"part-{index:02d}.txt").write_text(" ".join(words))
    return str(tmp_path / "part-*.txt")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines about progress come without waiting for seconds."""
    for name, seconds in (("_FIRST_LINE", 0.0), ("_BETWEEN_LINES", 0.0), ("_REFRESH", 0.001)):
        monkeypatch.setattr(f"thanos_lightning.report.progress.{name}", seconds)


@pytest.fixture
def compiling() -> Iterator[None]:
    """Statistics that a test doesn't stop would keep compiled modules of later tests from compiling."""
    yield
    import torch

    torch.compiler.set_stance("default")
