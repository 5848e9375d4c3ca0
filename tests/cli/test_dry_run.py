"""What --dry-run says of ranks, which only the numbers tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--sv-fro 0.9", "sv-fro 0.9"),
        ("--rank 3", "rank 3"),
        ("--energy 0.5 --uniform --max-rank 6", "energy 0.5, one rank for all modules, at most 6"),
        ("--budget 5000 --min-rank 2 --multiple-of 2", "a budget of 5000 parameters, at least 2, in multiples of 2"),
    ],
)
@pytest.mark.parametrize("verb", ["resize adapter", "combine adapter other"])
def test_ranks_are_said_in_words(shell: Callable, workplace: Path, verb: str, asked: str, said: str) -> None:
    done = shell(f"loratools {verb} -o out {asked} --dry-run --modules", workplace)
    assert done.code == 0, done.err
    rows = dict(row.split("  ", 1) for row in done.out.splitlines() if "  " in row and not row.startswith(" "))
    assert rows["ranks"].strip() == said
    assert rows["per module"].strip().startswith("not known: ranks need the singular values")
    assert "per module" not in shell(f"loratools {verb} -o out {asked} --dry-run", workplace).out
    assert not (workplace / "out").exists()
