from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from thanos_lightning.report import (
    EventReport,
    LayerReport,
    PruningReport,
    Summary,
    event_progress,
    plot_report,
    print_event,
    print_summary,
)

TIMES = ("training_seconds", "event_seconds", "collecting_seconds")


def report() -> PruningReport:
    layers = [
        LayerReport("model.layers.0.up_proj", (8, 4), "2:4", 0.5, 2.0, 0.04, 0.5),
        LayerReport("model.layers.1.up_proj", (8, 4), "2:4", 0.5, 3.0, 0.08, 0.25),
        LayerReport("model.layers.1.down_proj", (4, 16), "2:4", 0.25, math.nan, 0.03, 0.25),
    ]
    return PruningReport([EventReport(20, 0.5, layers)], Summary("val/perplexity", 10.0, 20.0, None))


def shown(function: object, *args: object) -> str:
    console = Console(file=io.StringIO(), width=80)
    function(*args, console)  # type: ignore[operator]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_an_event_weighs_layers_by_size() -> None:
    event = report().events[0]
    assert event.sparsity == pytest.approx((0.5 * 64 + 0.25 * 64) / 128)
    assert event.seconds == 1.0
    assert event.relative_loss == pytest.approx(0.05)


def test_the_state_makes_the_same_report_again() -> None:
    state = json.loads(json.dumps(PruningReport([EventReport(5, 0.5)], Summary("loss", 1.0)).state()))
    assert PruningReport.from_state(state) == PruningReport([EventReport(5, 0.5)], Summary("loss", 1.0))
    again = PruningReport.from_state(report().state())
    assert again.events[0].layers[0] == report().events[0].layers[0]


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pruning_report.json"
    report().write(path)
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["events"][0]["layers"][2]["loss"] is None
    measured = {"metric": "val/perplexity", "dense": 10.0, "pruned": 20.0, "recovered": None}
    assert read["summary"] == {**measured, **dict.fromkeys(TIMES, 0.0)}
    assert [entry.name for entry in path.parent.iterdir()] == ["pruning_report.json"]
    again = PruningReport.read(path)
    assert math.isnan(again.events[0].layers[2].loss)
    assert again.events[0].layers[:2] == report().events[0].layers[:2]
    path.write_text("{}")
    with pytest.raises(ValueError, match="no pruning report"):
        PruningReport.read(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        PruningReport.read(tmp_path / "none.json")


def test_the_event_table_has_a_row_a_kind() -> None:
    text = shown(print_event, report().events[0])
    assert "optimizer step 20 to 50.0%" in text
    (up,) = [line for line in text.splitlines() if "up_proj" in line]
    assert up.split() == ["up_proj", "2", "8×4", "2:4", "50.00%", "0.0600", "0.0800", "0.8", "s"]
    assert max(map(len, shown(print_event, report().events[0]).splitlines())) <= 80
    assert "down_proj" in text


def test_the_summary_says_what_was_not_measured() -> None:
    text = shown(print_summary, report(), 0.5)
    assert "Pruned to 50.00% in 1 event" in text
    assert "not measured" in text
    assert "val/perplexity" in text


def test_progress_shows_layer_and_loss(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    with event_progress(20, 2, enabled=True, console=terminal) as on_solved:
        on_solved("model.model.layers.11.self_attn.q_proj", 0.25)
    text = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "Pruning at step 20" in text
    assert "layers.11.self_attn.q_proj 0.2500" in text
    for enabled in (True, False):  # no terminal, and not wanted
        with event_progress(20, 2, enabled=enabled) as on_solved:
            on_solved("layers.0.up_proj", 0.25)
    assert capsys.readouterr().out == ""


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    plot_report(report(), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no event"):
        plot_report(PruningReport(), tmp_path / "empty.png")
