"""The callback on what `torch.compile` compiled, in every form, with a backend that runs the graph as it was traced."""

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from require import only
from torch import Tensor
from torch._dynamo.utils import counters
from toy import ToyLM, at, grouped, loader, trainer

from thanos_lightning import SparsitySchedule, ThanosPruningCallback, export_checkpoint, verify_checkpoint
from thanos_lightning.solver import NM

BATCHES = list(loader(16))


def compiled(target: Any) -> Any:
    return torch.compile(target, backend="eager")


class Quiet(ToyLM):
    """Records nothing: the growing list would be traced anew at each step."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch).loss
        return loss


class InConfigureModel(Quiet):
    def configure_model(self) -> None:
        self.model = compiled(self.model)


def changed(change: Callable[[Any], Any]) -> Quiet:
    module = Quiet()
    change(module)
    return module


def wrap_blocks(module: Any) -> None:
    module.model.model.layers = torch.nn.ModuleList(map(compiled, module.model.model.layers))


FORMS: dict[str, Callable[[], Any]] = {
    "the LightningModule": lambda: compiled(Quiet()),
    "in configure_model": InConfigureModel,
    "in __init__": lambda: changed(lambda module: setattr(module, "model", compiled(module.model))),
    "blocks in place": lambda: changed(
        lambda module: [block.compile(backend="eager") for block in module.model.model.layers]
    ),
    "wrapped blocks": lambda: changed(wrap_blocks),
    "a function": lambda: changed(lambda module: setattr(module.model, "forward", compiled(module.model.forward))),
}
WAYS: dict[str, dict[str, Any]] = {
    "from training batches": {"schedule": SparsitySchedule(at=[4, 8]), "steps": 2},
    "a calibration set": {"schedule": SparsitySchedule(at=[0, 6]), "batches": BATCHES},
}
PROMPTLY = [("the LightningModule", "from training batches"), ("blocks in place", "a calibration set")]


def pruning(way: str = "from training batches") -> ThanosPruningCallback:
    return ThanosPruningCallback("2:4", **grouped(**WAYS[way]))


class Graphs(Callback):
    """How much was traced until the end of each batch."""

    def __init__(self) -> None:
        self.traced: list[tuple[int, int]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.traced.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(module: Any, root: Path, *callbacks: Callback, **options: Any) -> LightningModule:
    torch.manual_seed(1)
    fit = trainer(root, *callbacks, max_steps=12, **options)
    fit.fit(module, loader(64))
    fit.save_checkpoint(root / "end.ckpt")
    trained: LightningModule = fit.lightning_module
    return trained


def check_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    # A graph may round a sum otherwise, and Adam makes that larger: up to 5e-5 on one CPU; a step is 3e-3
    torch.testing.assert_close(one, other, atol=2e-4, rtol=0)
    for name, value in one.items():
        assert torch.equal(value == 0, other[name] == 0), name


def zeros_of(module: LightningModule) -> int:
    return sum(int((value == 0).sum()) for value in module.state_dict().values())


@pytest.mark.parametrize("case", only(PROMPTLY, itertools.product(FORMS, WAYS)), ids=str)
def test_every_form_is_pruned_as_if_it_were_not_compiled(case: tuple[str, str], tmp_path: Path) -> None:
    form, way = case
    plain = train(Quiet(), tmp_path / "plain", pruning(way)).state_dict()
    graphs = Graphs()
    pruned = train(FORMS[form](), tmp_path / "compiled", pruning(way), graphs).state_dict()
    assert graphs.traced[-1][0] > 0, "nothing was compiled"
    check_alike(pruned, plain)
    export_checkpoint(tmp_path / "compiled/end.ckpt", tmp_path / "exported")
    for path in (tmp_path / "exported", tmp_path / "compiled/end.ckpt"):
        assert [report.ok for report in verify_checkpoint(path, NM(2, 4))] == [True] * 14


@pytest.mark.parametrize("form", FORMS)
def test_between_windows_the_graphs_are_those_of_a_training_without_the_callback(form: str, tmp_path: Path) -> None:
    without = Graphs()
    train(FORMS[form](), tmp_path / "without", without)
    torch._dynamo.reset()
    counters.clear()
    beside = Graphs()
    module = train(FORMS[form](), tmp_path / "with", pruning(), beside)
    assert "configure_model" not in vars(module), "the module's own is hidden"
    # windows are steps 3 and 4, 7 and 8: nothing is traced in them, nor anew after them
    assert beside.traced == without.traced
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("form", ["the LightningModule", "blocks in place", "a function"])
def test_no_graph_runs_in_a_window_even_where_a_step_asks_for_it(form: str, tmp_path: Path) -> None:
    asking = at("on_train_batch_start", lambda *_: torch.compiler.set_stance("default"))
    try:
        module = train(FORMS[form](), tmp_path, pruning(), asking)
    finally:
        torch.compiler.set_stance("default")
    check_alike(module.state_dict(), train(Quiet(), tmp_path / "plain", pruning()).state_dict())


def test_a_compiled_module_can_be_copied_in_a_window(tmp_path: Path) -> None:
    module, copies = FORMS["blocks in place"](), []
    train(module, tmp_path, pruning(), at("on_train_batch_end", lambda *_: copies.append(copy.deepcopy(module.model))))
    inputs = torch.arange(16).view(1, 16)
    assert len(copies) == 12
    for one in copies:
        assert one(inputs).logits.isfinite().all()
    assert module.model.model.layers[0]._compiled_call_impl is not None


def test_a_compiled_module_that_is_never_called_is_pruned_by_magnitude(tmp_path: Path) -> None:
    module = Quiet()
    module.spare = torch.nn.Linear(16, 16)
    module.spare.compile(backend="eager")
    with pytest.warns(UserWarning, match="that no token has reached"):
        train(module, tmp_path, pruning())
    assert zeros_of(module) == (15_360 + 16 * 16) / 2


def test_a_training_that_was_compiled_otherwise_resumes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = trainer(tmp_path, pruning(), max_steps=7)  # in the midst of a window
    first.fit(InConfigureModel(), loader(64))
    first.save_checkpoint(tmp_path / "midst.ckpt")
    resumed = []
    for module in (InConfigureModel(), FORMS["blocks in place"](), Quiet()):
        torch.manual_seed(2)
        fit = trainer(tmp_path, pruning(), max_steps=12)
        fit.fit(module, loader(64), ckpt_path=tmp_path / "midst.ckpt")
        resumed.append(module.state_dict())
    assert zeros_of(module) == 15_360 / 2
    for other in resumed[:-1]:
        torch.testing.assert_close(other, resumed[-1])


def test_a_dense_checkpoint_with_the_names_of_wrappers_is_resumed_without_them(tmp_path: Path) -> None:
    dense = train(FORMS["in __init__"](), tmp_path)
    assert "model._orig_mod.lm_head.weight" in dense.state_dict()
    module = FORMS["in __init__"]()
    callback = ThanosPruningCallback("2:4", **grouped(steps=2, schedule=SparsitySchedule(at=[14])))
    trainer(tmp_path, callback, max_steps=16).fit(module, loader(64), ckpt_path=tmp_path / "end.ckpt")
    assert zeros_of(module) == 15_360 / 2
    assert not [name for name in module.state_dict() if "_orig_mod" in name]
