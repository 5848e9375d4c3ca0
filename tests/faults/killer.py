"""Run merges in forked processes and end them at chosen moments.

    python -m tests.faults.killer BASE ADAPTER FOLDER SEED SHARE

A moment is the n-th event of a merge: a file opened, truncated, renamed, made or deleted (Python's audit events), or a
positioned read, a write or a copy about to be made, a tile about to be passed from file to file, or something about to
be sent or received. Three ways to end:

    exact    the process kills itself at the event
    late     its parent kills it when it hears of the event, a little later, wherever it is by then
    interrupt  the process sends itself SIGINT, as Ctrl-C does

torch is imported once, here, and never used here: only the forked processes merge. One JSON document goes to stdout.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from loratools.linalg.native.tiles import Passage

WATCHED = ("open", "os.mkdir", "os.rename", "os.truncate", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree")


def hashes(folder: Path) -> dict[str, str]:
    """Return relative path -> sha256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def watch(event: Callable[[], None]) -> None:
    """Call `event` for each event from here on; for good, so only in a process that ends soon."""

    def wrapped(call: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            event()
            return call(*arguments)

        return counted

    for name in ("pwrite", "preadv", "copy_file_range"):
        if hasattr(os, name):
            setattr(os, name, wrapped(getattr(os, name)))
    Passage.rows = wrapped(Passage.rows)  # type: ignore[method-assign]
    for name in ("send", "sendall", "recv", "recv_into"):
        setattr(socket.socket, name, wrapped(getattr(socket.socket, name)))
    sys.addaudithook(lambda name, _: event() if name in WATCHED else None)


def fork(arguments: list[str], event: Callable[[], None], quiet: bool = True) -> int:
    """Start `loratools` with these arguments in a forked process; return its number."""
    from loratools.cli._run import run

    sys.stdout.flush()
    if process := os.fork():
        return process
    if quiet:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    watch(event)
    os._exit(run(arguments))


def ended(process: int) -> int:
    """Wait for a process; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def at(moment: int, action: Callable[[], None]) -> Callable[[], None]:
    """Return an event that acts at its n-th call."""
    from itertools import count

    counter = count(1)  # its next() is one step under the GIL, so threads cannot share a number

    def event() -> None:
        if next(counter) == moment:
            action()

    return event


def count_events(arguments: list[str]) -> tuple[int, int]:
    """Run to the end; return the exit code and the number of events."""
    reader, writer = os.pipe()
    process = fork(arguments, lambda: os.write(writer, b".") and None)
    os.close(writer)
    events = 0
    while piece := os.read(reader, 1 << 16):
        events += len(piece)
    os.close(reader)
    return ended(process), events


def stop(arguments: list[str], moment: int, way: str) -> int:
    """Run and end at a moment; return how it ended."""
    if way == "exact":
        return ended(fork(arguments, at(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))))
    if way == "interrupt":
        return ended(fork(arguments, at(moment, lambda: os.kill(os.getpid(), signal.SIGINT))))
    reader, writer = os.pipe()
    process = fork(arguments, at(moment, lambda: os.write(writer, b".") and None))
    os.close(writer)
    os.read(reader, 1)
    os.kill(process, signal.SIGKILL)
    os.close(reader)
    return ended(process)


def main(base: str, adapter: str, place: str, seed: int, share: int) -> dict[str, Any]:
    """Return what came of each trial: the way, the moment, the exit code, the state before and after a rerun.

    One in `share` of the 75 trials of a merge and of some 20 of a replacement is made.
    """
    import blake3  # noqa: F401
    import numpy  # noqa: F401
    import torch  # noqa: F401

    from loratools.cli._run import run

    chance, folder = random.Random(seed), Path(place)
    reference = folder / "reference"
    common = ["--quiet", "--threads", "2"]
    with redirect_stdout(StringIO()):  # imports everything else
        assert run(["merge", base, adapter, "-o", str(reference), "--dry-run", *common]) == 0
    code, events = count_events(["merge", base, adapter, "-o", str(reference), *common])
    assert code == 0, code
    right = hashes(reference)

    def state(target: Path) -> str:
        return "nothing" if not target.exists() else "complete" if hashes(target) == right else "BROKEN"

    trials = []
    ways = ["exact"] * (30 // share) + ["late"] * (20 // share) + ["interrupt"] * (25 // share)
    for way in ways:
        room = folder / "room"
        room.mkdir()
        target = room / "out"
        arguments = ["merge", base, adapter, "-o", str(target), *common]
        trial: dict[str, Any] = {"way": way, "moment": chance.randint(1, events)}
        trial["code"] = stop(arguments, trial["moment"], way)
        trial["before"], trial["left"] = state(target), len(list(room.iterdir())) - target.exists()
        trial["rerun"] = ended(fork(arguments, lambda: None))
        trial["after"], trial["names"] = state(target), sorted(path.name for path in room.iterdir())
        trials.append(trial)
        for path in sorted(room.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        room.rmdir()
    forced = []
    room = folder / "room"
    room.mkdir()
    arguments = ["merge", base, adapter, "-o", str(room / "out"), "--force", *common]
    assert ended(fork(arguments, lambda: None)) == 0
    _, events = count_events(arguments)
    moments = [*range(events - 40, events + 1, 3), *(chance.randint(1, events) for _ in range(6))]
    for moment in chance.sample(moments, len(moments) // share):
        before = stop(arguments, moment, "exact")
        states = state(room / "out")
        code = ended(fork(arguments, lambda: None))
        forced.append({
            "moment": moment, "code": before, "before": states, "rerun": code, "after": state(room / "out"),
            "names": sorted(path.name for path in room.iterdir()),
        })  # fmt: skip
    return {"events": events, "trials": trials, "forced": forced}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:4], *map(int, sys.argv[4:6]))))
