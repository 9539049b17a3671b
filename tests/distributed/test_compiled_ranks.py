"""Real ranks over gloo that train what `torch.compile` compiled, with a backend that runs graphs as traced."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import agreement, check_zeros, only, results, start, trained

# the wrapper of torch.compile can't be made while DeepSpeed's stage 3 watches how modules are made
FORMS = {"ddp": "wrapped", "zero2": "wrapped", "zero3": "in place", "fsdp": "wrapped"}


@pytest.mark.parametrize("strategy", only(["zero2"], FORMS))
def test_what_is_compiled_is_pruned_as_if_it_were_not(strategy: str) -> None:
    plain, compiled = trained(strategy=strategy), trained(strategy=strategy, compiled=FORMS[strategy], save=[8])
    check_zeros(results(compiled))
    for seen, without in zip(results(compiled), results(plain), strict=True):
        assert seen["losses"] == pytest.approx(without["losses"], rel=1e-5)
    assert agreement(plain, compiled) == 1.0


@pytest.mark.rest
def test_what_fails_under_zero3_is_explained(tmp_path: Path) -> None:
    case = {"out": str(tmp_path), "strategy": "zero3", "compiled": "wrapped", "watch": False}
    ended = start(tmp_path, [case], ranks=1)
    assert "torch.compile(module) in configure_model fails under ZeRO-3: compile it in place" in ended.outputs[0]
