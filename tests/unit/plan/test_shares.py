"""What a rank is said to hold: the arithmetic of each strategy, on a model of round numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import nn

from thanos_lightning.layers.targets import find_targets
from thanos_lightning.plan.shares import Share, share_of

RANKS, BUCKET = 4, 1000
BF16 = torch.bfloat16
NUMBER = 2 * 512 * 512  # weights, all of which are pruned and trained


def zero(stage: int, **options: Any) -> DeepSpeedStrategy:
    return DeepSpeedStrategy(stage=stage, reduce_bucket_size=BUCKET, overlap_comm=True, **options)


def share(strategy: Strategy | None, dtype: torch.dtype = torch.float32, *, autocasts: bool = False) -> Share:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False)).to(dtype)
    return share_of(model, find_targets(model).values(), strategy, RANKS, autocasts=autocasts)


def bytes_each(part: int) -> float:
    return part / NUMBER


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (None, (4, 4, 0, 8, 1)),
        (DDPStrategy(), (4, 4, 0, 8, 1)),
        (zero(1), (2, 2, 1, 2, 0.25)),
        (zero(2), (2, 0.5, 1, 2, 0.25)),
        (zero(3), (0.5, 0.5, 1, 2, 0.25)),
        (DeepSpeedStrategy(zero_optimization=False), (2, 2, 4, 8, 1)),
    ],
    ids=["one device", "ddp", "1", "2", "3", "0"],
)
def test_parts_are_shared_as_the_strategy_does(strategy: Strategy | None, expected: tuple[float, ...]) -> None:
    its = share(strategy, BF16 if isinstance(strategy, DeepSpeedStrategy) else torch.float32).bytes
    parts = its.weights, its.gradients, its.masters, its.moments, its.masks
    assert tuple(map(bytes_each, parts)) == expected


def test_buckets_and_copies() -> None:
    assert bytes_each(share(DDPStrategy()).bytes.buckets) == 4
    assert bytes_each(share(None, autocasts=True).bytes.copies) == 2
    assert share(None, BF16, autocasts=True).bytes.copies == 0
    assert share(zero(2), BF16).bytes.buckets == 2 * 2 * BUCKET
    for offload, passing in ((False, 4), (True, 0)):  # an offloaded step has no gradients on the device
        assert bytes_each(share(zero(2, offload_optimizer=offload), BF16).bytes.passing) == passing / RANKS
    of_rank = share(zero(3), BF16).bytes
    assert of_rank.buckets == 2 * BUCKET
    assert bytes_each(of_rank.copies) == 2
    assert bytes_each(of_rank.passing) == 2  # one of two gradients, and once more


def test_an_event_finds_what_lasts() -> None:
    before, later = (bytes_each(share(None, autocasts=True).at_event(step).total) for step in (0, 5))
    assert (before, later) == (4 + 1, 16 + 1)
    third = share(zero(3), BF16)
    assert third.at_event(0) == third.at_event(5) == third.bytes.without("copies", "passing")


@pytest.mark.parametrize(
    ("options", "stays"),
    [({"offload_optimizer": True}, {"weights"}), ({"offload_optimizer": True, "offload_parameters": True}, set())],
)
def test_what_is_offloaded_is_not_on_the_device(options: dict[str, Any], stays: set[str]) -> None:
    given = share(zero(3, **options), BF16)
    there = {name for name, size in vars(given.in_training()).items() if size}
    assert there == stays | {"copies", "buckets", "passing"}


@pytest.mark.parametrize(("stage", "expected"), [(1, 14), (3, 12)])
def test_a_checkpoint_has_masters_moments_and_masks(stage: int, expected: int) -> None:
    assert bytes_each(share(zero(stage), BF16).checkpoint) == expected + 1 / 8
    assert bytes_each(share(None).checkpoint) == 12 + 1 / 8
