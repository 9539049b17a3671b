import pytest
from toy import OfTwo

from thanos_lightning.ranks.access import ParameterAccess
from thanos_lightning.ranks.talk import Failures, PruningError, failing_together, reserve


def test_the_first_error_of_the_first_rank_is_raised_with_its_cause() -> None:
    failures = Failures(OfTwo("none left"))
    for text in ("no room", "no time"):
        with failures.catching(layer="up"):
            raise MemoryError(text)
    with pytest.raises(PruningError) as raised:
        failures.raise_together()
    assert str(raised.value) == "rank 0: layer up: MemoryError: no room. No layer of this window was pruned"
    assert raised.value.__cause__ is failures.error


def test_an_error_is_raised_on_all_ranks_with_its_rank_unless_all_have_it() -> None:
    with pytest.raises(PruningError, match=r"^rank 1: no batch$"), failing_together(OfTwo("no batch")):
        pass
    with pytest.raises(PruningError, match=r"^no batch$"), failing_together(OfTwo("no batch")):
        raise ValueError("no batch")


def test_one_rank_raises_at_once_what_it_is() -> None:
    with pytest.raises(ValueError, match=r"^no batch$"), failing_together(ParameterAccess()):
        raise ValueError("no batch")
    with pytest.raises(PruningError, match=r"^layer up: too large. No layer"), Failures().catching(layer="up"):
        raise ValueError("too large")


def test_memory_that_is_not_there_is_told_before_anything_is_sent() -> None:
    reserve({"up": 2**60}, ParameterAccess())  # sends nothing
    reserve({"up": 2**20}, OfTwo())
    with pytest.raises(PruningError, match=r"^rank 0: layer down: RuntimeError: .*memory"):
        reserve({"up": 2**20, "down": 2**60}, OfTwo())
