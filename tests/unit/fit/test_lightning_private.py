"""What the installed version of Lightning must have: a name that moved is a failure here, which says which."""

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from toy import at, trainer

from thanos_lightning.fit.lightning_private import (
    end_on_sigterm,
    has_sigterm,
    logged_step,
    saves_shards,
    training_metrics,
    validate,
)


def test_in_a_training(tmp_path):
    asked = []

    class Logging(BoringModel):
        def training_step(self, batch, batch_idx):
            self.log("mine", 1.0)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                asked.append((logged_step(self.trainer), set(training_metrics(self.trainer))))
                validate(self.trainer)
                asked.append(self.trainer.training)

    validated = at("on_validation_end", lambda *_: asked.append("validated"))
    fitted = trainer(tmp_path, validated, max_steps=3, num_sanity_val_steps=0, limit_val_batches=1)
    assert not training_metrics(fitted)
    fitted.fit(Logging())
    # this batch is counted when its hooks have run
    assert asked[:3] == [(1, {"mine"}), "validated", True]
    assert fitted.global_step == 3


def test_sigterm(tmp_path):
    made = trainer(tmp_path)
    assert callable(made._signal_connector._sigterm_notifier_fn)  # note_sigterm replaces these two
    assert callable(made.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    assert not has_sigterm(made)
    end_on_sigterm(made)
    assert has_sigterm(made)
    assert made.received_sigterm


@pytest.mark.parametrize("saves", [True, False])
def test_shards(saves):
    assert saves_shards(ModelParallelStrategy(save_distributed_checkpoint=saves)) is saves
    assert not saves_shards(SingleDeviceStrategy(torch.device("cpu")))
