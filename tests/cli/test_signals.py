"""SIGINT, SIGTERM and SIGHUP end a run alike, whenever they come; what is ignored stays ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from loratools.cli._signals import Handlers, Stopped, code_of
from tests.conftest import clean_env

PROGRAM = """
import os, re, signal, sys
moments = [moment.split(",") for moment in sys.argv[1].split(";")]
def hook(name, arguments):
    for moment in moments:
        event, part, *numbers = moment
        if name == event and any(re.search(part, str(argument)) for argument in arguments):
            moments.remove(moment)
            for number in numbers:
                os.kill(os.getpid(), int(number))
            return
sys.addaudithook(hook)
from loratools.cli import _signals
from loratools.__main__ import main
_signals._BURST = float(sys.argv[2])
sys.argv = ["loratools", *sys.argv[3:]]
sys.exit(main())
"""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MERGE = ["merge", "base", "adapter", "-o", "out", "-q"]
SAID = "error: interrupted; nothing half-written was left\n"

MOMENTS = {
    "first": ("import", "loratools.cli._run"),
    "click": ("import", "click"),
    "plan": ("import", "loratools.surgery.merge"),
    "scratch": ("os.mkdir", "partial-"),
    "weights": ("open", "partial-.*model-00002"),
    "record": ("open", "partial-.*README.md"),
    "tidy": ("shutil.rmtree", "partial-"),
    "rename": ("ctypes.dlsym", "rename"),
}
"""Moments of a merge: an audit event, and what one of its arguments is like."""


def at(moment: str, *numbers: int) -> str:
    """Say at which moment which signals come."""
    return ",".join([*MOMENTS[moment], *(str(int(number)) for number in numbers)])


def heard() -> None:
    """Let every signal end a process: who runs the tests under nohup has SIGHUP ignored in all of them."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(
    folder: Path, *moments: str, burst: float = 1.0, before: Callable[[], object] | None = None,
    first: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Merge, and have signals come at these moments."""
    command = [*first, sys.executable, "-c", PROGRAM, ";".join(moments), str(burst), *MERGE]
    return subprocess.run(
        command, cwd=folder, env=clean_env(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        preexec_fn=before,
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def place(prepared: Path, tmp_path: Path) -> Path:
    for name in ("base", "adapter"):
        (tmp_path / name).symlink_to(prepared / name)
    return tmp_path


ENDED = [
    ("first", signal.SIGINT), ("click", signal.SIGTERM), ("plan", signal.SIGHUP), ("scratch", signal.SIGTERM),
    *(("weights", number) for number in SIGNALS), ("record", signal.SIGHUP), ("rename", signal.SIGTERM),
]  # fmt: skip


@pytest.mark.parametrize(("moment", "number"), ENDED)
def test_a_merge_that_is_ended(moment: str, number: signal.Signals, place: Path) -> None:
    done = run(place, at(moment, number))
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == ("" if moment in ("first", "click") else SAID)
    # At the last moment the signal waits until the output is there, whole.
    assert names(place) == ["adapter", "base", *(["out"] if moment == "rename" else [])]
    assert moment != "rename" or len(names(place / "out")) == len(names(place / "base")) + 2


def test_a_closing_terminal_sends_several(place: Path) -> None:
    done = run(place, at("weights", signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
    assert done.returncode - 128 in SIGNALS, done.stderr
    assert done.stderr == SAID
    assert names(place) == ["adapter", "base"]


def test_a_later_signal_does_not_end_what_the_first_began(place: Path) -> None:
    """The second one comes while the folder is being removed."""
    done = run(place, at("weights", signal.SIGINT), at("tidy", signal.SIGTERM), burst=0)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert names(place) == ["adapter", "base"]


def test_what_is_ignored_stays_ignored(place: Path) -> None:
    """As SIGINT is in the background of a shell without job control."""
    done = run(place, at("weights", signal.SIGINT), before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert (done.returncode, done.stderr) == (0, "")
    assert names(place) == ["adapter", "base", "out"]


def test_nohup(place: Path) -> None:
    done = run(place, at("weights", signal.SIGHUP), first=["nohup"])
    assert done.returncode == 0, done.stderr
    assert names(place) == ["adapter", "base", "out"]


def test_handlers_are_there_while_the_block_runs_only() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Handlers():
        for later, number in enumerate(SIGNALS):
            with pytest.raises(Stopped) as caught:
                send(number, 10.0 * later)
            assert code_of(caught.value) == 128 + number
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert code_of(KeyboardInterrupt()) == 130


def send(number: signal.Signals, later: float) -> None:
    """Send this process a signal, so many seconds later by the clock of the handlers."""
    clock = time.monotonic
    try:
        time.monotonic = lambda: clock() + later
        os.kill(os.getpid(), number)
    finally:
        time.monotonic = clock


def test_a_signal_that_follows_at_once_is_the_same_wish() -> None:
    with Handlers():
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGINT)
