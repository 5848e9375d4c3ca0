"""An interrupted merge goes on from the files that are complete, and gives the bytes of one that never was."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Lock

import pytest
import torch

from loratools.decisions import warnings_to
from loratools.errors import OutputRefused, WrongBase
from loratools.storage import atomic
from loratools.surgery.merge import merge
from tests.conftest import clean_env
from tests.surgery.models import lora, random, save_adapter, save_base

SHAPES = {f"m{i}": (64, 96) for i in range(6)}
SIZE = 2 * 64 * 96


class Interrupt:
    """A progress that presses Ctrl-C once so many bytes are done."""

    def __init__(self, after: int) -> None:
        self.left, self._lock = after, Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self.left -= count
            if self.left < 0:
                raise KeyboardInterrupt


def prepare(folder: Path) -> tuple[Path, Path]:
    """Save a base of three shards, and an adapter for all its matrices."""
    weights = {f"m{i}.weight": random(64, 96, seed=i, dtype=torch.bfloat16) for i in range(6)}
    return save_base(folder / "base", weights, shards=3), save_adapter(folder / "adapter", lora(SHAPES))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def leftovers(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("shards", [1, 2])
def test_goes_on_from_complete_files(shards: int, tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    whole = merge(base, [adapter], tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        merge(base, [adapter], tmp_path / "out", resume=True, threads=1, progress=Interrupt(2 * SIZE * shards + SIZE))
    assert not (tmp_path / "out").exists()
    assert len(leftovers(tmp_path)) == 1
    found = merge(base, [adapter], tmp_path / "out", resume=True)
    assert len(found.reused) == shards
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert (found.retention, found.by_tensor, found.changed) == (whole.retention, whole.by_tensor, whole.changed)
    assert leftovers(tmp_path) == []


def test_a_killed_merge_goes_on(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    program = f"""
import os, signal
from loratools.surgery.merge import merge
done = 0
def progress(count):
    global done
    done += count
    if done > {3 * SIZE}:
        os.kill(os.getpid(), signal.SIGKILL)
merge({str(base)!r}, [{str(adapter)!r}], {str(tmp_path / "out")!r}, resume=True, threads=1, progress=progress)
"""
    done = subprocess.run([sys.executable, "-c", program], env=clean_env(), check=False)
    assert done.returncode == -signal.SIGKILL
    found = merge(base, [adapter], tmp_path / "out", resume=True)
    assert len(found.reused) == 1
    merge(base, [adapter], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        merge(base, [adapter], tmp_path / "out", resume=True, threads=1, progress=Interrupt(5 * SIZE))
    kept = sorted(leftovers(tmp_path)[0].glob("*.safetensors"))
    with kept[0].open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    found = merge(base, [adapter], tmp_path / "out", resume=True)
    assert len(found.reused) == 1
    merge(base, [adapter], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("other", ["weights", "base"])
def test_another_merge_does_not_go_on_from_it(other: str, tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        merge(base, [adapter], tmp_path / "out", resume=True, threads=1, progress=Interrupt(5 * SIZE))
    if other == "base":
        os.utime(base / "model-00001-of-00003.safetensors", (1, 1))
    found = merge(base, [adapter], tmp_path / "out", resume=True, weights=[0.5 if other == "weights" else 1.0])
    assert found.reused == ()
    assert leftovers(tmp_path) == []


def test_without_resume_nothing_is_left_and_leftovers_go(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    for resume, count in ((True, 1), (False, 0)):
        with pytest.raises(KeyboardInterrupt):
            merge(base, [adapter], tmp_path / "out", resume=resume, threads=1, progress=Interrupt(3 * SIZE))
        assert len(leftovers(tmp_path)) == count


def test_an_error_that_would_come_again_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(WrongBase), atomic.new_folder(target, key="0123456789"):
        raise WrongBase("no")
    assert leftovers(tmp_path) == []


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic.new_folder(target, key="0123456789") as first:
        (first / "file").write_text("mine")
        with pytest.raises(OutputRefused, match="another process"), atomic.new_folder(target, key="0123456789"):
            pass
        assert (first / "file").read_text() == "mine"
    assert (target / "file").read_text() == "mine"
    shutil.rmtree(target)


def test_what_is_kept_is_said(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    warnings: list[str] = []
    with warnings_to(warnings.append):
        with pytest.raises(KeyboardInterrupt):
            merge(base, [adapter], tmp_path / "out", resume=True, threads=1, progress=Interrupt(5 * SIZE))
        (kept,) = leftovers(tmp_path)
        assert warnings.pop().startswith(f"2 of 3 files of tensors complete, kept in {kept}: the same call")
        shard = kept / "model-00001-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        found = merge(base, [adapter], tmp_path / "out", resume=True)
        assert warnings == [f"resumed: {shard.name} changed since it was written, and is written anew"]
    assert found.reused == ("model-00002-of-00003.safetensors",)
    (said,) = [note for note in found.notes if note.startswith("resumed")]
    assert said.startswith("resumed: 1 of 3 files of tensors kept: each has the blake3 digest that was taken down")
    merge(base, [adapter], tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_is_not_gone_on_from_is_said(tmp_path: Path) -> None:
    base, adapter = prepare(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        merge(base, [adapter], tmp_path / "out", resume=True, threads=1, progress=Interrupt(5 * SIZE))
    (kept,) = leftovers(tmp_path)
    warnings: list[str] = []
    with warnings_to(warnings.append):
        found = merge(base, [adapter], tmp_path / "out", resume=True, weights=2)
    assert warnings[0].startswith(f"{kept.name}: an interrupted merge with other inputs or options left it")
    assert found.reused == ()
    assert leftovers(tmp_path) == []
