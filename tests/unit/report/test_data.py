import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from thanos_lightning.report.data import BlockReport, Clock, EventReport, History, LayerReport, PruningReport, Summary


def report() -> PruningReport:
    layers = [
        LayerReport("model.layers.0.up_proj", (8, 4), "2:4", 0.5, 2.0, 0.04, 0.5),
        LayerReport("model.layers.1.up_proj", (8, 4), "2:4", 0.5, 3.0, 0.08, 0.25),
        LayerReport("model.layers.1.down_proj", (4, 16), "2:4", 0.25, math.nan, 0.03, 0.25),
    ]
    blocks = [BlockReport("model.layers.1", 0.05, 0.03, 1.5), BlockReport("model.layers.2", math.nan, math.nan, 1.0)]
    history = History([(1, 3.0), (2, math.nan)], [(0, 10.0), (20, 20.0)])
    event = EventReport(20, 0.5, layers, 4.0, 3.0, 1.0, 1.0, 1.0, blocks)
    return PruningReport([event], Summary("val/perplexity", 10.0, 20.0, None), history)


def test_an_event_weighs_layers_by_size() -> None:
    event = report().events[0]
    assert event.sparsity == pytest.approx((0.5 * 64 + 0.25 * 64) / 128)
    assert event.seconds == 10.0
    assert event.relative_loss == pytest.approx(0.05)


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "pruning_report.json"
    report().write(path)
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["events"][0]["layers"][2]["loss"] is None
    assert read["history"]["losses"] == [[1, 3.0], [2, None]]
    assert read["summary"] == asdict(report().summary)
    assert [entry.name for entry in path.parent.iterdir()] == ["pruning_report.json"]
    again = PruningReport.read(path)
    assert math.isnan(again.events[0].layers[2].loss)
    assert math.isnan(again.history.losses[1][1])
    assert math.isnan(again.events[0].blocks[1].error)
    assert again.state() == report().state()


def test_an_event_costs_the_same_after_many_others(tmp_path: Path) -> None:
    growing, path = PruningReport(), tmp_path / "pruning_report.json"
    before: list[str] = []
    for step in range(1, 21):
        growing.events.append(EventReport(step, 0.5))
        growing.events[-1].layers.extend(report().events[0].layers)
        growing.write(path)
        growing.events[-1].add({"solving": 1.0})  # the last event may change until the next one
        events = growing.state()["events"]
        assert sum(all(event is not other for other in before) for event in events) <= 2
        before = events
    growing.write(path)
    assert [event.solving_seconds for event in PruningReport.read(path).events] == [1.0] * 20
    whole = {"events": [json.loads(event) for event in growing.state()["events"]]}
    assert path.read_text() == json.dumps(growing.state() | whole, indent=1) + "\n"


def test_the_parts_of_an_event_add_up() -> None:
    summary = Summary()
    clock = Clock(summary)
    clock.add("calibrating", 5.0)  # before the event
    with clock.event():
        clock.now("scanning")
    with clock.event():
        clock.now("solving")
        clock.now("reconstructing")
        clock.now("writing")
    event = EventReport(20, 0.5)
    event.add(clock.take())
    assert set(event.parts) == {"calibrating", "scanning", "solving", "reconstructing", "writing"}
    assert event.seconds == pytest.approx(5.0 + summary.event_seconds)
    assert all(event.parts.values())
    assert not clock.take()
