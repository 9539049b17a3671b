"""Learning rates that rise anew after an event, whatever the user's schedulers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class Rewarming:
    """Scales the learning rates of an optimizer for the time of a step, and gives them back after it.

    So schedulers, and what logs or saves their rates, see nothing of it.

    Args:
        factor: What the rates of the next step are multiplied by.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> rewarming = Rewarming(lambda: 0.25)
        >>> handles = rewarming.attach(optimizer)
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (-0.25, 1.0)
    """

    def __init__(self, factor: Callable[[], float]) -> None:
        self._factor = factor
        self._rates: list[Any] = []

    def attach(self, optimizer: Optimizer) -> list[Any]:
        """Add the hooks; their handles remove them."""
        return [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        factor = self._factor()
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
