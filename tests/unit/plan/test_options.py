"""What is asked of the callback, and can't be right: each wrong value with the words of its error."""

from __future__ import annotations

import re
from typing import Any

import jaxtyping
import pytest
from torch.utils.data import DataLoader
from toy import grouped

from thanos_lightning import SparsitySchedule, TargetOverride, ThanosPruningCallback
from thanos_lightning.plan.allocation import Allocation

MAGNITUDE: dict[str, Any] = {"method": "magnitude", "admm_steps": 0, "refine_steps": 0}
NAN, INFINITY = float("nan"), float("inf")
FRACTIONS = (0, 1, -0.1, 1.5, NAN, "0.5", [0.5], True)  # none of which is one
BATCHES = [{"input_ids": None}]
CHANNELS: dict[str, Any] = {"pattern": "channels", "sparsity": 0.25}
SIZED: dict[str, Any] = {"pattern": "channels"}
COLUMNS: dict[str, Any] = {"pattern": "structured", "sparsity": 0.3}
UNSTRUCTURED: dict[str, Any] = {"pattern": "unstructured", "sparsity": 0.5}


def each(name: str, values: tuple[Any, ...], words: str, **others: Any) -> list[tuple[dict[str, Any], str]]:
    return [({**others, name: value}, words.format(value)) for value in values]


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks of annotations that tests have, which would be first to refuse another type."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pattern": "4:2"}, "n:m = 4:2 keeps n of every m weights and needs 1 <= n < m"),
        ({"pattern": "2:x"}, "pattern='2:x' is no pattern: write"),
        ({"pattern": 124}, 'reads an unquoted 2:4 as the number 124: quote it as "2:4"'),
        ({"pattern": (2, 4)}, 'pattern=(2, 4) is no pattern: write n:m such as "2:4"'),
        ({"pattern": "unstructured"}, "pattern='unstructured' needs a sparsity: give the fraction"),
        *each("sparsity", FRACTIONS, "sparsity={!r} is not a number between 0 and 1", pattern="unstructured"),
        ({"pattern": "2:4", "sparsity": 0.7}, "sparsity=0.7 contradicts pattern 2:4"),
        ({"pattern": "2:4", "sparsity": "0.5"}, "sparsity='0.5' is not a number"),
        ({"outlier_fraction": "0.1"}, "outlier_fraction='0.1' is not a number in [0, 1): give"),
        ({"schedule": [1, 2, 3]}, "schedule is [1, 2, 3]: give a SparsitySchedule"),
        ({"targets": None}, "targets is None: give a list of globs"),
        ({"targets": [3]}, "targets holds 3: give globs"),
        ({"targets": []}, "targets is []: give at least one"),
        ({"targets": ["re:("]}, "'re:(' is not a regular expression"),
        ({"ignore": None}, "ignore is None: give a list of globs"),
        ({"ignore": [""]}, "ignore holds '': give globs"),
        ({"overrides": ["x"]}, "overrides holds 'x': give a list of TargetOverride"),
        ({"overrides": None}, "overrides is None: give a list of TargetOverride"),
        ({"overrides": [TargetOverride(["*"], "4:2")]}, "n:m = 4:2"),
        ({"overrides": [TargetOverride(None, "2:4")]}, "an override's targets is None: give a list"),  # type: ignore[arg-type]
        ({"method": "obs"}, "method='obs' is not known: choose one of thanos, sparsegpt, wanda, magnitude"),
        *each("block_size", (0, 1.5, "64", NAN), "block_size={!r} is not a whole number >= 1"),
        *each("damping", (-1.0, NAN, INFINITY, "x", None), "damping={!r} is not a finite number"),
        ({"saliency": "magnitude"}, "saliency='magnitude' is not known: choose one of wanda, obs, balanced"),
        *each("admm_steps", (-1, 1.5, NAN, None), "admm_steps={!r} is not a whole number"),
        *each("refine_steps", (-1, 1.5, NAN, True), "refine_steps={!r} is not a whole number"),
        *each("steps", (0, 0.1, "8", NAN, True), "calibration.steps is {!r}: give a whole number of optimizer steps ≥"),
        ({"batches": "train"}, "calibration.batches is 'train': give a DataLoader, a list of"),
        ({"batches": 3}, "calibration.batches is 3: give a DataLoader"),
        ({"batches": {"input_ids": [1]}}, "calibration.batches is {'input_ids': [1]}: give"),
        ({"batches": ["a text"]}, "calibration.batches holds text ('a text'), not batches: give"),
        ({"batches": []}, "calibration.batches has no batch ([]): give"),
        ({"batches": DataLoader([])}, "calibration.batches has no batch (DataLoader of 0"),  # type: ignore[arg-type]
        ({"batches": iter([])}, "calibration.batches is an iterator, which the first event"),
        ({"attention_mask_key": 3}, "calibration.attention_mask_key is 3: give a name, such as 'attention_mask', or N"),
        *each("memory_gib", (0.0, -1, NAN, INFINITY, "4GiB"), "calibration.memory_gib is {!r}: give a number of GiB >"),
        ({"output_weights": "fisher"}, "calibration.output_weights is 'fisher': choose 'diagonal', 'uniform' or None"),
        ({"allocation": "loss"}, "allocation is 'loss': give Allocation(...)"),
        ({"allocation": Allocation(), **MAGNITUDE}, "method 'magnitude' reports no losses"),
        ({"verify_every_n_steps": -1}, "verify_every_n_steps is -1: give a whole number"),
        ({"monitor": 3}, "monitor is 3: give a name, such as 'val/loss', or None"),
        ({"reorder": "yes"}, "reorder is 'yes': give True or False"),
        ({"block_steps": 8}, "calibration.block_steps is 8, but there are no calibration.batches"),
        ({"block_steps": -1, "batches": BATCHES}, "calibration.block_steps is -1"),
        *each("multiple_of", (0, 2.5), "multiple_of is {}: give a whole number", **CHANNELS),
        *each("parameters", (0, -1, NAN, INFINITY, "1e9", True), "parameters is {!r}: give a number > 0", **SIZED),
        *each("file_gib", (0.0, INFINITY), "file_gib is {!r}: give a number > 0, such as 0.9", **SIZED),
        ({**CHANNELS, "parameters": 1e9}, "sparsity and parameters are given, which all say how small the model gets"),
        ({**SIZED, "parameters": 1e9, "file_gib": 0.9}, "parameters and file_gib are given, which all say how small"),
        ({"parameters": 1e9}, "parameters is 1e+09, but the pattern '2:4' makes no model smaller: give pattern"),
        ({**CHANNELS, "allocation": Allocation("loss")}, "channels go in equal number from each block"),
        # What changes nothing
        ({"multiple_of": 4}, "multiple_of is 4, but no pattern is 'channels'"),
        ({"method": "wanda", "saliency": "obs"}, "solver.saliency is 'obs', but method 'wanda' has its own: leave"),
        ({"method": "wanda", "block_size": 64}, "solver.block_size is 64, but method 'wanda' prunes no blocks"),
        ({"method": "wanda", "admm_steps": 0, "refine_steps": 0, "damping": 0.1}, "solver.damping is 0.1, but"),
        ({**COLUMNS, "block_size": 64}, "solver.block_size is 64, but method 'thanos' prunes"),
        ({**COLUMNS, "saliency": "obs"}, "solver.saliency is 'obs', but a pattern"),
        ({"steps": 8, "batches": BATCHES}, "calibration.steps is 8, but layers are"),
        ({**MAGNITUDE, "steps": 8}, "calibration.steps is 8, but method 'magnitude' looks at no batches"),
        ({**MAGNITUDE, "batches": BATCHES}, "calibration.batches is list of 1 batch(es), but method"),
    ],
)
def test_a_wrong_value_is_named_with_its_mend(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ThanosPruningCallback(**grouped(**arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {**UNSTRUCTURED, "schedule": SparsitySchedule(0, 10, 5), "targets": "*", "ignore": [], "method": "sparsegpt"},
        {"batches": DataLoader(BATCHES), "attention_mask_key": None, "memory_gib": 4, "damping": 1},  # type: ignore[arg-type]
        # defaults, as a saved configuration gives all of them: equal, and another object
        {**MAGNITUDE, "attention_mask_key": "".join(("attention", "_mask")), "steps": 32, "memory_gib": None},
        # what changes something for an override, and for the steps after the method
        {**COLUMNS, "overrides": [TargetOverride(["*.down_proj"], "2:4")], "block_size": 64, "saliency": "obs"},
        {"method": "wanda", "damping": 0.1},
    ],
)
def test_what_is_right_is_taken_in_any_form(arguments: dict[str, Any]) -> None:
    assert ThanosPruningCallback(**grouped(**arguments)).options.calibration.steps == 32
