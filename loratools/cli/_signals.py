"""SIGINT, SIGTERM and SIGHUP: three ways to end a run, one way to tidy up; before anything else is imported."""

from __future__ import annotations

import signal
import time
from types import FrameType

_ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # Windows has the last in place of SIGHUP
_BURST = 1.0
"""Seconds within which further signals are the same wish: a closing terminal sends several, its shell some more."""


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end has come; it unwinds every block, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.code = 128 + number


class Handlers:
    """Handlers that raise `Stopped` in the main thread while the block runs; what is ignored stays ignored.

    `nohup` has SIGHUP ignored, and a shell without job control the SIGINT of what it runs in the background.
    """

    def __init__(self) -> None:
        self._before: dict[int, object] = {}
        self._last = -_BURST

    def __enter__(self) -> None:
        numbers = [number for name in _ENDING if (number := signal.Signals.__members__.get(name))]
        for number in numbers:
            before = signal.getsignal(number)
            if before in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = before
                signal.signal(number, self._stop)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]

    def _stop(self, number: int, _: FrameType | None) -> None:
        # The first one may get lost where C code drops exceptions, so a later one is not ignored for good.
        now = time.monotonic()
        if now - self._last >= _BURST:
            self._last = now
            raise Stopped(number)


def code_of(error: BaseException) -> int:
    """Return the exit code for what interrupted a run: 128 and the number of the signal."""
    return error.code if isinstance(error, Stopped) else 128 + signal.SIGINT
