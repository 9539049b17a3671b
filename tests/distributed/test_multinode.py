"""Several hosts: network namespaces of this machine, joined by a virtual cable, with nothing else in common but files.

Such a host has a loopback and a network interface of its own, so that what would find the other ranks on this machine,
and not on another one, fails here too. Making them takes root and iproute2. Where these are missing the tests are
skipped, or fail if THANOS_REQUIRE_ALL=1 is set, as it is in CI.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from launched import LAUNCH, check_ranks, prepare
from ranks import PATIENCE, Ended, check_everywhere, environment, train_alone
from require import without

PORT = 29611  # nobody else listens in a new namespace


class Hosts:
    """Two namespaces. Host h has the address 10.77.0.<h + 1> on an interface of its own."""

    def __init__(self) -> None:
        unique = uuid.uuid4().hex[:8]
        self.names = [f"thanos-{unique}-{host}" for host in range(2)]
        self.interfaces = [f"th{unique}{host}" for host in range(2)]  # at most 15 characters

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def make(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        (a, b), (veth_a, veth_b) = self.names, self.interfaces
        _ip("link", "add", veth_a, "netns", a, "type", "veth", "peer", "name", veth_b, "netns", b)
        for host, (name, interface) in enumerate(zip(self.names, self.interfaces, strict=True)):
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", interface)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", interface, "up")

    def wait(self, processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path]) -> Ended:
        """Until all have ended, or one has failed, for which the others would wait; what is left then is killed."""
        begin = time.monotonic()
        try:
            while time.monotonic() - begin < PATIENCE:
                codes = [process.poll() for process in processes]
                if any(codes) or None not in codes:
                    break
                time.sleep(0.1)
        finally:
            self.kill()
        return Ended([process.wait() for process in processes], [log.read_text() for log in logs])

    def kill(self) -> None:
        """End all processes on the hosts, also those that launchers have started."""
        for name in self.names:
            for pid in _ip("netns", "pids", name).split():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        for name in self.names:  # their interfaces go with them
            with contextlib.suppress(subprocess.CalledProcessError):  # it may not have been made
                _ip("netns", "del", name)

    def start(self, host: int, command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *command], env=dict(env), stdout=file, stderr=file
            )


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    if sys.platform != "linux":
        without(f"network namespaces are Linux's: this is {sys.platform}")
    if os.geteuid() != 0:
        without("making network namespaces needs root: this is another user")
    if shutil.which("ip") is None:
        without("making network namespaces needs the command ip (apt-get install iproute2): it is not installed")
    made = Hosts()
    try:
        try:
            made.make()
        except subprocess.CalledProcessError as error:
            without(f"network namespaces can't be made here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()


@pytest.mark.parametrize("ranks_each", [1, pytest.param(2, marks=pytest.mark.rest)])
def test_zero3_prunes_on_two_hosts_as_one(hosts: Hosts, tmp_path: Path, ranks_each: int) -> None:
    ranks = 2 * ranks_each
    environments = [
        environment(
            host * ranks_each + local_rank,
            ranks,
            PORT,
            MASTER_ADDR=hosts.address(0),
            NODE_RANK=str(host),
            LOCAL_RANK=str(local_rank),
            GLOO_SOCKET_IFNAME=hosts.interfaces[host],
            TEST_NODES="2",
            TEST_NETWORK=hosts.names[host],
        )
        for host in range(2)
        for local_rank in range(ranks_each)
    ]
    case = {"strategy": "zero3", "precision": "bf16-mixed", "batch_size": 4 // ranks_each}
    train_alone(tmp_path, ranks, environments, **case)
    seen = check_everywhere(tmp_path, case, ranks)
    # each rank has read data of its own
    assert len({tuple(rank["losses"]) for rank in seen}) == ranks


@pytest.mark.rest
@pytest.mark.parametrize(
    ("script", "environment"), [("torchrun.sh", "TorchElasticEnvironment"), ("deepspeed.sh", "LightningEnvironment")]
)
def test_a_launcher_joins_the_hosts(hosts: Hosts, tmp_path: Path, script: str, environment: str) -> None:
    arguments, env = prepare(tmp_path)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("host-0 slots=1\nhost-1 slots=1\n")
    env |= {
        "NODES": "2",
        "PROCESSES": "1",
        "HOSTFILE": str(hostfile),
        "MASTER_ADDR": hosts.address(0),
        "MASTER_PORT": str(PORT),
    }
    processes, logs = [], [tmp_path / f"log{host}.txt" for host in range(2)]
    for host, log in enumerate(logs):
        own = {"NODE_RANK": str(host), "GLOO_SOCKET_IFNAME": hosts.interfaces[host]}
        processes.append(hosts.start(host, [str(LAUNCH / script), *arguments], {**env, **own}, log))
    ended = hosts.wait(processes, logs)
    assert ended.codes == [0, 0], "\n".join(text[-3000:] for text in ended.outputs)
    check_ranks(tmp_path, [(0, 0, 0), (1, 0, 1)], environment)
