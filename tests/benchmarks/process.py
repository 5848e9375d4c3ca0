"""Whole processes, timed from outside: wall and processor seconds, and peak resident memory of each run."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Runs:
    """What several runs of one command took."""

    seconds: tuple[float, ...]
    peak: int
    processor: float
    """The least processor time of a run, in seconds of all threads."""

    @property
    def wall(self) -> float:
        """Median wall time in seconds."""
        return median(self.seconds)

    @property
    def quickest(self) -> float:
        """Least wall time in seconds."""
        return min(self.seconds)


def environment() -> dict[str, str]:
    """Return the variables of a measured process: this checkout's code, no network, and compiled modules kept.

    An installed package has compiled modules. A checkout in which Python may not keep them compiles at each start,
    which takes longer than all else that a start does.
    """
    own = {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | own


def measure(words: Sequence[object]) -> tuple[float, int]:
    """Run a command to its end; return wall seconds and peak resident bytes. Raise if it fails."""
    return measure_all(words)[:2]


def measure_all(words: Sequence[object], accepts: Sequence[int] = (0,)) -> tuple[float, int, float]:
    """Do what `measure` does; return the processor seconds too. `accepts` are the exit codes that are no failure."""
    command = [str(word) for word in words]
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    assert process.stderr is not None
    stderr = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in accepts:
        raise RuntimeError(f"{' '.join(command)} failed:\n{stderr.decode(errors='replace')}")
    return seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def warm(folder: Path) -> None:
    """Read a file, or all below a folder, so that it is in the page cache: a large process may have pushed it out."""
    piece = bytearray(1 << 24)
    for file in [folder, *folder.rglob("*")]:
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(piece):
                    pass


def alternate(
    commands: Mapping[str, Sequence[object]], count: int, prepare: Callable[[], None],
    inputs: Mapping[str, Sequence[Path]] = {}, accepts: Sequence[int] = (0,),
) -> dict[str, Runs]:  # fmt: skip
    """Run every command in turn, `count` times after one warm-up, so that a drift of the machine meets all alike.

    With a count of 0 each runs once, and that is what counts: for what takes minutes.

    `inputs` are folders and files that are read before the command of that name, to be in the page cache; `accepts`
    are the exit codes that are no failure.
    """
    taken: dict[str, list[tuple[float, int, float]]] = {name: [] for name in commands}
    for turn in range(count + 1):
        for name, command in commands.items():
            prepare()
            for read in inputs.get(name, ()):
                warm(read)
            measured = measure_all(command, accepts)
            if turn or not count:
                taken[name].append(measured)
    prepare()
    return {
        name: Runs(tuple(s for s, _, _ in runs), max(p for _, p, _ in runs), min(c for _, _, c in runs))
        for name, runs in taken.items()
    }
