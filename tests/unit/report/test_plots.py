import math
from pathlib import Path

import pytest

from thanos_lightning.report.data import EventReport, History, LayerReport, PruningReport, Summary
from thanos_lightning.report.plots import plot_report


def decoder(sparsity: float, loss: float) -> list[LayerReport]:
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    return [
        LayerReport(f"model.layers.{depth}.{kind}", (8, 4), "unstructured", sparsity, 1.0, loss * (depth + 1), 0.1)
        for depth in range(3)
        for kind in kinds
    ]


PLAIN = [LayerReport(f"model.{number}", (8, 4), "2:4", 0.5, 1.0, 0.1 + number, 0.1) for number in (0, 2)]
MANY = [LayerReport(f"blocks.{n}.kind{n}.fc", (8, 4), "2:4", 0.5, math.nan, math.nan, 0.1) for n in range(30)]
HISTORY = History([(step, 1 / step) for step in range(1, 60)], [(0, 20.0), (0, 40.0), (10, math.nan), (59, 18.0)])


@pytest.mark.parametrize(
    "report",
    [
        PruningReport(
            [EventReport(step, step / 20, decoder(step / 20, 0.01)) for step in range(1, 11)],
            Summary("val/perplexity", 20.0, 40.0, None, target_weights=96, model_weights=200),
            History([], HISTORY.metrics),
        ),
        PruningReport([EventReport(5, 0.5, PLAIN)], Summary(), History(HISTORY.losses)),
        PruningReport([EventReport(5, 0.5, MANY)]),
    ],
    ids=["several events", "a plain stack, no metric", "many kinds, no loss"],
)
def test_a_run_is_drawn(report: PruningReport, tmp_path: Path) -> None:
    plot_report(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_words_of_a_picture(tmp_path: Path) -> None:
    # more weights are pruned than the layers have, as channels are, which other layers feed
    summary = Summary("val/perplexity", 20.0, 40.0, 18.0, target_weights=900, model_weights=1000, sparsity=0.3)
    report = PruningReport([EventReport(0, 0.5, decoder(0.5, 0.1))], summary, HISTORY)
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_report(report, tmp_path / "report.svg")
    text = (tmp_path / "report.svg").read_text()
    words = (
        "val/perplexity over steps",
        "training loss over steps",
        "what each layer lost",
        "q_proj",
        "50%",
        "30.0% zeros, 27.0% of the whole model",
    )
    assert not [word for word in words if word not in text]
    assert "sparsity by layer and kind" not in text  # all layers have one sparsity
