import torch

from thanos_lightning.report.data import MOST_LOSSES, History, LossRecorder


def test_losses_are_thinned_to_means() -> None:
    history = History()
    recorder = LossRecorder(history)
    number = 3 * MOST_LOSSES
    for step in range(1, number + 1):
        recorder.add(step, {"loss": torch.tensor(float(step))})
    recorder.settle()
    assert len(history.losses) <= MOST_LOSSES
    assert history.every == 4
    assert [step for step, _ in history.losses] == sorted(step for step, _ in history.losses)
    # of the steps since the one before: 1 to 4 have the mean 2.5
    assert history.losses[0] == (4, 2.5)
    assert all(step - value == 1.5 for step, value in history.losses)


def test_it_goes_on_from_a_history() -> None:
    history = History([(2, 1.0)], every=2)
    recorder = LossRecorder(history)
    for step in (3, 4):
        recorder.add(step, torch.tensor(float(step)))
    recorder.settle()
    assert history.losses == [(2, 1.0), (4, 3.5)]


def test_what_is_no_loss_counts_nothing() -> None:
    history = History()
    recorder = LossRecorder(history)
    for outputs in (None, {}, {"loss": None}, torch.ones(2)):
        recorder.add(1, outputs)
    recorder.settle()
    assert history.losses == []
