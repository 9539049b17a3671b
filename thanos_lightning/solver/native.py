"""C code for operations that are slow in torch on CPUs. The machine's own compiler builds it at the first use.

Only CPUs use it. Without a compiler the solver does the same in torch, several times slower.
"""

import ctypes
import errno
import functools
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

if TYPE_CHECKING:
    from thanos_lightning.solver.admm import Iterates

# Interleaved systems of this size take 16 MiB per thread. On larger systems, one by one, LAPACK is as fast.
LARGEST = 512
SWITCH = "THANOS_LIGHTNING_NATIVE"
_SOURCE = Path(__file__).with_name("native.c")
_COMPILE_SECONDS = 120
# Flags to try in turn. Apple's compiler has no -fopenmp, so that the code runs on one thread there.
_FLAGS = [["-O3", "-march=native", "-fopenmp"], ["-O3", "-march=native"], ["-O3"]]


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """Load the C code. None if it can't be built, with a warning, or if ``THANOS_LIGHTNING_NATIVE=0`` turns it off."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        with _own_folder() as folder:
            loaded = ctypes.CDLL(str(_built(folder)))
    except (OSError, subprocess.SubprocessError) as error:
        of_the_folder = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC)
        unwritable = isinstance(error, OSError) and error.errno in of_the_folder
        mend = "Set XDG_CACHE_HOME to another folder" if unwritable else "Install a C compiler (gcc or clang)"
        warnings.warn(
            f"the solver's C code can't be built ({' '.join(str(error).split())}): pruning on the CPU will take "
            f"several times as long. {mend}, or set {SWITCH}=0 to do without it",
            stacklevel=2,
        )
        return None
    pointer, number, real, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    matrix = (pointer, number)  # address and stride
    loaded.thanos_solve_subsets.restype = number
    loaded.thanos_solve_subsets.argtypes = [pointer, number, *[pointer] * 4, number, number, threads]
    loaded.thanos_bracket.restype = number
    loaded.thanos_bracket.argtypes = [*matrix, *matrix, pointer, number, real, real, *[pointer] * 3, threads]
    loaded.thanos_project.restype = number
    loaded.thanos_project.argtypes = [
        pointer, *matrix, *[pointer] * 3, *matrix, pointer, *[number] * 3, real, real, threads
    ]  # fmt: skip
    loaded.thanos_lowest_in_groups.restype = None
    loaded.thanos_lowest_in_groups.argtypes = [pointer, number, number, number, pointer, threads]
    return loaded


def usable(tensor: Tensor) -> bool:
    """Whether the C code is for this tensor: float32 on a CPU."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and compiled() is not None


def _loaded() -> ctypes.CDLL:
    code = compiled()
    assert code is not None, "call it for tensors that are usable"
    return code


