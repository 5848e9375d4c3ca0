"""Who does the work is a number, an address, or an executor; anything else is refused before anything is read."""

from __future__ import annotations

import http.client
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import InvalidOption, LoraToolsError
from loratools.parallel.executors import check, names, opened
from loratools.parallel.tasks import run


def test_there_is_a_kind_for_each_address() -> None:
    assert names() == ("local", "slurm", "tcp", "tls")
    for workers in (1, "2", "tcp://host:8786", "tls://host:1", "slurm", "slurm:4", ThreadPoolExecutor(1)):
        check(workers)


@pytest.mark.parametrize("workers", [0, -1, True, None, "", "local", "0", "http://host", "2x", 1.5, [2]])
def test_what_nobody_answers_to(workers: Any) -> None:
    with pytest.raises(InvalidOption, match="it can be a number of processes, or slurm:…, tcp:…"):
        check(workers)


def test_an_executor_stays_open() -> None:
    with ThreadPoolExecutor(1) as executor:
        with opened(executor) as pool:
            assert pool.executor is executor
        assert executor.submit(abs, -3).result() == 3


def pid(task: int) -> int:
    return os.getpid()


@pytest.mark.slow
def test_local_processes_are_others_than_this_and_listen_here_only() -> None:
    pytest.importorskip("distributed")
    with opened(2) as pool:
        assert (pool.count, pool.local) == (2, True)
        processes = set(run(pool, pid, range(4), lambda task, result: None, bool))
        addresses = set(pool.executor._client.scheduler_info()["workers"])  # type: ignore[attr-defined]
    assert os.getpid() not in processes
    assert {address.rpartition(":")[0] for address in addresses} == {"tcp://127.0.0.1"}


def hears_no_interrupt(task: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no masks of signals")
def test_ctrl_c_reaches_the_caller_alone() -> None:
    """A terminal sends it to all processes; those of Dask would each print how far they had come."""
    pytest.importorskip("distributed")
    with opened(1) as pool:
        assert run(pool, hears_no_interrupt, [0], lambda task, result: None, bool) == [True]
        assert not hears_no_interrupt(0)


@pytest.mark.slow
def test_local_processes_leave_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with opened(1):
        assert [path.name.rpartition("-")[0] for path in tmp_path.iterdir()] == ["loratools-workers"]
    assert list(tmp_path.iterdir()) == []


LISTENS = "0A"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_listens_beyond_this_machine_and_no_page_is_served() -> None:
    """Every socket that listens, of this process and all that it began, is on 127.0.0.1, and answers no HTTP."""
    pytest.importorskip("distributed")
    before = set(_listening())
    with opened(1) as pool:
        assert pool.executor.submit(abs, -3).result() == 3
        found = sorted(set(_listening()) - before)
    assert len(found) >= 3  # the scheduler, the nanny, the worker
    assert {host for host, _ in found} == {"0100007F"}
    with opened(1) as pool:
        client = pool.executor._client  # type: ignore[attr-defined]
        client.wait_for_workers(1, timeout=60)
        (of_worker,) = client.run(page_port).values()
        for port in (client.cluster.scheduler.http_server.port, of_worker):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            for page in ("/", "/info/main/workers.html", "/metrics", "/json/identity.json", "/health"):
                connection.request("GET", page)
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 404
            connection.close()


def page_port(dask_worker: Any) -> int:
    """Return the port of a worker's pages, in the worker."""
    port: int = dask_worker.http_server.port
    return port


def _listening() -> Iterator[tuple[str, int]]:
    """Yield the address, in hex as the kernel writes it, and the port of every socket that our processes listen on."""
    ours = {os.getpid()}
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    while more := {child for child, parent in parents.items() if parent in ours} - ours:
        ours |= more
    inodes = set()
    for pid in ours:
        for each in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):  # it has just been closed
                inodes.add(str(each.readlink())[len("socket:[") : -1])
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENS and words[9] in inodes:
                host, _, port = words[1].partition(":")
                yield host, int(port, 16)


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    from loratools.parallel.executors import _dask

    monkeypatch.setattr(_dask, "ANSWER", "1s")
    with (
        pytest.raises(LoraToolsError, match=r"tcp://127\.0\.0\.1:1: no scheduler answers"),
        opened("tcp://127.0.0.1:1"),
    ):
        pass


def test_a_slurm_address_has_a_number_of_jobs() -> None:
    with pytest.raises(InvalidOption, match="after slurm: comes a number of jobs"), opened("slurm:many"):
        pass


@pytest.mark.slow
def test_a_port_that_is_taken_is_no_matter() -> None:
    """Two schedulers at a time: each has its own port for its state, and none warns, which is an error in tests."""
    pytest.importorskip("distributed")
    with opened(1) as one, opened(1) as two:
        assert [pool.executor.submit(abs, -3).result() for pool in (one, two)] == [3, 3]
