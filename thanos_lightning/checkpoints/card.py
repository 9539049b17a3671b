"""Writes a model card: how an exported model was made, and how it was measured."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path, PurePath

from thanos_lightning.checkpoints.format import TrainerCheckpoint, pruning_state
from thanos_lightning.checkpoints.verify import TensorReport, smaller_shapes
from thanos_lightning.report.data import PruningReport

_CARD = "README.md"


def write_card(
    folder: Path, checkpoint: TrainerCheckpoint, reports: Sequence[TensorReport], adapters: Sequence[str] = ()
) -> None:
    """Write the card of an exported folder from what its checkpoint says of the training.

    `adapters` names the folders of adapters beside the model.
    """
    note = checkpoint.require_note()
    state = pruning_state(checkpoint.content)
    assert state is not None, "it has masks"
    base = note["config"].get("_name_or_path") or note["tokenizer"]
    if base and PurePath(base).is_absolute():  # the card is published, and where a user keeps files is not
        base = PurePath(base).name
    source = f" from {base}" if base else ""
    zeros, numel = sum(report.zeros for report in reports), sum(report.numel for report in reports)
    patterns = ", ".join(sorted({report.pattern for report in reports}))
    what = f"{len(reports)} weights were pruned to the pattern {patterns}"
    if shapes := smaller_shapes(reports):
        what += f", and what was zero as a whole was taken out: {shapes}"
    if zeros:
        what += f". {zeros / numel:.2%} of their entries are zero"
    beside = [
        f"LoRA adapters lie beside it ({', '.join(adapters)}). They add nothing where a weight is 0: after "
        "loading one with peft, call thanos_lightning.mask_adapters(model).",
        "",
    ]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [pruned, thanos-lightning]",
        "---",
        "",
        f"# {note['architecture']}, pruned",
        "",
        f"Made{source} by thanos-lightning {importlib.metadata.version('thanos-lightning')}, in a training of "
        f"{state['optimizer_steps']} optimizer steps: {what}. It loads as any model of transformers does.",
        "",
        *(beside if adapters else []),
        *_measured(PruningReport.from_state(state["report"])),
        "The options of ThanosPruningCallback were:",
        "",
        *(f"    {name} = {value}" for name, value in state["arguments"].items() if value != "None"),
        "",
    ]
    (folder / _CARD).write_text("\n".join(lines), encoding="utf-8")


def _measured(report: PruningReport) -> list[str]:
    summary = report.summary
    if summary.metric is None:
        return []
    label, last = "at the end of the training", summary.recovered
    if last is None and report.history.metrics:  # the checkpoint was saved before the end
        step, value = report.history.metrics[-1]
        if not report.events or step > report.events[-1].step:  # later than what is told of the event
            label, last = f"after {step} optimizer steps", value
    rows = (("before pruning", summary.dense), ("right after the last event", summary.pruned), (label, last))
    table = [f"| {label} | {value:.4g} |" for label, value in rows if value is not None]
    return [f"| {summary.metric} | |", "|---|---|", *table, ""] if table else []
