"""Whether Hugging Face's hub answers: asked once in two seconds, where its libraries would retry for a minute."""

from __future__ import annotations

import functools
import os
import sys
import threading
from contextlib import suppress

from huggingface_hub import constants, get_session

_SECONDS = 2.0


@functools.cache
def go_offline_without_hub() -> None:
    """Read names of the hub from the cache alone, in this process and its children, if the hub doesn't answer.

    `HF_ENDPOINT`, the proxies and `HF_HUB_OFFLINE` of the environment hold.
    """
    if constants.HF_HUB_OFFLINE:
        return
    answered = threading.Event()

    def ask() -> None:
        with suppress(Exception):  # of several HTTP libraries, by the version
            get_session().head(constants.ENDPOINT, timeout=_SECONDS)
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # a resolver of names knows no timeout
    asking.start()
    asking.join(_SECONDS)
    if not answered.is_set():
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
