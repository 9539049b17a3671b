"""Checks that a checkpoint still has the bytes that were written."""

from __future__ import annotations

import zipfile
from pathlib import Path


def require_intact(path: Path) -> None:
    """Check every part of a file from `torch.save` against its checksum (CRC-32), which `torch.load` does not do.

    Reads the whole file, and raises ValueError if bytes of it have changed. Files in the format from before torch 1.6
    have no checksums and pass.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # zipfile raises many kinds of errors for damaged names and sizes
        broken = type(error).__name__
    if broken is not None:
        raise ValueError(
            f"{path} is damaged: some of its bytes are not those that were written ({broken}). Take another "
            "checkpoint, or copy it again"
        )
