from __future__ import annotations

from pathlib import Path

import checkpoint_cases
import pytest
from checkpoint_cases import CHANGED_MASKS, change_checkpoint, untied_llama
from lightning.fabric.utilities.exceptions import MisconfigurationException
from toy import ToyLM, grouped, loader, trainer

from thanos_lightning import SparsitySchedule, ThanosPruningCallback

trained = checkpoint_cases.trained  # a fixture


def resume(folder: Path, checkpoint: Path) -> int:
    """The steps after which a training ends that goes on from a checkpoint, all events of which are over."""
    solver = grouped(pattern="2:4", method="magnitude", admm_steps=0, refine_steps=0)
    pruning = ThanosPruningCallback(**solver, schedule=SparsitySchedule(1, 1, 1))
    fitting = trainer(folder, pruning, max_steps=4)
    fitting.fit(ToyLM(untied_llama()), loader(8), ckpt_path=checkpoint)
    return fitting.global_step


@pytest.mark.parametrize("what", CHANGED_MASKS)
def test_a_resume_refuses_masks_and_moments_that_were_changed(
    trained: dict[str, tuple[ToyLM, Path]], tmp_path: Path, what: str
) -> None:
    change, message = CHANGED_MASKS[what]
    checkpoint = change_checkpoint(trained["llama"][1], tmp_path / "a.ckpt", change)
    with pytest.raises((ValueError, MisconfigurationException), match=message):
        resume(tmp_path, checkpoint)
