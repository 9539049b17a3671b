"""What is left of the zeros, and of the perplexity, after other libraries have quantised an exported model.

    pip install torchao bitsandbytes llmcompressor gguf   # the last two want a transformers of their own
    python benchmarks/quantized.py exported --text pydocs --libraries torchao bitsandbytes llm-compressor
    pip install 'optimum-intel[openvino,nncf]'             # in an environment of its own
    python benchmarks/quantized.py exported --text pydocs --libraries openvino
    python benchmarks/quantized.py exported --text pydocs --libraries llama.cpp --llama-cpp llama.cpp

Nothing of thanos_lightning is needed. --text is a folder of `benchmarks/python_documentation.py`. --llama-cpp is a
folder of llama.cpp's sources. convert_hf_to_gguf.py writes Q8_0, and build/bin/llama-quantize makes the others:
`cmake -B build && cmake --build build -t llama-quantize` compiles it in ten minutes.

Each model is quantised, written, and loaded again by transformers (OpenVINO: by optimum-intel). A layer's weight is
what the layer makes of the identity matrix, or what the graph multiplies with. "Regrown" are the entries that are 0 in
the export and not 0 in that weight. The perplexity is of the first blocks of 128 tokens of the held-out text.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import keep
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH = 128
Maker = Callable[[Path, Path, argparse.Namespace], None]


def texts(folder: Path, split: str) -> list[str]:
    """The passages of a split."""
    return [json.loads(line)["text"] for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]


def blocks(source: Path, folder: Path, number: int) -> Tensor:
    """Token ids of the held-out text, (number, 128)."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids: list[int] = []
    for text in texts(folder, "validation"):
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= number * LENGTH:
            break
    return torch.tensor(ids[: number * LENGTH]).view(number, LENGTH)


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    """Of each token but a block's first."""
    losses = []
    for batch in tokens.split(8):
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits.float()
        losses.append(cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


# How each library is used, by its own documentation


def by_transformers(config: Callable[[], Any]) -> Maker:
    """Quantise while a model is loaded, and save it."""

    def make(source: Path, target: Path, arguments: argparse.Namespace) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=config(), dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(target)

    return make


def torchao_int8() -> Any:
    """Symmetric, a scale for each row."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_int4() -> Any:
    """Symmetric, a scale for 32 columns of a row."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def bitsandbytes_int8() -> Any:
    """LLM.int8()."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_nf4() -> Any:
    """The levels of a normal distribution, of which one is 0."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def by_llm_compressor(modifier: str, symmetric: bool) -> Maker:
    """int4, a scale for 32 columns of a row; the statistics of 64 passages of the training text."""

    def make(source: Path, target: Path, arguments: argparse.Namespace) -> None:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers import quantization

        weights = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=32)
        groups = {"linear": QuantizationScheme(targets=["Linear"], weights=weights)}
        recipe = getattr(quantization, modifier)(config_groups=groups, ignore=["lm_head"])
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        of_data = {}
        if modifier == "GPTQModifier":
            tokenizer = AutoTokenizer.from_pretrained(source)
            passages = [
                tokenizer(text, truncation=True, max_length=512) for text in texts(arguments.text, "train")[:64]
            ]
            data = Dataset.from_list([{"input_ids": passage["input_ids"]} for passage in passages])
            of_data = {"dataset": data, "num_calibration_samples": len(passages), "max_seq_length": 512}
        oneshot(model=model, recipe=recipe, **of_data)
        model.save_pretrained(target, save_compressed=True)

    return make


