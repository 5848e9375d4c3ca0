"""Python's own `re` in a process of its own, which ends when a match takes too long: for expressions of strangers.

`re` cannot be stopped, and holds the interpreter while it works. This file is both sides: `Isolated` starts it as a
program, which reads a question a line and answers each with a line. The system ends it after a processor time (on
Windows, which has no such limits, the caller does after a while), and bounds its memory.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import warnings
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import subprocess

SECONDS_OF_WALL = 60.0
"""Time after which a process is ended that the system did not end: it may have waited for a processor."""

MEMORY = 1 << 30
"""Bytes of address space of the process; Python itself takes a hundredth of it."""


class Isolated:
    """A process that matches; started with the first question, ended with this value."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[str, int] = {}

    def ask(self, pattern: str, name: str | None, whole: bool, seconds: float) -> tuple[dict[str, str] | None, float]:
        """Return the named groups of a match (whole, as `fullmatch`, or the beginning), or None; and the seconds taken.

        `name` None only compiles. Raises `ValueError` with what `re` says of a wrong expression, `TimeoutError` where
        more than `seconds` of processor time, or too much memory, are needed.
        """
        number = self._known.get(pattern)
        question = [pattern if number is None else None, len(self._known) if number is None else number]
        answer = self._answer(json.dumps([*question, name, whole, seconds]))
        if answer is None:
            raise TimeoutError
        if error := answer.get("error"):
            raise ValueError(error)
        self._known.setdefault(pattern, len(self._known))
        return answer["groups"], answer["seconds"]

    def _answer(self, question: str) -> dict[str, Any] | None:
        """Return what the process answers; None where it ended instead."""
        process = self._started()
        guard = threading.Timer(SECONDS_OF_WALL, process.kill)
        guard.start()
        try:
            print(question, file=process.stdin, flush=True)
            line = process.stdout.readline() if process.stdout else ""
        except BrokenPipeError:
            line = ""
        finally:
            guard.cancel()
        if not line:
            _end(process)
            self._process, self._known = None, {}
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            import subprocess

            if not sys.executable:
                raise ValueError(
                    "only Python's re reads it, for which a process is needed, and no Python is known here"
                )
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
            )  # fmt: skip
            self._known = {}
            weakref.finalize(self, _end, self._process)
        return self._process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # what was written last was never read
            if pipe is not None:
                pipe.close()


def _serve() -> None:
    """Answer questions, one a line, until there are none."""
    warnings.simplefilter("ignore")
    limit = _limit()
    compiled: list[re.Pattern[str]] = []
    for line in sys.stdin:
        pattern, number, name, whole, seconds = json.loads(line)
        start = limit(seconds)
        try:
            if pattern is not None:
                made = re.compile(pattern)
                del compiled[number:]
                compiled.append(made)
            match = None
            if name is not None:
                match = (compiled[number].fullmatch if whole else compiled[number].match)(name)
            answer: dict[str, Any] = {"groups": None if match is None else match.groupdict()}
        except (re.error, RecursionError, OverflowError) as error:
            answer = {"error": str(error)}
        except MemoryError:
            return
        sys.stdout.write(json.dumps(answer | {"seconds": limit(0) - start}) + "\n")
        sys.stdout.flush()


def _limit() -> Any:
    """Bound the process; return what bounds the processor time that may pass until it is called next, and tells it."""
    import time

    try:
        import resource
        import signal
    except ImportError:  # Windows
        return lambda seconds: time.process_time()
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most), most))

    def limit(seconds: float) -> float:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
        return time.process_time()

    return limit


if __name__ == "__main__":
    _serve()
