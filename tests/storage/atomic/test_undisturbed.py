"""Signals wait until a few steps are done."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from loratools.storage.atomic.undisturbed import undisturbed


@pytest.fixture
def term() -> Iterator[object]:
    """SIGTERM as a program may handle it: it raises SystemExit."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    yield stop
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["int", "term"]
)
def test_a_signal_waits_for_the_end(number: int, raised: type[BaseException], term: object) -> None:
    steps = []

    def work() -> None:
        with undisturbed():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            steps.append("done")

    with pytest.raises(raised):
        work()
    assert steps == ["done"]
    assert signal.getsignal(signal.SIGTERM) is term
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_are_back_after_an_exception(term: object) -> None:
    with pytest.raises(ValueError, match="x"), undisturbed():
        raise ValueError("x")
    assert signal.getsignal(signal.SIGTERM) is term


def test_what_python_does_not_handle_is_left_alone() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with undisturbed():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)


def test_other_threads_are_undisturbed_anyway() -> None:
    seen = []

    def work() -> None:
        with undisturbed():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
