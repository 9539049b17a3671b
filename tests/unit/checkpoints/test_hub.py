import os
import socket
import subprocess
import sys

import pytest

LOADS = """
import sys, time
from thanos_lightning.lm import TextData
from thanos_lightning.lm.pretrained import load_pretrained, load_tokenizer
began = time.monotonic()
for load in (load_pretrained, load_tokenizer, lambda name: TextData("python-refrence", name)._load("train")):
    try:
        load("owner/no-such")
    except (FileNotFoundError, ValueError) as error:
        print(error)
print(time.monotonic() - began)
"""


@pytest.mark.parametrize("hub", ["silent", "refuses"])
def test_a_hub_that_does_not_answer_is_asked_once(hub: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if hub == "refuses":
            server.close()
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [sys.executable, "-c", LOADS], env=environment, capture_output=True, text=True, timeout=120, check=True
        )
    *errors, seconds = done.stdout.splitlines()
    assert [error.split()[:2] for error in errors] == [
        ["no", "model"],
        ["no", "tokenizer"],
        ["dataset", "'python-refrence'"],
    ]
    assert errors[-1].endswith("; did you mean python-reference?")
    assert float(seconds) < 4
    assert "Retry" not in done.stderr