def _rows_of(matrix: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the matrix with contiguous rows, and its address and stride. The matrix has to outlive the call."""
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    return matrix, (matrix.data_ptr(), matrix.stride(0))


def solve_subsets(
    matrix: Float[Tensor, "n n"],
    members: Bool[Tensor, "rows n"],
    rhs: Float[Tensor, "rows n"],
    order: Int64[Tensor, " rows"],
    largest: int,
) -> tuple[Float[Tensor, "rows n"], int]:
    """Do the same as ``linalg.solve_subsets``, for tensors that are ``usable``.

    ``order`` holds all rows, with sets of similar size side by side. ``largest`` is the size of the largest set. Return
    the solutions, and the number of pivots that were not positive. The solutions are valid only if it is 0. Raises
    MemoryError if a thread lacks the memory for the systems that it interleaves.
    """
    n = len(matrix)
    extended = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
    members, rhs, order = members.contiguous(), rhs.contiguous(), order.contiguous()
    solution = torch.zeros_like(rhs)
    tensors = (members, rhs, solution, order)
    failed: int = _loaded().thanos_solve_subsets(
        extended.data_ptr(), n, *(tensor.data_ptr() for tensor in tensors), len(order), largest, torch.get_num_threads()
    )
    if failed < 0:
        raise MemoryError(f"no memory to solve for {largest} weights a row: choose a smaller block_size")
    return solution, failed


def bracket(
    W: Float[Tensor, "rows cols"],
    frozen: Bool[Tensor, "rows cols"],
    scale: Float[Tensor, " cols"],
    low: float,
    high: float,
) -> tuple[int, Float[Tensor, " inside"]]:
    """Count the scores |W_ij| scale_j (-inf where frozen) below ``low``, and return those from ``low`` to ``high``."""
    rows, cols = W.shape
    threads = torch.get_num_threads()
    (W, weights), (frozen, zeros) = _rows_of(W), _rows_of(frozen)
    scale = scale.contiguous()
    first = torch.arange(threads + 1, device="cpu") * rows // threads
    counts = torch.zeros(threads, dtype=torch.int64, device="cpu")
    inside = W.new_empty(rows * cols)  # the C code touches only the entries that it finds
    below: int = _loaded().thanos_bracket(
        *weights, *zeros, scale.data_ptr(), cols, low, high, inside.data_ptr(), first.data_ptr(),
        counts.data_ptr(), threads,
    )  # fmt: skip
    parts = [inside[row * cols :][:count] for row, count in zip(first.tolist(), counts.tolist(), strict=False)]
    return below, torch.cat(parts)


def lowest_in_groups(scores: Float[Tensor, "rows cols"], width: int, count: int) -> Bool[Tensor, "rows cols"]:
    """True for the ``count`` lowest of every ``width`` consecutive scores. Of equal scores the first wins."""
    scores = scores.contiguous()
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    _loaded().thanos_lowest_in_groups(
        scores.data_ptr(), scores.numel() // width, width, count, chosen.data_ptr(), torch.get_num_threads()
    )
    return chosen


def project(moved: Float[Tensor, "rows cols"], iterates: "Iterates", ratio: float) -> None:
    """Do the same as ``admm.Iterates.project``."""
    written = (moved, iterates.U, iterates.from_original, iterates.keep)
    assert all(tensor.is_contiguous() for tensor in written)
    rows, cols = moved.shape
    (_original, weights), (_frozen, zeros) = _rows_of(iterates.original), _rows_of(iterates.frozen)
    scale = iterates.scale.contiguous()
    failed = _loaded().thanos_project(
        moved.data_ptr(), *weights, *(tensor.data_ptr() for tensor in written[1:]), *zeros, scale.data_ptr(),
        rows, cols, iterates.width, iterates.relaxation, ratio, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for rows of {cols} columns")


def cache_folder() -> Path:
    """The user's folder for what takes long to make."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thanos_lightning"


@contextmanager
def _own_folder() -> Iterator[Path]:
    """Yield the cache folder of libraries if this user alone can write to it, and else a new folder for this process.

    A library runs when it is loaded, and a cache may be shared.
    """
    folder = cache_folder() / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if os.name != "posix" or (found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as private:
        yield Path(private)


def _built(cache: Path) -> Path:
    """Return the shared library for this source and this CPU, and build it if it isn't in the folder yet."""
    library = cache / f"native-{hashlib.sha256(_SOURCE.read_bytes() + _cpu().encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / "native.so"
        compiler = shlex.split(os.environ.get("CC", "cc"))  # CC may be "ccache gcc"
        for flags in _FLAGS:
            command = [*compiler, *flags, "-shared", "-fPIC", "-o", str(built), str(_SOURCE)]
            made = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
            if made.returncode == 0:
                built.replace(library)  # atomic: other processes may look for the library
                return library
    raise OSError(f"{command[0]} says: {made.stderr}")


def _cpu() -> str:
    """Describe what -march=native depends on, since machines of different kinds may share a home folder."""
    description = f"{sys.platform} {platform.machine()} {platform.processor()}"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        description += "".join(
            line for line in cpuinfo.read_text().splitlines()[:40] if line.startswith(("flags", "Features"))
        )
    return description
