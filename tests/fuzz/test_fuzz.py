"""A short run of every fuzzer, with all that they found once; `python -m tests.fuzz` runs longer."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.fuzz.harnesses import HARNESSES
from tests.fuzz.run import SEEDS, Found, execute, finds, inputs

RUNS = 200


@pytest.mark.parametrize("name", HARNESSES)
def test_sound_inputs_are_read(name: str) -> None:
    """What a harness begins with goes through: a harness that refuses everything would find nothing."""
    from tests.fuzz.run import read

    for data in HARNESSES[name].seeds():
        read(HARNESSES[name], data)


@pytest.mark.parametrize("name", HARNESSES)
def test_what_was_found_once(name: str) -> None:
    for data in finds(name):
        execute(HARNESSES[name], data)


@pytest.mark.parametrize("name", HARNESSES)
def test_inputs_without_sense(name: str, request: pytest.FixtureRequest) -> None:
    for data in islice(inputs(name, request.config.option.seed), RUNS):
        execute(HARNESSES[name], data)


def test_every_find_has_its_harness() -> None:
    assert {path.name for path in SEEDS.iterdir() if path.is_dir()} <= HARNESSES.keys()


def test_a_foreign_exception_and_a_late_answer_are_found() -> None:
    """The fuzzers themselves: a broken reader does not pass, whatever the process held before."""
    from tests.fuzz.harnesses import Harness

    def broken(data: bytes, folder: object) -> object:
        return {}[data]  # type: ignore[index]

    def large(data: bytes, folder: object) -> object:
        return bytearray(b"x" * 400_000_000)[0]

    assert len(bytearray(b"x" * 600_000_000)) == 600_000_000
    for read, sentence in ((broken, "KeyError"), (large, "[2-9][0-9][0-9] MB")):
        with pytest.raises(Found, match=sentence):
            execute(Harness(read, lambda: iter(())), b"x")
