"""Whether the bytes of a checkpoint are those that were written."""

from __future__ import annotations

import zipfile
from pathlib import Path


def require_intact(path: Path) -> None:
    """Hold all parts of a file that `torch.save` wrote against their checksums (CRC-32), which `torch.load` does not.

    Reads the whole file. One of the format before torch 1.6 has none, and passes.

    Raises:
        ValueError: If bytes of it have changed.

    Examples:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "a.pt"
        ...     torch.save(torch.ones(3), file)
        ...     require_intact(file)
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # whatever changed bytes among the names and sizes make zipfile say
        broken = type(error).__name__
    if broken is not None:
        raise ValueError(
            f"{path} is damaged: some of its bytes are not those that were written ({broken}). Take another "
            "checkpoint, or copy it again"
        )
