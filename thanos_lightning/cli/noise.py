"""Hides messages of libraries that the user cannot act on. Each message is matched by its own words."""

from __future__ import annotations

import logging
import re
import warnings

_WARNINGS = (
    r".*LeafSpec.* is deprecated",  # torch, about a call that Lightning makes
    r".torch\.distributed\.\w+. is deprecated",  # torch, about calls that DeepSpeed makes
    r"Precision .* is not supported by the model summary",  # it concerns sizes in MB
    r".*does not have many workers",  # packed blocks come from memory
)
_MESSAGES = (
    re.compile(r"^💡 Tip"),
    re.compile(r"^(TPU|HPU) available: False"),
    re.compile(r"^Setting accelerator to CPU\. If you have GPU or other accelerator"),  # DeepSpeed, when it is imported
)
_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch", "DeepSpeed")


def _is_ours_to_say(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(expression.search(message) for expression in _MESSAGES)


def silence() -> None:
    """Hide these messages in this process."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_ours_to_say)
