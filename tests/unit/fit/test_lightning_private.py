"""What the installed version of Lightning must have: a name that moved is a failure here, which says which."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from toy import trainer

from thanos_lightning.fit.lightning_private import (
    after_configure_model,
    end_on_sigterm,
    has_sigterm,
    logged_step,
    saves_shards,
    training_metrics,
    validate,
)


class Logging(BoringModel):
    """Logs a metric of the training, counts validations, and asks in the last batch."""

    def __init__(self):
        super().__init__()
        self.validations = 0
        self.asked = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("mine", loss)
        return loss

    def on_validation_end(self):
        self.validations += 1

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 1:
            before = self.validations
            self.asked.append((logged_step(self.trainer), set(training_metrics(self.trainer))))
            validate(self.trainer)
            assert self.validations == before + 1
            assert self.trainer.training


def test_in_a_training(tmp_path):
    module = Logging()
    fitted = trainer(tmp_path, max_steps=3, num_sanity_val_steps=0, limit_val_batches=1)
    fitted.fit(module)
    assert module.asked == [(1, {"mine"})]  # this batch is counted when its hooks have run
    assert fitted.global_step == 3


def test_sigterm():
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert callable(trainer._signal_connector._sigterm_notifier_fn)  # note_sigterm replaces these two
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    assert not has_sigterm(trainer)
    end_on_sigterm(trainer)
    assert has_sigterm(trainer)
    assert trainer.received_sigterm


def test_no_metric_before_a_training():
    assert not training_metrics(Trainer(accelerator="cpu", logger=False, enable_checkpointing=False))


def test_what_comes_after_configure_model():
    order = []

    class Configured(BoringModel):
        def configure_model(self):
            order.append("configured")

    class Follows(Callback):
        def setup(self, trainer, pl_module, stage):
            after_configure_model(pl_module, lambda module: order.append(type(module).__name__))

    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    for module in (Configured(), BoringModel()):
        trainer = Trainer(fast_dev_run=1, callbacks=[Follows()], **settings)
        trainer.fit(module)
        trainer.validate(module)
        assert "configure_model" not in vars(module)
    assert order == ["configured", "Configured"] * 2


@pytest.mark.parametrize("saves", [True, False])
def test_shards(saves):
    assert saves_shards(ModelParallelStrategy(save_distributed_checkpoint=saves)) is saves
    assert not saves_shards(SingleDeviceStrategy(torch.device("cpu")))
