"""Workers are killed, the scheduler, or a disk is full: the right bytes, or one sentence, and nothing half-written."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from loratools.decisions import warnings_to
from loratools.errors import BadFile, LoraToolsError, NoSpace
from loratools.parallel import tasks
from loratools.parallel.executors import _dask, opened
from loratools.surgery.merge import merge, planned
from loratools.surgery.merge.parts import call_of
from loratools.surgery.merge.shared import merge_shared
from tests.conftest import clean_env
from tests.faults.killer import hashes

pytestmark = pytest.mark.slow

distributed = pytest.importorskip("distributed")

WAIT = 120


@pytest.mark.kills
def test_workers_killed_at_random_moments_change_no_byte(
    sizeable: Path, tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker or both are killed 30 times, or 4 in the sample; they are begun anew, and lost work is done again.

    Every file has tensors of several parts, which its workers write at the same time.
    """
    monkeypatch.setattr(planned, "PIECE", 1 << 18)
    chance, times = random.Random(pytestconfig.option.seed), 30 if pytestconfig.option.whole else 4
    merge(sizeable / "base", [sizeable / "adapter"], tmp_path / "whole")
    right, out = hashes(tmp_path / "whole"), tmp_path / "room" / "out"
    out.parent.mkdir()
    call, told = call_of(sizeable / "base", [sizeable / "adapter"], out), list[str]()
    with opened(2) as pool, warnings_to(told.append):
        client = pool.executor._client  # type: ignore[attr-defined]
        begun = time.monotonic()
        merge_shared(call, pool.executor)
        took = time.monotonic() - begun
        for _ in range(times):
            shutil.rmtree(out)
            client.wait_for_workers(2, timeout=WAIT)
            pids = list(client.run(os.getpid, on_error="ignore").values())
            victims = [pid for pid in pids if isinstance(pid, int)][: chance.choice((1, 1, 2))]
            killer = Timer(chance.random() * took, lambda: [_kill(pid) for pid in victims])  # noqa: B023
            killer.start()
            merge_shared(call, pool.executor)
            killer.join()
            assert hashes(out) == right
            assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_process_killed_before_it_has_begun_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process that a nanny begins is killed at once, which Dask does not try again."""
    from distributed.process import AsyncProcess

    started = AsyncProcess.start

    async def start(process: Any) -> None:
        await started(process)
        _kill(process.pid)

    monkeypatch.setattr(AsyncProcess, "start", start)
    with pytest.raises(LoraToolsError, match="1 processes of this machine: they could not be begun"), opened(1):
        pass


def test_processes_that_never_come_back_are_told_in_a_sentence(
    sizeable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both nannies stop beginning processes anew, as where the machine has no memory left."""
    from distributed import Nanny

    monkeypatch.setattr(tasks, "GLANCE", 0.2)
    monkeypatch.setattr(_dask, "ALONE", 1)

    async def nothing(nanny: Any) -> None:
        """Begin no process."""

    call = call_of(sizeable / "base", [sizeable / "adapter"], tmp_path / "out")
    told = r"part \d/3 was not done: no worker has been there for \d s"
    with opened(2) as pool:
        pids = list(pool.executor._client.run(os.getpid).values())  # type: ignore[attr-defined]
        monkeypatch.setattr(Nanny, "instantiate", nothing)
        for pid in pids:
            _kill(pid)
        with pytest.raises(LoraToolsError, match=told):
            merge_shared(call, pool.executor)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_without_a_nanny_that_is_lost_is_named(
    sizeable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "GLANCE", 0.2)
    monkeypatch.setattr(_dask, "ALONE", 1)
    with scheduler(tmp_path / "s") as (address, _), worker(address) as process:
        told = rf"{address}: part \d/3 was not done: no worker has been there for \d s, after tcp://127.0.0.1"
        with pytest.raises(LoraToolsError, match=told):
            _merge(sizeable, tmp_path, address, lambda: _kill(process.pid))
    assert _left(tmp_path) == []


def test_a_scheduler_that_is_killed_is_told_in_a_sentence(sizeable: Path, tmp_path: Path) -> None:
    with scheduler(tmp_path / "s") as (address, process), worker(address):
        told = rf"{address}: part \d/3 was not done: the connection to the scheduler is lost"
        with pytest.raises(LoraToolsError, match=told):
            _merge(sizeable, tmp_path, address, lambda: _kill(process.pid))
    assert _left(tmp_path) == []


def test_a_full_disk_of_a_worker_is_told_in_a_sentence(sizeable: Path, tmp_path: Path) -> None:
    """One worker may write files of 2 MB at most, which its system says as it says that a quota is reached."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    with scheduler(tmp_path / "s") as (address, _), worker(address, limit) as process, pytest.raises(NoSpace) as caught:
        _merge(sizeable, tmp_path, address)
    assert any(f"process {process.pid}" in problem and "in part " in problem for problem in caught.value.problems)
    assert _left(tmp_path) == []


def test_a_worker_with_another_disk_at_that_path_is_told_in_a_sentence(sizeable: Path, tmp_path: Path) -> None:
    """Where the caller's folder is, one worker has a small disk of its own, and would write where nobody looks."""
    room = tmp_path / "room"
    room.mkdir()
    mount = f"mount -t tmpfs -o size=8m tmpfs {room}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    before = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    with scheduler(tmp_path / "s") as (address, _), worker(address, before=before), pytest.raises(BadFile) as caught:
        merge_shared(call_of(sizeable / "base", [sizeable / "adapter"], room / "out"), address)
    assert "does not see" in caught.value.message
    assert list(room.iterdir()) == []


def _merge(sizeable: Path, folder: Path, address: str, first: Callable[[], object] | None = None) -> None:
    """Merge on a scheduler into a folder; call `first` when the first part is done."""
    done = list[int]()

    def progress(count: int) -> None:
        done.append(count)
        if first and len(done) == 1:
            first()

    merge_shared(call_of(sizeable / "base", [sizeable / "adapter"], folder / "out"), address, progress=progress)


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "s")


def _kill(pid: int) -> None:
    """Kill a process, which may be gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def scheduler(file: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a scheduler; give its address and its process."""
    words = ["-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    with _running([*words, "--scheduler-file", str(file)]) as process:
        import json

        end = time.monotonic() + WAIT
        while time.monotonic() < end and process.poll() is None:
            if file.exists() and (text := file.read_text()):
                yield json.loads(text)["address"], process
                return
            time.sleep(0.05)
        pytest.fail("the scheduler did not begin")


@contextmanager
def worker(
    address: str, limit: Callable[[], None] | None = None, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a worker of one thread without a nanny, and wait until the scheduler knows it."""
    words = ["-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
    with _running([*words, "--host", "127.0.0.1", "--memory-limit", "0"], limit, before) as process:
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=WAIT)
        yield process


@contextmanager
def _running(
    words: Sequence[str], limit: Callable[[], None] | None = None, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    with ExitStack() as stack:
        process = subprocess.Popen(
            [*before, sys.executable, *words], env=clean_env() | {"PYTHONPATH": str(Path.cwd())},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=limit,  # noqa: PLW1509
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield process
