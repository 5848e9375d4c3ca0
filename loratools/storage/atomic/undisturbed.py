"""A few steps that a signal shall not tear apart: tidying up, and the moment at which an output appears."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = tuple(
    number for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if (number := signal.Signals.__members__.get(name))
)  # Windows has the first two and the last


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put off the signals that end a program, where Python handles them, until the block is done; then they act.

    Impatient users press Ctrl-C twice, and a closing terminal sends several signals: the second must not end what the
    first began. In other threads than the main one nothing is done, for signals do not reach them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: handler for number in _SIGNALS if callable(handler := signal.getsignal(number))}
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
