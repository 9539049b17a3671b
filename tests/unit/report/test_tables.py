import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import rich
from rich.console import Console

from thanos_lightning.report.data import BlockReport, EventReport, LayerReport, PruningReport, Summary
from thanos_lightning.report.tables import alike, kinds_of, print_event, print_outcome, print_summary


def layer(name: str, shape: tuple[int, int] = (14336, 14336)) -> LayerReport:
    return LayerReport(name, shape, "unstructured", 0.5, 2.0, 0.04, 1234.5)


def printed(function: Callable[..., None], *args: Any, width: int = 80, **options: Any) -> str:
    """What a function prints on a console of this width."""
    said = io.StringIO()
    with patch.object(rich, "_console", Console(file=said, width=width)):
        function(*args, **options)
    return said.getvalue()


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["h.0.attn.proj", "h.0.mlp.proj", "h.1.mlp.up"], ["attn.proj", "mlp.proj", "up"]),
        (["model.0", "model.2"], ["model.0", "model.2"]),
        (["a.b.c.fc", "x.b.c.fc"], ["a.b.c.fc", "x.b.c.fc"]),
        (["fc", "head.fc"], ["fc", "head.fc"]),
        (["layers.0.experts.3.up", "layers.1.experts.7.up"], ["up", "up"]),
    ],
)
def test_kinds_have_the_shortest_names_that_tell_them_apart(names: list[str], kinds: list[str]) -> None:
    assert list(kinds_of(names).values()) == kinds


@pytest.mark.parametrize("width", [80, 120])
def test_the_event_table_has_a_row_a_kind_and_adds_up(width: int) -> None:
    names = ("layers.0.up_proj", "layers.1.up_proj", "layers.0.self_attn.proj", "l.0.mlp.proj")
    event = EventReport(20, 0.5, [layer(name) for name in names], 100.0, 0.0, 4938.0, writing_seconds=2.5)
    text = printed(print_event, event, width=width)
    assert max(map(len, text.splitlines())) <= 80
    assert "optimizer step 20, where 50.0% was asked for" in text
    (up,) = [line for line in text.splitlines() if "up_proj" in line]
    assert up.split() == ["up_proj", "2", "14336×14336", "unstructured", "50.00%", "0.0400", "0.0400", "2469.0", "s"]
    assert "5040.5 s in all: calibrating 100.0 s, solving 4938.0 s, writing 2.5 s\n" in text
    assert "Loss: the squared change" in text
    assert {"self_attn.proj", "mlp.proj"} <= {word for line in text.splitlines() for word in line.split()[:1]}


def test_the_event_says_what_reconstruction_gained() -> None:
    blocks = [BlockReport("l.0", 0.04, 0.03, 1.0), BlockReport("l.1", 0.08, 0.05, 1.0)]
    event = EventReport(20, 0.5, [layer("l.0.up_proj")], 100.0, 30.0, 4938.0, 200.0, 2.5, blocks)
    lines = printed(print_event, event).splitlines()
    assert "2 blocks reconstructed: the mean loss of a block went from 0.060 to 0.040" in lines
    assert "5270.5 s in all: calibrating 100.0 s, scanning 30.0 s, solving 4938.0 s," in lines
    assert "reconstructing 200.0 s, writing 2.5 s" in lines


def test_no_line_ends_between_a_number_and_its_unit() -> None:
    for seconds in (0.5, 12.5, 123.4, 1234.5, 12345.6, 123456.7):
        event = EventReport(20, 0.5, [layer("up")], seconds, 0.0, seconds, seconds, seconds)
        assert not any(line[-1].isdigit() for line in printed(print_event, event).splitlines() if "ing " in line)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((24.79, 37.4, 20.177), ["24.79", "37.40", "20.18"]),
        ((523.0, 521.4, 484.0), ["523.0", "521.4", "484.0"]),
        ((0.8946, 0.1848, 0.04211), ["0.8946", "0.1848", "0.0421"]),
        ((12345.6, math.nan), ["12346", "nan"]),
        ((0.0,), ["0.000"]),
    ],
)
def test_numbers_of_a_column_have_the_same_decimals(values: tuple[float, ...], shown: list[str]) -> None:
    assert alike(values) == shown


def test_the_summary_has_both_shares_and_what_was_measured() -> None:
    steps = ((20, 0.0), (30, 3.0))
    events = [EventReport(step, 0.5, [layer("a")], 4.0, scan, 2.0, writing_seconds=1.0) for step, scan in steps]
    summary = Summary("val/perplexity", 10.0, 20.0, None, 100.0, 12.0, 5.0, 790, 1000, 0.5)
    text = printed(print_summary, PruningReport(events, summary))
    assert max(map(len, text.splitlines())) <= 80
    assert "Pruned 50.00% of the layers' weights, 39.5% of the whole model's, in 2 events" in text
    assert "not measured" in text
    assert "val/perplexity" in text
    assert "Pruning took 17.0% of 100.0 s of training, 17.0 s:" in text
    assert "calibrating 8.0 s, scanning 3.0 s, solving 4.0 s, writing 2.0 s" in text


def test_the_summary_has_no_table_where_nothing_was_asked() -> None:
    text = printed(print_summary, PruningReport([EventReport(20, 0.5, [layer("a")])], Summary(sparsity=0.5)))
    assert text.splitlines() == ["Pruned 50.00% of the layers' weights in 1 event"]


def test_the_end_names_what_was_left_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    for name in ("last.ckpt", "pruning_report.json"):
        (tmp_path / "run" / name).touch()
    monkeypatch.chdir(tmp_path)
    lines = [
        "  checkpoint  run/last.ckpt\n",
        "  report      run/pruning_report.json\n",
        "  next        thanos-lightning export run/last.ckpt exported\n",
    ]
    report = tmp_path / "run" / "pruning_report.json"
    for checkpoint, export, said in (
        (tmp_path / "run" / "last.ckpt", Path("exported"), lines),
        (tmp_path / "run" / "last.ckpt", None, lines[:2]),
        (None, Path("exported"), lines[1:2]),
    ):
        assert printed(print_outcome, checkpoint, report, width=20, export=export) == "".join(said)
