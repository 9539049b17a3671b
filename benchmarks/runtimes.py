"""How much faster a language model with fewer feed-forward channels, or with zeros, runs in programs that serve it.

    python benchmarks/runtimes.py
    pip install 'optimum-intel[openvino,nncf]'  # wants a transformers, so an environment, of its own
    python benchmarks/runtimes.py --runtimes transformers openvino "openvino int8" --zeros 0.5 0.6 0.7 0.8
    python benchmarks/runtimes.py --runtimes transformers "torch 2:4" --device cuda --dtype float16

--model llama-3.2-1b-shape --dtype bfloat16 --repeats 3 measures a larger model, of random weights. The smaller models
are made of the dense one by `export`'s own code; which channels they lose changes no time. Each is saved and loaded as
a user would do it. --zeros are shares of random zeros in the decoder layers' matrices. Zeros are run by

    openvino int8   NNCF quantises weights and activations to int8 by the statistics of 64 texts (8 for random weights),
                    and OpenVINO is asked to keep sparse weights compressed (CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE),
                    which it does on CPUs with AMX
    torch 2:4       `to_sparse_semi_structured`, on NVIDIA GPUs from Ampere on: rows in multiples of 32, columns of 64

All models take turns, and each time is the median of --repeats. Tokens per second are of a prompt of 512 tokens
(prefill), and of 64 tokens that `generate` adds to a prompt of 16, for 1 and 8 sequences, on a GPU also of larger
batches. Beside their ratio to the dense model's stands what the bytes that a token reads (decode) or its
multiplications (prefill) promise: the ratio of the weights in matrices, of which the embedding counts as the head.

The logits of each runtime are compared with those of transformers on the dense model with the same weights at zero.
The zeros are counted in the decoder layers' matrices of OpenVINO's file. Peak memory is of a process that loads the
model and generates once; on a GPU, it is the GPU's.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from machine import add_device, keep
from quantized import weights as dequantised
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from thanos_lightning.checkpoints.huggingface import write_model
from thanos_lightning.checkpoints.shrink import shrink
from thanos_lightning.lm.pretrained import load_pretrained
from thanos_lightning.lm.smollm2 import smollm2_folder
from thanos_lightning.ranks.masks import LayerMask
from thanos_lightning.solver import Channels

PROMPT, SHORT_PROMPT, NEW = 512, 16, 64
DENSE_ONES = ("transformers", "openvino")
INT8, SEMI = "openvino int8", "torch 2:4"
# of random weights: hidden size, channels of a block, layers, vocabulary
SHAPES = {"llama-3.2-1b-shape": (2048, 8192, 16, 128256), "smallest-shape": (128, 256, 2, 1024)}


class Saved(NamedTuple):
    """A model on disk."""

    folder: Path
    masked: Path  # the model of the dense one's sizes that computes the same
    runtimes: tuple[str, ...]
    zeros: float = 0.0  # share of its decoder layers' matrices


def new_model(source: str, dtype: str) -> Any:
    """A dense model."""
    if source not in SHAPES:
        return load_pretrained(source, dtype)
    torch.manual_seed(0)
    hidden, width, layers, vocabulary = SHAPES[source]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def save_models(
    source: str, dtype: str, sparsities: list[float], zeros: list[float], runtimes: list[str], folder: Path
) -> dict[str, Saved]:
    """The dense model, the smaller ones, and those with zeros."""
    dense = folder / "dense"
    found = {"dense": Saved(dense, dense, (*DENSE_ONES, INT8, SEMI))}
    if not dense.exists():
        new_model(source, dtype).save_pretrained(dense)

    @torch.no_grad()
    def save(target: Path, keep_mask: Callable[[Tensor], Tensor]) -> None:
        if not target.exists():
            model = load_pretrained(str(dense), dtype)
            for weight in model.model.layers.parameters():
                if weight.ndim == 2:
                    weight.mul_(keep_mask(weight))
            model.save_pretrained(target)

    generator = torch.Generator().manual_seed(0)
    for share in zeros:
        target = folder / f"zeros-{share:g}"
        found[f"{share:.0%} zeros"] = Saved(target, target, (INT8,), share)
        save(target, lambda weight, share=share: torch.rand(weight.shape, generator=generator) >= share)
    if SEMI in runtimes:
        target = folder / "2of4"
        found["2:4"] = Saved(target, target, (SEMI,), 0.5)
        save(target, lambda weight: torch.tensor([1, 0, 0, 1]).repeat(len(weight), weight.shape[1] // 4))
    for sparsity in sparsities:
        target, masked = folder / f"{sparsity:g}", folder / f"{sparsity:g}-masked"
        found[f"{sparsity:.0%} of the channels gone"] = Saved(target, masked, (*DENSE_ONES, INT8))
        if target.exists():
            continue
        model: Any = load_pretrained(str(dense), dtype)
        width = model.config.intermediate_size
        kept = round((1 - sparsity) * width / 64) * 64
        masks = {}
        with torch.no_grad():
            for number, layer in enumerate(model.model.layers):
                keep_mask = torch.rand(width, generator=torch.Generator().manual_seed(number)).argsort() < kept
                for part, columns in (("down_proj", True), ("gate_proj", False), ("up_proj", False)):
                    weight = getattr(layer.mlp, part).weight
                    mask = keep_mask.expand_as(weight) if columns else keep_mask.unsqueeze(1).expand_as(weight)
                    weight.mul_(mask)
                    pattern = Channels(1 - kept / width, dim=1 if columns else 0)
                    masks[f"model.layers.{number}.mlp.{part}.weight"] = LayerMask.of(mask, pattern)
            model.save_pretrained(masked)
            write_model(target, *shrink(model, model.state_dict(), masks, folder))
    return found


def converted(runtime: str, folder: Path, passages: list[str]) -> Path:
    """The folder that a runtime reads, made from a saved model; int8 has statistics of the passages."""
    if runtime in ("transformers", SEMI):
        return folder
    from optimum.intel import OVModelForCausalLM, OVQuantizationConfig  # type: ignore[import-not-found]

    target = folder.with_name(f"{folder.name}-{runtime.replace(' ', '-')}")
    if not target.exists():
        how: dict[str, Any] = {"load_in_8bit": False}
        if runtime == INT8:
            data = {"dataset": passages, "tokenizer": str(smollm2_folder()), "num_samples": len(passages)}
            how = {"quantization_config": OVQuantizationConfig(bits=8, smooth_quant_alpha=0.6, **data)}
        OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, **how).save_pretrained(target)
    return target


def load(runtime: str, folder: Path, zeros: float = 0.0, device: str = "cpu", *, exact: bool = False) -> Any:
    """A runtime's model; `exact` computes in float32 what is not quantised and has no 2:4."""
    if runtime in ("transformers", SEMI):
        exact = exact and runtime != SEMI
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if exact else "auto").eval()
        if runtime == SEMI and zeros and device == "cuda":
            use_semi_structured(model.to(device).model.layers)
        return model.to(device)
    from optimum.intel import OVModelForCausalLM

    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"} if exact else {}
    if zeros:  # layers with a smaller share are not compressed
        config["CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE"] = round(zeros - 0.01, 3)
    return OVModelForCausalLM.from_pretrained(folder, ov_config=config)


