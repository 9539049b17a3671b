import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from toy import Alike, OfTwo, Sequences, ToyLM, batch, counted, started, tiny_llama, trainer

from thanos_lightning import CalibrationOptions, ThanosPruningCallback
from thanos_lightning.collect.calibration_set import count_dataloader
from thanos_lightning.collect.inputs import InputStatistics
from thanos_lightning.collect.statistics import Statistics
from thanos_lightning.collect.tokens import token_mask
from thanos_lightning.layers.targets import find_targets
from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import Failures, PruningError

pytestmark = pytest.mark.usefixtures("compiling")


def test_the_sum_is_that_of_the_inputs() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(2, 5, 8)
    accumulators = counted(model, inputs, 2 * inputs)
    hidden = [torch.tanh(model[0](scale * inputs)).reshape(-1, 4) for scale in (1, 2)]
    assert accumulators["2"].num_tokens == 20
    torch.testing.assert_close(accumulators["2"].sum, sum(h.T @ h for h in hidden))
    torch.testing.assert_close(accumulators["0"].sum, 5 * inputs.reshape(-1, 8).T @ inputs.reshape(-1, 8))


def test_under_autocast_the_inputs_are_those_that_the_layer_multiplies() -> None:
    model, inputs = nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = counted(model, inputs)["0"].sum
    rounded = inputs.bfloat16().double().reshape(-1, 8)
    exact = inputs.double().reshape(-1, 8)
    torch.testing.assert_close(found.double(), rounded.T @ rounded, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found.double(), exact.T @ exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("paddings", [(0, 0, 0), (3, 3, 3), (0, 3, 0), (3, 0, 3)])
def test_layers_with_one_input_share_one_accumulator(paddings: tuple[int, ...]) -> None:
    model = tiny_llama()
    statistics = started(model)
    for padding in paddings:
        inputs = batch(padding)
        with statistics.counting(token_mask(inputs)):
            model(**inputs)
    found = statistics.accumulators
    layer = "model.layers.1."
    q, k, v = (found[f"{layer}self_attn.{name}_proj"] for name in "qkv")
    gate, up = found[f"{layer}mlp.gate_proj"], found[f"{layer}mlp.up_proj"]
    assert q is k is v
    assert gate is up
    assert len({id(accumulator) for accumulator in found.values()}) == 8
    assert {accumulator.num_tokens for accumulator in found.values()} == {72 - 3 * sum(paddings)}


def test_views_of_one_input_share_one_accumulator() -> None:
    """DeepSpeed's ZeRO-3 gives each module a detached view of its input."""
    model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)])
    statistics = started(model)
    inputs = torch.randn(5, 8)
    with statistics.counting():
        for layer in model[:2]:
            layer(inputs.detach())
        model[2](inputs[:4])  # begins at the same place
    found = statistics.accumulators
    assert found["0"] is found["1"]
    assert found["2"] is not found["0"]
    assert found["2"].num_tokens == 4


def test_memory_that_is_used_again_is_another_input() -> None:
    model = nn.ModuleList([nn.Linear(8, 4) for _ in range(50)])
    statistics = started(model)
    memory = bytearray(4 * 5 * 8)
    addresses = set()
    with statistics.counting():
        for layer in model:
            inputs = torch.frombuffer(memory, dtype=torch.float32).view(5, 8).normal_()
            addresses.add(inputs.data_ptr())
            layer(inputs)
            del inputs
    assert len(addresses) == 1
    assert len({id(accumulator) for accumulator in statistics.accumulators.values()}) == 50


def test_an_error_is_kept_for_all_ranks() -> None:
    layers = find_targets(nn.ModuleList([nn.Linear(8, 4)]))
    statistics = InputStatistics(layers, Failures(OfTwo()))
    statistics.start()
    for mask in (torch.tensor([[True, False]]), None):  # nothing is counted after the error
        with statistics.counting(mask):
            layers["0"].modules[0](torch.randn(7, 8))
    assert not statistics.accumulators or not statistics.accumulators["0"].num_tokens
    with pytest.raises(PruningError, match=r"rank 0: the inputs of layer 0 have shape \(7, 8\)"):
        statistics.failures.raise_together()


def count(statistics: InputStatistics, *numbers: int) -> None:
    """Count a batch in which each layer gets so many tokens, and layers of one number the same."""
    given = {number: torch.ones(number, 4) for number in numbers}
    with statistics.counting():
        for layer, number in zip(statistics.layers.values(), numbers, strict=True):
            if number:
                layer.modules[0](given[number])


