"""Execute an input, and find foreign exceptions, more than a second, and more than 200 MB."""

from __future__ import annotations

import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from loratools.decisions import warnings_to
from loratools.errors import LoraToolsError
from tests.faults import mutate
from tests.fuzz.harnesses import HARNESSES, Harness

SEEDS = Path(__file__).with_name("seeds")
SECONDS, KILOBYTES = 1.0, 200_000

TOKENS = [
    b"0", b"-1", b"-0", b"1e999", b"18446744073709551616", b"9" * 40, b"null", b"true", b"[]", b"{}", b'""', b"\\u0000",
    b"\\ud800", b"..", b"/", b"\x00", b"\xff", b"\x80", b"\n", b"((a+)+)+$", b"*", b"a" * 300, b"a." * 60,
    (2**62).to_bytes(8, "little"), (2**63).to_bytes(8, "little"), (2**32 - 1).to_bytes(4, "little"), bytes(8),
]  # fmt: skip


class Found(AssertionError):
    """An input that is answered with something else than a sentence, or too late."""


def read(harness: Harness, data: bytes) -> object:
    """Read one input, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="loratools-fuzz-"))
    try:
        with warnings_to(lambda text: None):
            return harness.read(data, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def execute(harness: Harness, data: bytes) -> None:
    """Read one input; raise `Found`."""
    held, start = restarted_peak(), time.process_time()
    try:
        read(harness, data)
    except LoraToolsError as error:
        str(error)
    except Exception as error:
        raise Found(f"{type(error).__name__}: {error}") from error
    seconds = time.process_time() - start
    grown = peak() - held
    if seconds > SECONDS or grown > KILOBYTES:
        raise Found(f"{len(data)} bytes took {seconds:.1f} s and {grown // 1000} MB")


def restarted_peak() -> int:
    """Return the kilobytes that this process holds, having the kernel count its peak from now on.

    Or what an earlier test held would hide what this one takes. Elsewhere than on Linux the peak is that of all time.
    """
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Return the most kilobytes that this process has held since the peak was restarted."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def finds(name: str) -> list[bytes]:
    """Return what was found once with a harness, in the order of the names."""
    return [path.read_bytes() for path in sorted((SEEDS / name).glob("*")) if path.is_file()]


def inputs(name: str, seed: int) -> Iterator[bytes]:
    """Yield inputs without end: made of the seeds, of what was found, and of each other."""
    chance = random.Random(f"{seed} {name}")
    corpus = [*HARNESSES[name].seeds(), *finds(name)]
    while True:
        data = chance.choice(corpus)
        for _ in range(chance.choice([1, 1, 1, 2, 3, 6])):
            data = change(data, chance) or data
        yield data


def change(data: bytes, chance: random.Random) -> bytes:
    """Damage an input once: its bits, its tokens, its numbers, its order."""
    if len(data) < 2:
        return chance.choice(TOKENS)
    kind = chance.randrange(7)
    if kind < 4:
        return mutate.ANY[kind](data, chance) if kind or chance.random() < 0.3 else mutate.flip(data, chance)
    at = chance.randrange(len(data))
    if kind == 4:
        return data[:at] + chance.choice(TOKENS) + data[at + chance.choice([0, 1, 4, 8]) :]
    if kind == 5:
        marks = [i for i, byte in enumerate(data[:20_000]) if byte in b'0123456789{}[]:,"']
        at = chance.choice(marks) if marks else at
        return data[:at] + chance.choice(TOKENS) + data[at + 1 :]
    other = chance.randrange(len(data))
    size = chance.randrange(1, 64)
    return data[:at] + data[other : other + size] + data[at + size * chance.randrange(2) :]
