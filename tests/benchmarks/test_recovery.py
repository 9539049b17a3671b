"""What the table of benchmarks/recovery.py rests on: its baselines, its arithmetic, the runs that are kept."""

import json
import math
from pathlib import Path

import pytest
import recovery
import tables
import torch
from lightning.pytorch import LightningModule
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from toy import trainer

RESULTS = Path(recovery.__file__).parent / "results"
PYDOCS = {"model": "smollm2-135m", "text": "pydocs", "validation_split": "validation"}


def row(contender: str, *perplexities: float) -> recovery.Row:
    shared = {"contender": contender, "rate": 3e-4, "sparsity": 0.5, "seconds": 100.0, "event_seconds": 10.0}
    runs = [
        {**shared, "seed": seed, "perplexity": value, "curve": [{"tokens": 8, "perplexity": value, "sparsity": 0.5}]}
        for seed, value in enumerate(perplexities, 1)
    ]
    return recovery.Row(contender, {3e-4: perplexities[0]}, runs)


def test_sr_ste_keeps_the_two_largest_of_four_and_teaches_all() -> None:
    layer = nn.Linear(64, 32, bias=False)
    dense = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", recovery.SrSte(decay=0.01))
    largest = dense.abs().view(-1, 4).topk(2).indices
    kept = torch.zeros(dense.numel() // 4, 4).scatter_(1, largest, 1).view_as(dense).bool()
    weight = layer.weight
    assert torch.equal(weight, dense * kept)
    upstream = torch.randn_like(dense)
    (weight * upstream).sum().backward()
    expected = upstream + 0.01 * dense * ~kept  # arXiv 2102.04010
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, expected)


class _Regression(LightningModule):
    """A layer that is a target, and an lm_head that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lm_head = nn.Linear(16, 16), nn.Linear(16, 16)
        self.sparsities: list[float] = []

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.lm_head(self.layer(batch)).pow(2).mean()

    def on_train_epoch_start(self) -> None:
        self.sparsities.append(float((self.layer.weight == 0).float().mean()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_lightnings_schedule_is_cubic_and_spares_the_head(tmp_path: Path) -> None:
    module = _Regression()
    pruning = recovery.lightning_pruning(module, 0.6, epochs=4)
    trainer(tmp_path, pruning, max_epochs=6).fit(module, DataLoader(torch.randn(8, 16), batch_size=4))
    cubic = [0.6 * (1 - (1 - min(1.0, epoch / 4)) ** 3) for epoch in range(6)]
    assert module.sparsities == pytest.approx(cubic, abs=4 / 256)  # in whole weights, rounded at each of four times
    assert int((module.lm_head.weight == 0).sum()) == 0


def test_batches_go_on_where_an_epoch_ended() -> None:
    batches = recovery.Continued(range(7), per_epoch=3)
    assert len(batches) == 3
    assert [list(batches) for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_gaps_are_over_the_seeds_that_all_have(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("dense", 10.0, 11.0), row("one-shot sparsegpt", 20.0), row("gradual", 15.0, 12.0)]
    task = recovery.Task(**PYDOCS, steps=1, batch=2, length=4, calibration=8, validation=8)
    lines = {line["contender"]: line for line in recovery.report("2:4", rows, task, Console(width=160))}
    assert lines["one-shot sparsegpt"]["gap_over_sparsegpt"] == 1
    assert lines["gradual"]["gap"] == pytest.approx((math.log(15 / 10) + math.log(12 / 11)) / 2, abs=1e-4)
    assert lines["gradual"]["gap_over_sparsegpt"] == pytest.approx(math.log(15 / 10) / math.log(20 / 10), abs=1e-4)
    assert lines["gradual"]["perplexity"] == pytest.approx(math.sqrt(15 * 12), abs=1e-4)
    assert "10.0 (10.0%)" in capsys.readouterr().out  # the share of the events


def test_the_time_of_an_event_is_counted_where_it_was() -> None:
    task = recovery.Task(**PYDOCS, steps=10, batch=2, length=4, calibration=8, validation=8)
    curve = [{"tokens": 8 * step, "perplexity": 20.0 - step} for step in (0, 5, 10)]
    run = {"seconds": 50.0, "event_seconds": 30.0, "settings": {"schedule": [0.2, 0.7]}, "curve": curve}  # 2 s a step
    assert recovery.timed([run], task) == [(0.0, 20.0), (5 + 7.5, 15.0), (10 + 15.0, 10.0)]
    at_once = {**run, "settings": {"schedule": [0]}}
    assert recovery.timed([at_once], task) == [(15.0, 20.0), (5 + 15.0, 15.0), (10 + 15.0, 10.0)]
    without_times = {**at_once, "seconds": None, "event_seconds": None, "curve": curve[1:]}
    assert recovery.timed([without_times, at_once], task) == [(5 + 15.0, 15.0), (10 + 15.0, 10.0)]


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("recovery*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_kept_run_is_what_its_name_says(path: Path) -> None:
    kept = json.loads(path.read_text())
    contender = kept["contender"]
    assert path.stem == recovery.key(contender, kept["pattern"], kept["rate"], kept["seed"])
    assert contender in {*recovery.ALL, recovery.DENSE, recovery.LIGHTNING, recovery.SR_STE}
    assert kept["settings"] == recovery.settings(contender)
    assert kept["task"]["text"] == ("summaries" if path.parent.name == "recovery-gemma" else "pydocs")
    end = kept["curve"][-1]
    assert end["tokens"] == kept["task"]["steps"] * kept["task"]["batch"] * kept["task"]["length"]
    assert end["perplexity"] == kept["perplexity"]
    sparsity = {"dense": 0.0}.get(contender, recovery.PATTERNS[kept["pattern"]].sparsity)
    dense_rows = 0.0 if kept["settings"] is None else kept["settings"]["options"].get("outlier_fraction", 0.0)
    # of which there are whole ones
    assert end["sparsity"] == pytest.approx(sparsity * (1 - dense_rows), abs=1e-3 if dense_rows else 1e-4)
    assert kept["hardware"]


@pytest.mark.parametrize("pattern", ["2:4", "60%"])
def test_the_table_has_several_rates_and_two_orders_of_each(pattern: str) -> None:
    kept = [json.loads(path.read_text()) for path in (RESULTS / "recovery").glob("*.json")]
    assert set(recovery.IN_TABLE[pattern]) <= set(recovery.contenders(pattern))
    for contender in recovery.IN_TABLE[pattern]:
        runs = [run for run in kept if run["contender"] == contender]
        if contender != recovery.DENSE:
            runs = [run for run in runs if run["pattern"] == pattern]
        rates = {run["rate"]: run["perplexity"] for run in runs if run["seed"] == 1}
        assert len(rates) >= (2 if contender == "defaults" else 3), contender  # as README says
        best = min(rates, key=lambda rate: rates[rate])
        assert 2 in {run["seed"] for run in runs if run["rate"] == best}, contender


def test_the_results_are_those_of_the_kept_runs() -> None:
    for name, text in tables.pages().items():
        assert (tables.PAGES / name).read_text() == text, f"{name}: run python benchmarks/tables.py"
