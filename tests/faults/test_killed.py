"""A merge that is killed, interrupted, or runs out of room leaves nothing under the final name but the whole result."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Result, clean_env
from tests.faults.killer import hashes


def merge(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `loratools merge` as a user does."""
    command = [sys.executable, "-m", "loratools", "merge", "-q", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=clean_env(), check=False, **options)  # type: ignore[call-overload, no-any-return]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def share(pytestconfig: pytest.Config) -> int:
    """One in how many of the kills is made."""
    return 1 if pytestconfig.option.whole else 5


@pytest.fixture(scope="module")
def outcome(
    sizeable: Path, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, share: int
) -> dict[str, list[dict[str, object]]]:
    """What became of 50 merges killed and 25 interrupted at random moments, and of 20 killed while replacing."""
    inputs = (sizeable / "base", sizeable / "adapter", tmp_path_factory.mktemp("killed"))
    command = [sys.executable, "-m", "tests.faults.killer", *inputs, str(pytestconfig.option.seed), str(share)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env(), cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    trials: dict[str, list[dict[str, object]]] = json.loads(done.stdout)
    return trials


@pytest.mark.slow
@pytest.mark.kills
def test_killed_merges(outcome: dict[str, list[dict[str, object]]], share: int) -> None:
    killed = [trial for trial in outcome["trials"] if trial["way"] != "interrupt"]
    assert len(killed) == 50 // share
    for trial in killed:
        assert trial["code"] == -signal.SIGKILL or (trial["way"] == "late" and trial["code"] == 0), trial
        assert trial["before"] in ("nothing", "complete"), trial
        # The rerun ends with the whole result, or finds that it is there already; no leftover survives it.
        assert trial["rerun"] == (0 if trial["before"] == "nothing" else 1), trial
        assert trial["after"] == "complete", trial
        assert trial["names"] == ["out"], trial
    seen = Counter(trial["left"] for trial in killed if trial["before"] == "nothing")
    assert seen[1] >= 20 // share, seen  # most of them were killed with a half-written folder beside


@pytest.mark.slow
@pytest.mark.kills
def test_interrupted_merges(outcome: dict[str, list[dict[str, object]]], share: int) -> None:
    stopped = [trial for trial in outcome["trials"] if trial["way"] == "interrupt"]
    for trial in stopped:
        assert (trial["code"], trial["before"]) in ((130, "nothing"), (130, "complete"), (0, "complete")), trial
        assert trial["left"] == 0, trial
        assert trial["after"] == "complete", trial
        assert trial["names"] == ["out"], trial
    assert Counter(trial["code"] for trial in stopped)[130] >= 20 // share


@pytest.mark.slow
@pytest.mark.kills
def test_killed_while_replacing(outcome: dict[str, list[dict[str, object]]]) -> None:
    for trial in outcome["forced"]:
        assert trial["before"] in ("nothing", "complete"), trial
        assert trial["rerun"] == 0, trial
        assert trial["after"] == "complete", trial
        assert trial["names"] == ["out"], trial


def one_sentence(error: str, match: str) -> None:
    lines = error.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert match in lines[0]
    assert len(lines) <= 2, error
    assert "Traceback" not in error


def test_a_limit_on_the_size_of_files(sizeable: Path, tmp_path: Path) -> None:
    """As `ulimit -f` sets it; each shard has 6 MB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    done = merge(sizeable / "base", sizeable / "adapter", "-o", tmp_path / "out", preexec_fn=limit)
    assert done.returncode == 1
    one_sentence(done.stderr, f"{tmp_path / 'out'}: file too large; nothing was written")
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts a file system of so many bytes; skip where that is not allowed."""
    mount = shutil.which("mount")
    if os.geteuid() != 0 or not mount:
        pytest.skip("only root can mount a small file system")
    place = tmp_path / "disk"
    mounted = []

    def make(size: int) -> Path:
        place.mkdir()
        made = subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=False)
        if made.returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(place)
        return place

    yield make
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_a_disk_too_small_for_the_weights(sizeable: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(8 << 20)
    done = merge(sizeable / "base", sizeable / "adapter", "-o", disk / "out")
    assert done.returncode == 1
    one_sentence(done.stderr, "the disk has")
    assert names(disk) == []


def test_a_disk_that_fills_up_on_the_way(sizeable: Path, small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    """There is room for the weights, but not for what comes along with them."""
    base = Path(shutil.copytree(sizeable / "base", tmp_path / "base"))
    (base / "vocab.txt").write_bytes(bytes(8 << 20))
    disk = small_disk(24 << 20)
    done = merge(base, sizeable / "adapter", "-o", disk / "out")
    assert done.returncode == 1
    one_sentence(done.stderr, "no space left on device; nothing was written")
    assert names(disk) == []


def test_another_file_system(sizeable: Path, small_disk: Callable[[int], Path], tmp_path: Path) -> None:
    disk = small_disk(64 << 20)
    assert merge(sizeable / "base", sizeable / "adapter", "-o", disk / "out").returncode == 0
    assert merge(sizeable / "base", sizeable / "adapter", "-o", tmp_path / "out").returncode == 0
    assert hashes(disk / "out") == hashes(tmp_path / "out")


def test_a_reader_that_went_away(sizeable: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [
        sys.executable,
        "-m",
        "loratools",
        "merge",
        sizeable / "base",
        sizeable / "adapter",
        "-o",
        tmp_path / "out",
    ]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=clean_env(), check=False)
    os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert names(tmp_path) == ["out"]  # the work was done before there was anything to say
    assert len(names(tmp_path / "out")) == len(names(sizeable / "base")) + 1


def test_no_stdout_at_all_and_a_full_one(sizeable: Path, tmp_path: Path, shell: Callable[..., Result]) -> None:
    line = f"loratools merge {sizeable}/base {sizeable}/adapter -q -o"
    closed = shell(f"{line} closed >&-", tmp_path)
    assert (closed.code, closed.err) == (0, "")
    full = shell(f"{line} full > /dev/full", tmp_path)
    assert full.code == 1
    one_sentence(full.err, "no space left on device")
    assert hashes(tmp_path / "closed") == hashes(tmp_path / "full")