@pytest.mark.parametrize("second", [(4, 8), (4, 0), (0, 8)])
def test_sharing_is_left_when_the_inputs_part(second: tuple[int, int]) -> None:
    statistics = started(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)))
    count(statistics, 2, 2)
    leaves = 1 if second[0] else 0
    with pytest.warns(UserWarning, match=f"layer {leaves} no longer gets the inputs of"):
        count(statistics, *second)
    count(statistics, 16, 16)
    stays, left = (statistics.accumulators[f"{name}"] for name in (1 - leaves, leaves))
    assert int(stays.sum[0, 1]) == stays.num_tokens == 2 + second[1 - leaves] + 16
    assert int(left.sum[0, 1]) == left.num_tokens == 2 + sum(second) + 16  # one batch too many, as the warning says


def test_a_tensor_changed_in_place_is_another_input() -> None:
    a, b = model = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    statistics = started(model)
    inputs = torch.ones(1, 4)
    with statistics.counting(), torch.no_grad():
        a(inputs)
        b(inputs.mul_(2))
    assert statistics.accumulators["1"].sum[0, 0] == 4 * statistics.accumulators["0"].sum[0, 0]


@pytest.mark.parametrize(
    "shaped", [lambda inputs: inputs, lambda inputs: inputs.reshape(6, 4), lambda inputs: inputs.transpose(0, 1)]
)
def test_inputs_of_each_layout_find_their_tokens(shaped: Callable[[Tensor], Tensor]) -> None:
    model, inputs = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    found = counted(model, shaped(inputs), mask=mask)["0"]
    assert found.num_tokens == 5
    torch.testing.assert_close(found.sum, inputs[mask].T @ inputs[mask])


def test_pooled_inputs_count() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    mask = torch.tensor([[True, False], [True, True]])
    assert counted(model, torch.randn(2, 4), mask=mask)["0"].num_tokens == 2


MASK = {"attention_mask": torch.tensor([[1, 0]])}


def test_a_mask_is_found_wherever_the_batch_has_it() -> None:
    for nested in ({"lm": MASK}, [MASK], ({"a": 1}, (MASK,))):
        assert token_mask(nested).tolist() == [[True, False]]
    assert token_mask((torch.ones(2), None)) is token_mask({"input_ids": torch.ones(2)}) is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"attention_mask": torch.ones(2)}, r"must be \(batch, length\)"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, "'attention_mask' has shape"),
        ({"attention_mask": torch.tensor([[0.0, -1e9]])}, "1 for a token and 0 for padding"),
        ([MASK, MASK], "2 masks named"),
    ],
)
def test_what_is_no_mask_of_tokens_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputStatistics({}).begin(lambda: token_mask(batch))


def test_inputs_by_keyword_and_in_inference_mode_count_and_are_never_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    statistics = started(model)
    with torch.inference_mode(), statistics.counting():
        model(torch.ones(2, 4))
        model[0](input=torch.ones(2, 4))
    assert statistics.accumulators["0"].num_tokens == 4


def test_activations_are_not_kept_alive() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    statistics = started(model)
    inputs = torch.randn(2, 4)
    reference = weakref.ref(inputs)
    with statistics.counting(), torch.no_grad():
        model(inputs)
    del inputs
    gc.collect()
    assert reference() is None


def test_a_weight_used_by_two_layers_sees_the_inputs_of_both() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    inputs = torch.randn(3, 4)
    found, hidden = counted(model, inputs)["0"], torch.tanh(model[0](inputs))
    torch.testing.assert_close(found.sum, inputs.T @ inputs + hidden.T @ hidden)
    assert found.num_tokens == 6


def test_state_goes_on_where_it_was() -> None:
    model = tiny_llama()
    whole, second = started(model), started(model)
    with whole.counting():
        model(**batch())
    state = whole.state()
    with whole.counting():
        model(**batch(number=5))
    second.load_states([state])  # which is a snapshot
    with second.counting():
        model(**batch(number=5))
    for name, accumulator in whole.accumulators.items():
        assert torch.equal(second.accumulators[name].sum, accumulator.sum)
        assert second.accumulators[name].num_tokens == accumulator.num_tokens
    assert len({id(a) for a in second.accumulators.values()}) == len({id(a) for a in whole.accumulators.values()})


def calibrated(
    module: LightningModule, batches: Any, folder: Path, *, access: Any = None, backward: Any = None
) -> InputStatistics:
    access = access or ParameterAccess()
    statistics, fitted = Statistics(find_targets(module), access), trainer(folder, max_steps=1)
    if backward is not None:
        nothing: Any = SimpleNamespace(start=lambda of_training: None, stop=lambda: None, backward=backward)
        statistics.gradients = nothing
    count_dataloader(statistics, batches, fitted, module, access, counted=token_mask, loss_in=lambda output: output)
    return statistics.inputs


