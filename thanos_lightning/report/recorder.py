"""Records a thinned curve of training losses without making the host wait for the device at each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thanos_lightning.report.data import History

MOST_LOSSES = 400  # even, so that all losses form pairs


class LossRecorder:
    """Adds the losses of training steps to a history.

    The history keeps fewer than 400 losses. At 400, each pair of neighbours becomes its mean, and from then on each
    loss is the mean of twice as many steps. Losses stay on their device until `settle`.

    Examples:
        >>> history = History()
        >>> recorder = LossRecorder(history)
        >>> recorder.add(1, {"loss": torch.tensor(2.0)})
        >>> recorder.settle()
        >>> history.losses
        [(1, 2.0)]
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._pending: list[tuple[int, Tensor]] = []
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, step: int, outputs: Any) -> None:
        """Count the loss of an optimizer step. A training step whose `outputs` have no scalar loss is not counted."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.ndim:
            return
        loss = loss.detach().float()
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1
        if self._count >= self._history.every:
            self._pending.append((step, self._sum / self._count))
            self._sum, self._count = None, 0
            if len(self._pending) + len(self._history.losses) >= MOST_LOSSES:
                self._thin()

    def settle(self) -> None:
        """Move pending losses from their device into the history."""
        if self._pending:
            values = torch.stack([value for _, value in self._pending]).tolist()
            self._history.losses += [(step, value) for (step, _), value in zip(self._pending, values, strict=True)]
            self._pending.clear()

    def _thin(self) -> None:
        self.settle()
        losses = self._history.losses
        pairs = zip(losses[::2], losses[1::2], strict=True)
        self._history.losses = [(step, (before + loss) / 2) for (_, before), (step, loss) in pairs]
        self._history.every *= 2