def by_llama_cpp(kind: str) -> Maker:
    """The converter writes q8_0; llama-quantize makes the others of bf16, as its users do."""

    def make(source: Path, target: Path, arguments: argparse.Namespace) -> None:
        sources: Path = arguments.llama_cpp
        target.mkdir(parents=True)
        direct = kind == "q8_0"
        file = target / f"{kind if direct else 'bf16'}.gguf"
        subprocess.run(
            [sys.executable, sources / "convert_hf_to_gguf.py", source, "--outtype", file.stem, "--outfile", file],
            env={**os.environ, "PYTHONPATH": str(sources / "gguf-py")},
            check=True,
            capture_output=True,
        )
        if not direct:
            program = arguments.llama_quantize or sources / "build" / "bin" / "llama-quantize"
            subprocess.run([program, file, target / f"{kind}.gguf", kind], check=True, capture_output=True)
            file.unlink()

    return make


def by_openvino(bits: int, **options: Any) -> Maker:
    """Weights alone, as optimum-intel has NNCF compress them."""

    def make(source: Path, target: Path, arguments: argparse.Namespace) -> None:
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig  # type: ignore[import-not-found]

        config = OVWeightQuantizationConfig(bits=bits, **options)
        OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=config).save_pretrained(target)

    return make


def openvino_int8(source: Path, target: Path, arguments: argparse.Namespace) -> None:
    """Weights, and activations by the statistics of 64 passages, as optimum-intel has NNCF quantise them."""
    from optimum.intel import OVModelForCausalLM, OVQuantizationConfig

    data = {"dataset": texts(arguments.text, "train")[:64], "tokenizer": str(source), "num_samples": 64}
    config = OVQuantizationConfig(bits=8, smooth_quant_alpha=0.6, **data)
    OVModelForCausalLM.from_pretrained(source, export=True, quantization_config=config).save_pretrained(target)


LIBRARIES: dict[str, dict[str, Maker]] = {
    "torchao": {"int8": by_transformers(torchao_int8), "int4, symmetric": by_transformers(torchao_int4)},
    "bitsandbytes": {"int8": by_transformers(bitsandbytes_int8), "nf4": by_transformers(bitsandbytes_nf4)},
    "llm-compressor": {
        "int4, round to nearest, symmetric": by_llm_compressor("QuantizationModifier", True),
        "int4, round to nearest, asymmetric": by_llm_compressor("QuantizationModifier", False),
        "int4, GPTQ, symmetric": by_llm_compressor("GPTQModifier", True),
    },
    "llama.cpp": {kind.upper(): by_llama_cpp(kind) for kind in ("q8_0", "q4_0", "q4_k_m")},
    "openvino": {
        "int8, asymmetric": by_openvino(8),
        "int8, symmetric": by_openvino(8, sym=True),
        "int4, asymmetric": by_openvino(4, sym=False, group_size=32, ratio=1.0),
        "int4, symmetric": by_openvino(4, sym=True, group_size=32, ratio=1.0),
        "int8, and activations": openvino_int8,
    },
}
PACKAGES = {
    "torchao": ["torchao"],
    "bitsandbytes": ["bitsandbytes"],
    "llm-compressor": ["llmcompressor", "compressed-tensors"],
    "llama.cpp": ["gguf"],
    "openvino": ["openvino", "optimum-intel", "nncf"],
}


# What is in the files


