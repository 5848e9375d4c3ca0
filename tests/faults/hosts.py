"""Hosts played on one machine: each has its own network, mounts, processes and name, and a folder from one server.

A host is a set of namespaces of Linux, which end with the process that holds them. Those of the workers are tied to
the server's bridge by a pair of virtual cards each, and nothing leads from there to any other network. The server runs
sshd, and the folder comes by sshfs. A lock that one host has taken there is not seen by another.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import pytest

from tests.conftest import clean_env

WAIT = 120
SERVER = "10.213.0.1"
NEEDED = ("unshare", "nsenter", "ip", "mount", "sshfs", "ssh-keygen", "/usr/sbin/sshd")


@dataclass(frozen=True)
class Host:
    """The process that holds a host's namespaces, as this system numbers it; its name and its address."""

    pid: int
    name: str
    address: str

    def begin(
        self, words: Sequence[str], log: Path | None = None, more: Mapping[str, str] = {}
    ) -> subprocess.Popen[str]:
        """Begin a program there; its group of processes is its own, so that `kill` ends all of it."""
        inside = ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-p", "-r", "-w", *words]
        with ExitStack() as stack:
            out = stack.enter_context(log.open("wb")) if log else subprocess.PIPE
            return subprocess.Popen(
                inside, env=clean_env() | {"HOME": "/root", **more}, stdin=subprocess.DEVNULL, stdout=out, text=True,
                stderr=subprocess.STDOUT if log else subprocess.PIPE, start_new_session=True,
            )  # fmt: skip

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program there to its end."""
        process = self.begin(words)
        try:
            out, err = process.communicate(timeout=WAIT)
        finally:
            kill(process)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def link(self, state: str) -> None:
        """Set the host's card `up` or `down`, as if somebody pulled the cable."""
        _must("ip", "link", "set", "card", state, of=self)


@contextmanager
def three(folder: Path) -> Iterator[tuple[Host, Host, Host, Path]]:
    """Give a server and two workers, and the folder that is, on both of those, the server's `folder / "served"`.

    Skips the test, by name, where it is not root, or a program is missing.
    """
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("needs root on Linux, for networks and mounts of its own")
    if missing := [name for name in NEEDED if which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install iproute2 openssh-server sshfs")
    shared = folder / "shared"
    for each in (shared, folder / "served"):
        each.mkdir(exist_ok=True)
    for name in ("key", "of-host"):
        _must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    with ExitStack() as stack:
        server, *workers = (stack.enter_context(_host(f"host{i}", f"10.213.0.{i}")) for i in (1, 2, 3))
        for words in ("link add name bridge0 type bridge", f"addr add {SERVER}/24 dev bridge0", "link set bridge0 up"):
            _must("ip", *words.split(), of=server)
        for each in workers:
            tie = f"link add card netns {each.pid} type veth peer name to-{each.name} netns {server.pid}"
            _must("ip", *tie.split())
            _must("ip", *f"link set to-{each.name} master bridge0 up".split(), of=server)
            _must("ip", *f"addr add {each.address}/24 dev card".split(), of=each)
            _must("ip", "link", "set", "card", "up", of=each)
        _serve(server, folder)
        for each in workers:
            _must("sshfs", f"root@{SERVER}:{folder}/served", str(shared), "-o", _options(folder), of=each)
        yield server, workers[0], workers[1], shared


@contextmanager
def _host(name: str, address: str) -> Iterator[Host]:
    """Make the namespaces of a host, with a process of its own that is the first in it; all ends with that one."""
    words = ["unshare", "-n", "-m", "-u", "-p", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
    script = f"hostname {name} && mount -t tmpfs tmpfs /run && mkdir /run/sshd && ip link set lo up && echo up && cat"
    keeper = subprocess.Popen(
        [*words, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert keeper.stdout
        if (said := keeper.stdout.readline()) != "up\n":
            pytest.skip(f"needs namespaces of its own: {said}")
        children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()
        yield Host(int(children[0]), name, address)
    finally:
        keeper.kill()
        keeper.communicate()


def _serve(server: Host, folder: Path) -> None:
    """Run sshd, which listens on the server's address only and takes this folder's key only."""
    settings = {
        "HostKey": folder / "of-host", "AuthorizedKeysFile": folder / "key.pub", "PidFile": "none", "UsePAM": "no",
        "StrictModes": "no", "ListenAddress": SERVER, "Subsystem": "sftp internal-sftp", "PasswordAuthentication": "no",
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    _must("/usr/sbin/sshd", "-f", "/dev/null", "-E", str(folder / "sshd.log"), *words, of=server)


def _options(folder: Path) -> str:
    """Return what sshfs is told: who it is, and to connect again where the server has not answered for 6 s."""
    told = {
        "IdentityFile": folder / "key", "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null",
        "ServerAliveInterval": 2, "ServerAliveCountMax": 3,
    }  # fmt: skip
    return ",".join(["reconnect", *(f"{name}={value}" for name, value in told.items())])


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a program of a host with all that it began, and wait for it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe:
            pipe.close()


def _must(*words: str, of: Host | None = None) -> None:
    done = of.run(*words) if of else subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}{done.stdout}"