@pytest.mark.parametrize(("world_size", "sequences"), [(1, [28]), (2, [16, 12])])
def test_a_dataloader_is_split_over_ranks_and_has_gradients_of_one_batch_in_four(
    tmp_path: Path, world_size: int, sequences: list[int]
) -> None:
    module, counted, tokens = ToyLM().train(), [], []
    module.model.model.layers[0].eval()
    batches = [batch(number=number) for number in range(1, 8)]  # told apart by their numbers of sequences

    def backward(output: Any, *, counts: bool) -> None:
        assert output.logits.requires_grad
        if counts:
            counted.append(len(output.logits) - 1)

    for rank in range(world_size):
        access = Alike(rank, world_size=world_size)
        statistics = calibrated(module, batches, tmp_path, access=access, backward=backward)
        tokens.append({a.num_tokens for a in statistics.accumulators.values()})
    assert tokens == [{8 * number} for number in sequences]
    assert sorted(counted) == [0, 4]
    assert all(not part._forward_pre_hooks for part in module.modules())
    assert [layer.training for layer in module.model.model.layers] == [False, True]


class Classifier(LightningModule):
    """A user's own, on pairs; torch's own encoder, of which evaluation mode calls no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, 4)
        self.modes: list[bool] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.encoder(inputs).mean(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        self.modes.append(self.training)
        loss = nn.functional.cross_entropy(self(inputs), labels)
        self.log("train/loss", loss)
        self.log_dict({"train/twice": 2 * loss})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pairs(number: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(4, 5, 8), torch.randint(4, (4,))) for _ in range(number)]


def test_batches_that_are_no_mappings_go_through_the_training_step(tmp_path: Path) -> None:
    module, batches = Classifier(), pairs()
    callback = ThanosPruningCallback("2:4", calibration=CalibrationOptions(batches=batches))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no gradient has reached")
        warnings.filterwarnings("error", message=".*every token counts")
        trainer(tmp_path, callback, max_steps=2).fit(module, DataLoader(batches, batch_size=None))
    assert module.modes == [False] * 6 + [True] * 2
    assert not {"forward", "log", "log_dict"} & module.__dict__.keys()
    assert torch.backends.mha.get_fastpath_enabled()
    (event,) = callback.report.events
    assert [layer.name for layer in event.layers] == ["encoder.layers.0.linear1", "encoder.layers.0.linear2", "head"]


def test_a_calibration_set_logs_nothing(tmp_path: Path) -> None:
    module, losses = Classifier(), []
    logged: list[Any] = []
    module.log = lambda *one, **_: logged.append(one)
    statistics = calibrated(module, pairs(), tmp_path, backward=lambda output, **_: losses.append(output))
    assert logged == []
    assert [loss.requires_grad for loss in losses] == [True, True]
    assert statistics.accumulators["encoder.layers.0.linear1"].num_tokens == 6 * 4 * 5
    module.log("train/loss", losses[0])  # what it had is back
    assert len(logged) == 1


def test_a_calibration_batch_that_fails_names_the_mend(tmp_path: Path) -> None:
    module, batches = Classifier(), [(*pair, 0) for pair in pairs(1)]
    words = r"is a tuple, on which training_step\(batch, 0\) of Classifier fails \(ValueError: too many"
    with pytest.raises(MisconfigurationException, match=f"{words}.*: add a method calibration_step"):
        calibrated(module, batches, tmp_path)
    module.calibration_step = lambda batch: module(batch[0])  # type: ignore[assignment]
    assert calibrated(module, batches, tmp_path).accumulators["encoder.layers.0.linear1"].num_tokens == 4 * 5


def test_a_module_can_be_copied_while_its_inputs_are_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    statistics = started(model)
    inputs = torch.randn(3, 4)
    with statistics.counting():
        model(inputs)
        for _ in range(20):
            copy.deepcopy(model)(inputs)
        gc.collect()
    assert statistics.accumulators["0"].num_tokens == 3


class Saving(ToyLM):
    """Notes the bytes that each forward keeps for its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[int] = []

    def forward(self, **batch: Tensor) -> Any:
        self.saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            return super().forward(**batch)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.saved[-1] += tensor.nbytes
        return tensor


def test_a_calibration_keeps_no_more_activations_than_a_training_step(tmp_path: Path) -> None:
    saved, reports = [], []
    for checkpoints in (True, False):
        module = Saving()
        if checkpoints:
            module.model.gradient_checkpointing_enable()
        callback = ThanosPruningCallback("unstructured", 0.5, calibration=CalibrationOptions([batch(), batch()]))
        before = [(part.training, getattr(part, "_gradient_checkpointing_func", None)) for part in module.modules()]
        trainer(tmp_path, callback, max_steps=1).fit(module, DataLoader(Sequences(8), batch_size=3))
        after = [(part.training, getattr(part, "_gradient_checkpointing_func", None)) for part in module.modules()]
        assert after == before
        saved.append((max(module.saved[:-1]), module.saved[-1]))
        reports.append(callback.report.events[0].layers)
    (calibrated, trained), (whole, _) = saved
    assert 0 < calibrated <= 1.01 * trained
    assert whole > 1.5 * calibrated
    for one, same in zip(*reports, strict=True):
        assert one.sparsity == same.sparsity
        assert one.relative_loss == pytest.approx(same.relative_loss, rel=1e-4)
