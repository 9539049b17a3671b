"""Python's documentation as a data set for `TextData`: real text of one field that needs no hub.

    apt-get download python3.13-doc
    dpkg-deb -x python3.13-doc_*.deb unpacked
    python benchmarks/python_documentation.py unpacked pydocs

The text is the documentation's sources (PSF licence, 507 files, 11 MB). One file in ten goes to validation.jsonl, the
others to train.jsonl, each cut into passages of some 2,000 characters, which are shuffled. Files quote one another: a
paragraph that was there before is left out, and of validation one that has twelve words in a row with a paragraph for
training.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_SOURCES = "**/html/_sources/**/*.rst.txt"
_PASSAGE = 2_000  # characters
_QUOTATION = 12  # words


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def runs(paragraph: str) -> Iterator[tuple[str, ...]]:
    """All words in a row that would make a quotation; of a shorter paragraph, all of it."""
    found = words(paragraph)
    for start in range(max(1, len(found) - _QUOTATION + 1)):
        yield tuple(found[start : start + _QUOTATION])


def passages(paragraphs: Iterable[str]) -> Iterator[str]:
    """Consecutive paragraphs, joined until they are long enough."""
    collected: list[str] = []
    for paragraph in paragraphs:
        collected.append(paragraph)
        if sum(map(len, collected)) >= _PASSAGE:
            yield "\n\n".join(collected)
            collected = []
    if collected:
        yield "\n\n".join(collected)


def main() -> None:
    """Read the sources and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unpacked", type=Path, help="folder of the unpacked package")
    parser.add_argument("folder", type=Path, help="to write; made where it is missing")
    arguments = parser.parse_args()
    files = sorted(arguments.unpacked.glob(_SOURCES))
    if not files:
        parser.error(f"{arguments.unpacked} has no {_SOURCES}: give the folder that dpkg-deb -x made")
    random.Random(0).shuffle(files)
    seen: set[str] = set()
    by_file = []
    for path in files:
        paragraphs = []
        for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            same = " ".join(words(block))
            if same and same not in seen:
                seen.add(same)
                paragraphs.append(block.strip("\n"))
        by_file.append(paragraphs)
    training = [paragraphs for index, paragraphs in enumerate(by_file) if index % 10]
    known = {run for paragraphs in training for paragraph in paragraphs for run in runs(paragraph)}
    held_back = by_file[::10]
    fresh = [[text for text in paragraphs if known.isdisjoint(runs(text))] for paragraphs in held_back]
    before, after = (sum(len(text) for paragraphs in some for text in paragraphs) for some in (held_back, fresh))
    print(f"left out of validation, since it quotes the training text: {1 - after / before:.1%}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, split in {"validation": fresh, "train": training}.items():
        documents = [passage for paragraphs in split for passage in passages(paragraphs)]
        random.Random(0).shuffle(documents)
        path = arguments.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
        print(f"{path}: {len(documents):,} passages, {sum(map(len, documents)):,} characters")


if __name__ == "__main__":
    main()