def load(library: str, folder: Path) -> Any:
    """The quantised model, as its users load it."""
    if library == "openvino":
        from optimum.intel import OVModelForCausalLM

        return OVModelForCausalLM.from_pretrained(folder, ov_config={"INFERENCE_PRECISION_HINT": "f32"})
    if library == "llama.cpp":
        file = next(folder.glob("*.gguf"))
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": "cpu"}
    if library == "llm-compressor":
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(run_compressed=False)
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def weights(library: str, folder: Path, model: Any) -> Iterator[tuple[str, Tensor]]:
    """Name and dequantised weight, (out_features, in_features), of each layer but the head."""
    if library == "openvino":
        import openvino  # type: ignore[import-not-found]

        core = openvino.Core()
        for node in core.read_model(folder / "openvino_model.xml").get_ops():
            name = node.get_friendly_name()
            if node.get_type_name() == "MatMul" and "_proj" in name:
                part = openvino.Model([node.input_value(1)], [])
                (value,) = core.compile_model(part, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([]).values()
                yield name.removeprefix("__module.").partition("/")[0] + ".weight", torch.tensor(value)
        return
    for name, layer in model.named_modules():
        if name.endswith("_proj"):
            dtype = torch.float32 if library == "llama.cpp" else torch.bfloat16
            yield f"{name}.weight", layer(torch.eye(layer.in_features, dtype=dtype)).t()


def bytes_of(folder: Path) -> int:
    """Bytes of the weights on disk."""
    endings = (".safetensors", ".gguf", "openvino_model.bin")
    return sum(file.stat().st_size for file in folder.iterdir() if file.name.endswith(endings))


def main() -> None:
    """Quantise, count, print, and write where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="that `thanos-lightning export` wrote")
    parser.add_argument("--text", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=["torchao"])
    parser.add_argument("--llama-cpp", type=Path, default=Path("llama.cpp"))
    parser.add_argument("--llama-quantize", type=Path, help="the program, if it lies elsewhere")
    parser.add_argument("--blocks", type=int, default=96, help="of 128 tokens, for the perplexity")
    parser.add_argument("--folder", type=Path, default=Path("runs/quantized"), help="for what the libraries write")
    parser.add_argument("--output", type=Path, help="folder for a JSON file of each library")
    arguments = parser.parse_args()
    table = Table("model", "library", "weights", "zeros", "regrown", "perplexity", "file, MiB", title="quantised")
    lines: dict[str, list[dict[str, Any]]] = {library: [] for library in arguments.libraries}

    def add(library: str, line: dict[str, Any]) -> None:
        lines[library].append(line)
        shares = (f"{line[of]:.2%}" for of in ("zeros", "regrown"))
        sizes = (f"{line['perplexity']:.2f}", f"{line['bytes'] / 2**20:.0f}")
        table.add_row(line["model"], library, line["weights"], *shares, *sizes)
        print(json.dumps(line), flush=True)

    for source in arguments.folders:
        name = source.parent.name if source.name == "exported" else source.name
        tokens = blocks(source, arguments.text, arguments.blocks)
        stored = load_file(source / "model.safetensors")
        own = perplexity(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), tokens)
        layers = {name: tensor for name, tensor in stored.items() if name.endswith("_proj.weight")}
        share = sum(int((w == 0).sum()) for w in layers.values()) / sum(w.numel() for w in layers.values())
        for library in arguments.libraries:
            as_exported = {"weights": "as exported", "zeros": share, "regrown": 0.0, "perplexity": own}
            add(library, {"model": name, **as_exported, "bytes": bytes_of(source)})
            for what, make in LIBRARIES[library].items():
                target = arguments.folder / name / f"{library} {what}".replace(",", "").replace(" ", "-")
                if not target.exists():
                    began = time.perf_counter()
                    make(source, target, arguments)
                    print(f"{target} took {time.perf_counter() - began:.0f} s", flush=True)
                    for file in source.glob("token*"):
                        shutil.copy(file, target)
                model = load(library, target)
                zero = was_zero = regrown = count = 0
                for layer, weight in weights(library, target, model):
                    before = layers[layer] == 0
                    zero += int((weight == 0).sum())
                    regrown += int((before & (weight != 0)).sum())
                    was_zero += int(before.sum())
                    count += weight.numel()
                assert count == sum(w.numel() for w in layers.values()), "a layer was not found"
                of_zeros = {"zeros": zero / count, "regrown": regrown / max(was_zero, 1)}
                found = {"model": name, "weights": what, **of_zeros, "perplexity": perplexity(model, tokens)}
                add(library, {**found, "bytes": bytes_of(target)})
                del model
    Console(width=140).print(table)
    for library, found in lines.items():
        versions = {package: importlib.metadata.version(package) for package in [*PACKAGES[library], "transformers"]}
        if arguments.output is not None:
            document = {"versions": versions, "tokens": tokens.numel(), "results": found}
            print(keep(f"quantized {library}", arguments.output, document))


if __name__ == "__main__":
    main()
