"""Two hosts with a network between them and a folder from a server: the bytes of one machine, or one sentence."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest

from tests.faults import hosts
from tests.faults.hosts import Host
from tests.faults.killer import hashes

pytestmark = [pytest.mark.slow, pytest.mark.kills]

pytest.importorskip("distributed")


MERGE = "merge @base @adapter --max-shard-size 2MB"
EXTRACT = "extract-svd @base @merged --rank 4"

PATIENCE = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s"}
"""How long a connection may say nothing before Dask gives it up; 30 s if left to itself."""


NUMBERS = count()


@dataclass(frozen=True)
class Setting:
    """A caller's host and another, each with a worker, and the folder that both have from a server."""

    caller: Host
    other: Host
    shared: Path
    address: str
    workers: dict[Host, subprocess.Popen[str]]
    out: str = "out"
    """The output of one test; the next has another, for a host may remember for a while what the server had."""

    @property
    def served(self) -> Path:
        """The folder as the server has it, which no cache and no cut comes between."""
        return self.shared.parent / "served"

    def begin(self, command: str, *more: str) -> subprocess.Popen[str]:
        """Begin a command on the caller's host: @NAME is what lies in the folder, @out the test's own output there."""
        words = command.replace("@out", f"@{self.out}").replace("@", f"{self.shared}/").split()
        return self.caller.begin([sys.executable, "-m", "loratools", *words, *more], more=PATIENCE)

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Return the exit code and the errors of a command."""
        try:
            _, errors = process.communicate(timeout=hosts.WAIT)
        finally:
            hosts.kill(process)
        return process.returncode, errors

    def right(self, command: str, *more: str) -> None:
        """Run a command that has to succeed."""
        code, errors = self.end(self.begin(command, *more))
        assert code == 0, errors

    def hidden(self) -> list[str]:
        """Return the names of what is hidden in the folder."""
        return sorted(path.name for path in self.served.glob(".*"))


@pytest.fixture(scope="module")
def cluster(sizeable: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """A scheduler at the server's, and what commands make without workers."""
    folder = tmp_path_factory.mktemp("hosts")
    shutil.copytree(sizeable, folder / "served")
    with hosts.three(folder) as (server, caller, other, shared):
        words = [
            *_dask("scheduler"),
            "--host",
            hosts.SERVER,
            "--port",
            "8786",
            "--no-dashboard",
        ]
        scheduler = server.begin(words, folder / "scheduler.log", more=PATIENCE)
        setting = Setting(caller, other, shared, f"tcp://{hosts.SERVER}:8786", {})
        try:
            setting.right(f"{MERGE} -o @merged")
            setting.right(f"{EXTRACT} -o @extracted")
            yield setting
        finally:
            hosts.kill(scheduler)


@pytest.fixture
def setting(cluster: Setting) -> Iterator[Setting]:
    """The cluster, with a new worker on each host."""
    words = [*_dask("worker"), cluster.address, "--nthreads", "1", "--no-dashboard"]
    with ExitStack() as stack:
        for host in (cluster.caller, cluster.other):
            log = cluster.shared.parent / f"{host.name}.log"
            own = [*words, "--no-nanny", "--host", host.address, "--memory-limit", "0"]
            cluster.workers[host] = host.begin(own, log, more=PATIENCE)
            stack.callback(hosts.kill, cluster.workers[host])
        code = "import sys, distributed; distributed.Client(sys.argv[1]).wait_for_workers(2, timeout=60)"
        done = cluster.caller.run(sys.executable, "-c", code, cluster.address)
        assert done.returncode == 0, done.stderr
        yield replace(cluster, out=f"out{next(NUMBERS)}")


@pytest.mark.parametrize(("command", "known"), [(MERGE, "merged"), (EXTRACT, "extracted")])
def test_two_hosts_write_the_bytes_of_one(setting: Setting, command: str, known: str) -> None:
    setting.right(f"{command} -o @out", "--workers", setting.address)
    assert hashes(setting.served / setting.out) == hashes(setting.served / known)
    assert setting.hidden() == []


def test_a_host_whose_worker_is_killed(setting: Setting) -> None:
    """The other host's worker does what that one had begun."""
    process = _until_a_part_is_there(setting)
    hosts.kill(setting.workers[setting.other])
    assert setting.end(process) == (0, "")
    assert hashes(setting.served / setting.out) == hashes(setting.served / "merged")
    assert setting.hidden() == []


def _until_a_part_is_there(setting: Setting) -> subprocess.Popen[str]:
    """Begin a merge on the workers, and return when something of it lies in the folder."""
    process = setting.begin(f"{MERGE} -o @out -q", "--workers", setting.address)
    end = time.monotonic() + hosts.WAIT
    while not any(setting.served.glob(f".{setting.out}.part-*/*.safetensors")):
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"no part is there: {setting.end(process)}")
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("whose", ["caller", "other"])
def test_a_link_that_is_cut_for_a_moment_changes_nothing(setting: Setting, whose: str) -> None:
    """For 3 s nothing comes through, which is less than anybody's patience."""
    process = _until_a_part_is_there(setting)
    with _cut(getattr(setting, whose)):
        time.sleep(3)
    assert setting.end(process) == (0, "")
    assert hashes(setting.served / setting.out) == hashes(setting.served / "merged")
    assert setting.hidden() == []


def test_a_host_that_is_cut_off_is_done_without(setting: Setting) -> None:
    """Its worker is given up, and what it had begun is done by the other's; its own part is of no more use."""
    process = _until_a_part_is_there(setting)
    with _cut(setting.other):
        code, errors = setting.end(process)
    assert (code, errors) == (0, "")
    assert hashes(setting.served / setting.out) == hashes(setting.served / "merged")


def test_a_caller_that_is_cut_off_says_so(setting: Setting) -> None:
    """Its scheduler and its folder are gone for longer than Dask waits. The same command goes on from what is there."""
    process = _until_a_part_is_there(setting)
    with _cut(setting.caller):
        time.sleep(20)
    code, errors = setting.end(process)
    assert (code, errors.count("error: ")) == (1, 1)
    assert "Traceback" not in errors
    assert not (setting.served / setting.out).exists()
    setting.right(f"{MERGE} -o @out", "--workers", setting.address)
    assert hashes(setting.served / setting.out) == hashes(setting.served / "merged")
    assert setting.hidden() == []


@contextmanager
def _cut(host: Host) -> Iterator[None]:
    host.link("down")
    try:
        yield
    finally:
        host.link("up")


def _dask(program: str) -> list[str]:
    return [sys.executable, "-m", f"distributed.cli.dask_{program}"]