@torch.no_grad()
def use_semi_structured(layers: nn.Module) -> None:
    """Compress the weights of all linear layers."""
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight), requires_grad=False)


@torch.no_grad()
def logits(model: Any, tokens: Tensor) -> Tensor:
    """(batch, tokens, vocabulary), float32, on the CPU."""
    tokens = tokens.to(model.device)
    found: Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return found.float().cpu()


@torch.no_grad()
def generated(model: Any, batch: int, new: int) -> float:
    """Seconds to add so many tokens to each sequence."""
    tokens = (torch.arange(batch * SHORT_PROMPT).view(batch, -1) % 900 + 100).to(model.device)
    begin = time.perf_counter()
    model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False
    ).tolist()  # waits for a GPU
    return time.perf_counter() - begin


def decode(batch: int) -> Callable[[Any], float]:
    """Measures tokens per second of generation; the prompt's time is taken off."""
    return lambda model: batch * (NEW - 1) / (generated(model, batch, NEW) - generated(model, batch, 1))


def prefill(batch: int) -> Callable[[Any], float]:
    """Measures tokens per second of prompts."""

    @torch.no_grad()
    def measure(model: Any) -> float:
        tokens = (torch.arange(PROMPT) + 100).repeat(batch, 1).to(model.device)
        begin = time.perf_counter()
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[-1, -1].tolist()  # waits for a GPU
        return batch * PROMPT / (time.perf_counter() - begin)

    return measure


MEASURED: dict[str, Callable[[Any], float]] = {"prefill": prefill(1), "decode": decode(1), "decode of 8": decode(8)}
LARGE: dict[str, Callable[[Any], float]] = {"prefill of 16": prefill(16), "decode of 64": decode(64)}


def matrices(folder: Path) -> int:
    """Weights that a token is multiplied with."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    linear = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    return int(linear + model.lm_head.weight.numel())


def file_size(folder: Path) -> int:
    """Bytes of the weights on disk."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))


def zeros_left(folder: Path) -> float:
    """The share of zeros in the decoder layers' matrices of OpenVINO's file."""
    counts = [(int((weight == 0).sum()), weight.numel()) for _, weight in dequantised("openvino", folder, None)]
    return sum(zero for zero, _ in counts) / sum(count for _, count in counts)


def peak_memory(runtime: str, folder: Path, zeros: float, device: str) -> int:
    """Bytes, in a process of its own."""
    command = [sys.executable, __file__, "--peak", runtime, str(folder), str(zeros), "--device", device]
    return int(subprocess.run(command, capture_output=True, check=True).stdout.split()[-1])


