import io
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

import pytest
import rich
from lightning_utilities.core.rank_zero import rank_zero_only
from patience import until
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm

from thanos_lightning.report.progress import Phase, Terminated, ends_on_sigterm, hidden, open_phase, shown

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What a terminal of 80 columns is sent."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, _environ={})
    monkeypatch.setattr(rich, "_console", console)
    return console.file  # type: ignore[return-value]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("total", [None, 128])
def test_a_bar_is_one_line_that_fits(width: int, total: int | None) -> None:
    phase = Phase("Calibrating at optimizer step 0", total, "batches")
    phase.advance(37, note="model.model.layers.11.self_attn.q_proj 0.0123, and more that nobody has room for" * 2)
    console = Console(file=io.StringIO(), width=width)
    console.print(phase.bar.get_renderable())
    (line,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(line) <= width
    if width >= 80:
        assert ("37 of 128 batches after 0:00" if total else "37 batches after 0:00") in line
        assert re.search("step 0 [━╸]", line)


def test_a_bar_gets_shorter_before_a_value_is_cut() -> None:
    phase = Phase("Reconstructing at step 0", 30, "blocks")
    phase.advance(12, note="loss 0.0065 to 0.0046")
    console = Console(file=io.StringIO(), width=80)
    with patch.object(rich, "_console", console):
        console.print(phase.bar.get_renderable())
    (line,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "Reconstructing at step 0 ━" in line
    assert "loss 0.0065 to 0.0046" in line


def test_a_line_of_a_log_says_how_far_it_is() -> None:
    phase = Phase("Solving", 210, "layers")
    assert phase.line() == "Solving: 0 of 210 layers after 0:00:00"
    phase.advance(7, note="q_proj")
    assert phase.line() == "Solving: 7 of 210 layers after 0:00:00 (q_proj)"
    assert phase.line(ended=True) == "Solving: 7 layers in 0:00:00"
    assert Phase("Packing").line() == "Packing: … after 0:00:00"
    assert Phase("Packing").line(ended=True) == "Packing: done in 0:00:00"


def test_time_left_counts_what_was_done_since_the_phase_began() -> None:
    phase = Phase("Training", 1_000_008, "steps", completed=8)
    for _ in range(3):
        time.sleep(0.01)
        phase.advance()
    assert (phase.task.time_remaining or 0) >= 10_000
    assert re.fullmatch(r"Training: 11 of 1000008 steps, .*\d+:\d\d:\d\d left", phase.line())


def test_without_a_terminal_lines_say_how_far_all_phases_are(capsys: pytest.CaptureFixture[str]) -> None:
    with open_phase("Outside", 2, "things"), open_phase("Inside", 3, "things") as phase:
        phase.advance()
        said = until("Inside: 1 of 3 things", lambda: capsys.readouterr().err)
    lines = (said + capsys.readouterr().err).splitlines()
    both = [line for line in lines if "; Inside: " in line]
    assert both
    assert all(line.startswith("Outside: 0 of 2 things after ") for line in both)
    assert lines[-2].startswith("Inside: 1 things in ")
    assert lines[-1].startswith("Outside: done in ")


def test_what_is_hidden_or_of_another_rank_or_short_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with hidden(), hidden(False), open_phase("Hidden"):
        time.sleep(0.05)
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    with open_phase("Elsewhere"):
        time.sleep(0.05)
    monkeypatch.undo()  # and patient again
    with open_phase("Short"):
        pass
    assert capsys.readouterr() == ("", "")


def test_what_fails_is_not_said_to_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), open_phase("Work"):
        raise ValueError("broken")
    assert " in " not in capsys.readouterr().err


def test_in_a_terminal_a_bar_is_shown_and_taken_away(terminal: io.StringIO) -> None:
    with open_phase("Calibrating", 4, "batches") as phase:
        phase.advance()
        assert "Calibrating" in until("1 of 4 batches", terminal.getvalue)
    assert "\x1b[2K" in terminal.getvalue().rpartition("after 0:00")[2]  # the line is erased


def test_it_is_shown_under_a_live_display_that_is_there(terminal: io.StringIO) -> None:
    with Progress(console=rich.get_console(), auto_refresh=False) as training:
        training.add_task("Epoch 0", total=3)
        with open_phase("Solving", 4, "layers"), open_phase("Writing", 4, "layers"):
            until("Writing", terminal.getvalue)
        training.refresh()
    assert terminal.getvalue().count("Epoch 0") > 1


def test_bars_of_tqdm_are_cleared_and_drawn_again(terminal: io.StringIO) -> None:
    file = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        with tqdm(total=5, desc="Epoch 0", file=file, ascii=True) as bar:
            with open_phase("Solving", 4, "layers"):
                assert file.getvalue().rstrip("\r ").count("Epoch") == 1
                assert file.getvalue().endswith(" \r")  # the line is empty
            assert file.getvalue().count("Epoch 0") == 2
            bar.update()
    assert "Solving" in terminal.getvalue()


def test_bars_of_libraries_are_shown_as_the_phase(capsys: pytest.CaptureFixture[str]) -> None:
    with open_phase("Preparing the text", adopts_bars=True) as phase:
        for _ in tqdm(range(3), desc="Tokenising", unit=" examples", mininterval=0):
            text = until("Tokenising: ", lambda: capsys.readouterr().err)
        assert (phase.task.description, phase.task.completed, phase.task.total) == ("Tokenising", 3, 3)
        with tqdm(total=3_000_000, unit="B", desc="model.safetensors") as bar:
            bar.update(2_000_000)
            bar.refresh()
            assert phase.line().startswith("model.safetensors: 2 of 3 MB after ")
        with tqdm(total=0, desc="Generating train split", mininterval=0) as bar:  # datasets doesn't know the number
            bar.update(2)
            assert phase.line().startswith("Generating train split: 2 after ")
    text += capsys.readouterr().err
    assert text.splitlines()[-1].startswith("Preparing the text: done in")
    assert "\r" not in text
    assert "it/s" not in text
    with tqdm(total=2, desc="Its own again"):
        pass
    assert "Its own again" in capsys.readouterr().err


def test_it_is_shown_while_the_output_of_a_library_is_redirected(capsys: pytest.CaptureFixture[str]) -> None:
    told = io.StringIO()
    with open_phase("Converting"), redirect_stdout(told), redirect_stderr(told):
        until("Converting", lambda: capsys.readouterr().err)
    assert told.getvalue() == ""


def test_in_a_terminal_it_is_shown_while_output_is_redirected(monkeypatch: pytest.MonkeyPatch) -> None:
    told, terminal = io.StringIO(), io.StringIO()
    console = Console(force_terminal=True, width=80, _environ={})
    monkeypatch.setattr(rich, "_console", console)
    monkeypatch.setattr("sys.stdout", terminal)
    with open_phase("Converting"), redirect_stdout(told):
        until("Converting", terminal.getvalue)
    assert told.getvalue() == ""
    assert console.file is terminal
    monkeypatch.setattr("sys.stdout", told)
    assert console.file is told  # as before


def end_oneself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def test_sigterm_ends_a_phase_and_is_as_before_after_it() -> None:
    before = signal.getsignal(signal.SIGTERM)
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with pytest.raises(Terminated) as raised, open_phase("Outside"), open_phase("Inside"):
            end_oneself()
        assert raised.value.code == 143
        with shown(Phase("Training")):  # whose Trainer ends it at a batch's end
            end_oneself()
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_stays_ignored_where_it_is() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ends_on_sigterm():
            end_oneself()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
