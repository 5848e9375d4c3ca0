"""`-v` says what was decided, and why; without it nobody hears of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import loratools
from tests.conftest import Result

READ = r"adapter: dialect peft: .+"
PLACED = (
    r"4 modules change 4 tensors of the base; model\.layers\.0\.self_attn\.q_proj is "
    r"model\.layers\.0\.self_attn\.q_proj\.weight, rows 0:64 and columns 0:64 of 64 x 64"
)


@pytest.mark.parametrize(
    ("command", "decisions"),
    [
        ("merge base adapter -o out", [READ, PLACED, r"arithmetic on cpu: \d tensors in C, \d in torch.*"]),
        ("convert adapter -o out --base base", [READ, PLACED, r"sealed with base: the digests of 4 of its 21 tensors"]),
        (
            "verify merged --base base --adapter adapter --seed 0",
            [READ, PLACED, r"4 tensors change: 16 columns and 16 random probes of seed 0 of each are compared; 17 .*"],
        ),
    ],
)
def test_what_is_decided(command: str, decisions: list[str], shell: Callable[..., Result], workplace: Path) -> None:
    told = shell(f"loratools {command} -v", workplace)
    assert told.code == 0, told.err
    lines = told.err.splitlines()
    quiet = shell(f"rm -rf out; loratools {command}", workplace)
    assert quiet.out == told.out
    for decision in decisions:
        assert any(re.fullmatch(decision, line) for line in lines), told.err
        assert not any(re.fullmatch(decision, line) for line in quiet.err.splitlines())


COMMANDS = (
    "inspect adapter", "inspect adapter --spectrum", "hash base", "hash adapter", "compare adapter other",
    "combine adapter other --rank 2 -o out", "resize adapter --rank 2 -o out", "extract-svd base tuned -o out",
    "dequantize quantized -o out", "merge base adapter -o out", "unmerge merged adapter -o out",
    "switch merged --take adapter --put other -o out", "convert adapter -o out --base base",
    "verify merged --base base --adapter adapter --seed 0",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_twice_says_it_of_every_tensor(command: str, shell: Callable[..., Result], workplace: Path) -> None:
    line = f"rm -rf out; loratools {command}"
    quiet, once, twice = (shell(f"{line} {option}", workplace) for option in ("", "-v", "-vv"))
    assert (quiet.code, once.code, twice.code) == (0, 0, 0), twice.err
    lines = [{re.sub(r"partial-\w+", "", line) for line in told.err.splitlines()} for told in (quiet, once, twice)]
    assert lines[0] < lines[1] < lines[2]
    added = [line for line in twice.err.splitlines() if line not in once.err.splitlines()]
    assert sum("q_proj" in line for line in added) >= 2, added


def test_a_program_hears_it_from_the_logger(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loratools"):
        loratools.open_adapter(workplace / "adapter")
    (record,) = caplog.records
    assert record.name == "loratools"
    assert re.fullmatch(f".*{READ}", record.getMessage())