def main() -> None:
    """Measure, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a Llama: hub name, local folder, smollm2-135m or a shape"
    )
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.3, 0.5], help="of channels")
    parser.add_argument("--zeros", nargs="+", type=float, default=[], help="anywhere, for the runtime openvino int8")
    parser.add_argument("--runtimes", nargs="+", choices=(*DENSE_ONES, INT8, SEMI), default=["transformers"])
    parser.add_argument("--dtype", default="float32", help="of the saved weights")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--folder", type=Path, default=Path("runs/runtimes"), help="for the models")
    parser.add_argument("--output", type=Path, help="folder for a JSON file, named after the hardware")
    add_device(parser)
    parser.add_argument("--peak", nargs=3, metavar=("RUNTIME", "FOLDER", "ZEROS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(arguments.threads)
    if arguments.peak is not None:
        runtime, read, zeros = arguments.peak
        generated(load(runtime, Path(read), float(zeros), device), 1, 8)
        if device == "cuda":
            print(torch.cuda.max_memory_allocated())
            return
        # not ru_maxrss, which begins with what the parent has
        status = Path("/proc/self/status").read_text(encoding="ascii")
        print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
        return
    if SEMI in arguments.runtimes and device == "cpu":
        print("torch runs 2:4 on GPUs only: here its weights stay dense, which shows no more than that this runs")
    measured = MEASURED if device == "cpu" else MEASURED | LARGE
    folder = arguments.folder / f"{Path(arguments.model).name}-{arguments.dtype}"
    runtimes = arguments.runtimes
    saved = save_models(arguments.model, arguments.dtype, arguments.sparsities, arguments.zeros, runtimes, folder)
    weights = {name: matrices(one.folder) for name, one in saved.items()}
    table = Table(title=f"{Path(arguments.model).name}, {arguments.dtype}")
    columns = ("model", "promised", *measured, "zeros", "logits differ by", "file, MiB", "peak, MiB")
    table.add_column("runtime")
    for column in columns:
        table.add_column(column, justify="right")
    lines: list[dict[str, Any]] = []
    tokens = torch.arange(2 * 24).view(2, -1) + 100
    passages = [text[:2000] for text in topics.values()][: 8 if arguments.model in SHAPES else 64]
    for runtime in runtimes:
        run = {name: one for name, one in saved.items() if runtime in one.runtimes}
        # each in a process of its own: NNCF keeps gigabytes
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            made = {name: pool.submit(converted, runtime, one.folder, passages) for name, one in run.items()}
            read = {name: future.result() for name, future in made.items()}
        differences: dict[str, float] = {}
        for name, one in run.items():
            found_logits = logits(load(runtime, read[name], one.zeros, device, exact=True), tokens)
            own = logits(load("transformers", one.masked, device=device, exact=True), tokens)
            differences[name] = float((found_logits - own).norm() / own.norm())
        gc.collect()
        models = {name: load(runtime, read[name], one.zeros, device) for name, one in run.items()}
        found: dict[str, dict[str, list[float]]] = {name: {what: [] for what in measured} for name in run}
        for number in range(arguments.repeats + 1):
            for what, measure in measured.items():
                for name, model in models.items():
                    rate = measure(model)
                    if number:  # the first one warms up
                        found[name][what].append(rate)
        del models
        for name, one in run.items():
            rates = {what: statistics.median(values) for what, values in found[name].items()}
            ratios = {
                what: statistics.median(
                    own / dense for own, dense in zip(found[name][what], found["dense"][what], strict=True)
                )
                for what in measured
            }
            line = {
                "runtime": runtime,
                "model": name,
                "promised": round(weights["dense"] / weights[name], 3),
                "tokens_per_second": {what: round(rate, 1) for what, rate in rates.items()},
                "ratios": {what: round(ratio, 3) for what, ratio in ratios.items()},
                "zeros": round(zeros_left(read[name]), 4) if runtime == INT8 else None,
                "logits_differ": differences[name],
                "file_bytes": file_size(read[name]),
                "peak_bytes": peak_memory(runtime, read[name], one.zeros, device),
            }
            lines.append(line)
            print(line, flush=True)
            table.add_row(
                runtime,
                name,
                f"{line['promised']:.2f}",
                *(f"{rates[what]:.0f}/s, {ratios[what]:.2f}" for what in measured),
                "" if line["zeros"] is None else f"{line['zeros']:.1%}",
                f"{differences[name]:.0e}",
                f"{line['file_bytes'] / 2**20:.0f}",
                f"{line['peak_bytes'] / 2**20:.0f}",
            )
    Console(width=160).print(table)
    if arguments.output is not None:
        of_all = {"model": Path(arguments.model).name, "dtype": arguments.dtype, "repeats": arguments.repeats}
        document = {**of_all, "results": lines}
        print(keep(f"runtimes {Path(arguments.model).name} {arguments.dtype}", arguments.output, document, device))


if __name__ == "__main__":
    main()
