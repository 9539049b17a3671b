import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["pattern", "hessian", "linalg", "layer"])
def test_examples_in_docstrings(name):
    results = doctest.testmod(importlib.import_module(f"thanos_lightning.solver.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
