"""Which tokens of a batch count. inputs.py finds their rows in a layer's input; collector.py chooses the batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

IGNORED_LABEL = -100  # transformers' label for a token that is no target


def token_mask(batch: Any, key: str = "attention_mask") -> Tensor | None:
    """Find the mask of the tokens that count, anywhere in a batch: bool (batch, length), or None without a mask.

    The batch may nest mappings, lists and tuples. `key` names the mask in a mapping: 1 or True for a token that counts.
    The mask is returned on the CPU, because the host reads it. A mask on a device is copied once.

    Raises:
        ValueError: If there are several masks, or the mask is additive or not of shape (batch, length).
    """
    masks = list(_find(batch, key))
    if not masks:
        return None
    if len(masks) > 1:
        raise ValueError(
            f"the batch has {len(masks)} masks named {key!r}, which does not show which tokens a layer sees: give the "
            "callback calibration.batches with one, or calibration.attention_mask_key=None to count every token"
        )
    mask = torch.as_tensor(masks[0]).cpu()
    if mask.dim() != 2 or bool((mask < 0).any()):
        raise ValueError(
            f"the batch's {key!r} has shape {tuple(mask.shape)} and dtype {mask.dtype}: to tell padding from tokens it "
            "must be (batch, length), 1 for a token and 0 for padding. Name another key in attention_mask_key, or None "
            "to count every token"
        )
    return mask.bool()


def has_text(batch: Any) -> bool:
    """Whether a batch is a language model's, so that some tokens may be padding."""
    return next(_find(batch, "input_ids"), None) is not None


def _find(batch: Any, key: str) -> Iterator[Any]:
    if isinstance(batch, Mapping):
        for name, value in batch.items():
            if name == key and value is not None:
                yield value
            else:
                yield from _find(value, key)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _find(value, key)


class CountedTokens:
    """The tokens of a batch that count, as row indices, so that selecting them does not make the host wait.

    The mask is bool (batch, length), on the CPU.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape = mask.shape
        self._mask = mask
        self._rows: dict[tuple[torch.device, bool], Tensor] = {}
        self.all = bool(mask.all())

    def rows(self, device: torch.device, *, sequence_first: bool = False) -> Tensor:
        """Return which rows of inputs, flattened to (tokens, features), count: int64 indices, on the device."""
        key = (device, sequence_first)
        if key not in self._rows:
            rows = (self._mask.T if sequence_first else self._mask).flatten().nonzero().squeeze(1)
            self._rows[key] = rows.to(device, non_blocking=True)
        return self._rows[key]


def counted_predictions(
    batch: Mapping[str, Tensor], logits: Float[Tensor, "batch tokens vocabulary"]
) -> Bool[Tensor, "batch tokens"]:
    """Mark the tokens whose next-token prediction counts.

    A prediction counts if the next token's label is not -100; without labels, if the attention_mask is 1 for both
    tokens; without both, always. Labels and mask are (batch, tokens). Of the logits, only the shape and the device
    matter.

    Examples:
        >>> counted_predictions({"attention_mask": torch.tensor([[1, 1, 0]])}, torch.zeros(1, 3, 2))
        tensor([[ True, False, False]])
    """
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    counted = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    if labels is not None:
        counted[:, :-1] = (labels[:, 1:] != IGNORED_LABEL).to(counted.device)
    elif mask is not None:
        counted[:, :-1] = (mask[:, :-1].bool() & mask[:, 1:].bool()).to(counted.device)
    counted[:, -1] = False  # nothing follows
    return counted
