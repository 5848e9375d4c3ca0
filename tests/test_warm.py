"""`loratools` started the quick way of tests/warm.py does what it does started as usual."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Result

LINES = (
    "loratools --version",
    "loratools inspect adapter --json",
    "loratools inspect missing",
    "loratools compare adapter other",
    "loratools merge base adapter -o new -q && ls new",
    "loratools hash base | head -c 10",
    "loratools hash base >&-",
    "loratools hash base 2>&- > hashes; wc -c hashes",
    "cd base && loratools inspect .",
    "LORATOOLS_JSON=1 loratools hash base --tier schema",
)


@pytest.mark.parametrize("line", LINES)
def test_it_prints_the_same_and_exits_alike(line: str, shell: Callable[..., Result], workplace: Path) -> None:
    warm = shell(line, workplace)
    shutil.rmtree(workplace / "new", ignore_errors=True)
    assert warm == shell(line, workplace, COLD="1")
