"""An input that changes between its opening and the end is an error, and there is no output."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from loratools.errors import BadFile
from loratools.storage import sources
from loratools.storage.atomic import inputs, new_folder
from loratools.surgery.combine import combine
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch
from loratools.surgery.unmerge import unmerge
from loratools.surgery.verify import verify


def rewritten(path: Path) -> None:
    """Other bytes, of as many."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))


def replaced(path: Path) -> None:
    """Another file of the same bytes and times."""
    before = path.stat()
    other = path.with_name(".other")
    shutil.copyfile(path, other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def longer(path: Path) -> None:
    before = path.stat()
    os.truncate(path, before.st_size + 8)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (rewritten, "time of change"), (replaced, "inode"), (longer, "size"), (Path.unlink, "no such file"),
    ],
)  # fmt: skip
def test_every_change_is_seen(tmp_path: Path, change: Callable[[Path], None], sentence: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345678")
    with inputs.watched():
        sources.open_file(path).close()
        inputs.check_unchanged()
        change(path)
        with pytest.raises(BadFile, match="1 input") as error, new_folder(tmp_path / "out") as scratch:
            (scratch / "y").touch()
    assert sentence in error.value.problems[0]
    assert str(path) in error.value.problems[0]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "x") == []


def test_our_own_files_may_change(tmp_path: Path) -> None:
    with inputs.watched(), new_folder(tmp_path / "out") as scratch:
        (scratch / "y").write_text("a")
        sources.open_file(scratch / "y").close()
        (scratch / "y").write_text("ab")
    assert (tmp_path / "out" / "y").read_text() == "ab"
    inputs.check_unchanged()  # of nothing that is watched


VERBS: dict[str, Callable[[Path, Callable[[int], None]], Any]] = {
    "merge": lambda w, progress: merge(w / "base", [w / "adapter"], w / "out", progress=progress),
    "combine": lambda w, progress: combine([w / "adapter", w / "other"], w / "out", progress=progress),
    "convert": lambda w, progress: convert(w / "adapter", w / "out", base=w / "base", progress=progress),
    "verify": lambda w, progress: verify(w / "new", w / "base", [w / "adapter"], progress=progress),
    "unmerge": lambda w, progress: unmerge(w / "new", [w / "adapter"], w / "out", progress=progress),
    "switch": lambda w, progress: switch(w / "new", [w / "adapter"], [w / "other"], w / "out", progress=progress),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_makes_nothing_of_an_input_that_changes(workplace: Path, verb: str) -> None:
    """Somebody saves the adapter anew while the verb works, which its progress tells."""
    path = workplace / "adapter" / "adapter_model.safetensors"
    merge(workplace / "base", [workplace / "adapter"], workplace / "new", keep_residual=True)
    lock, calls = Lock(), []

    def progress(count: int) -> None:
        with lock:
            calls.append(count)
            if len(calls) == 1:
                replaced(path)

    with pytest.raises(BadFile, match=r"inputs? changed while they were read") as error:
        VERBS[verb](workplace, progress)
    assert str(path) in error.value.problems[0]
    assert not (workplace / "out").exists()
    assert not [p for p in workplace.iterdir() if p.name.startswith(".") and not p.name.startswith(".gathered.part-")]
    VERBS[verb](workplace, lambda count: None)
