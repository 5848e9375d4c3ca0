"""A hundred files of strangers who mean harm: each is answered with its sentence, within limits of time and memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.make.hostile import cases

SECONDS, MEMORY = 60, 3 << 30
"""Limits of the process: its processor time, and its memory beyond what it starts with. Linear work needs a part."""


@pytest.mark.fuzz(12)
@pytest.mark.parametrize("name", sorted(cases()))
def test_a_stranger_is_answered(tmp_path: Path, shell: Callable[..., Any], name: str) -> None:
    case = cases()[name]
    case.make(tmp_path)
    result = shell(f"loratools {case.command}", tmp_path, LIMITS=f"{SECONDS} {MEMORY}")
    printed = result.out + result.err
    assert "internal error" not in printed
    assert "not enough memory" not in printed
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", printed)
    assert len(printed) < 1_000_000
    if case.sentence is None:
        assert result.code == 0, printed[-2000:]
        return
    assert result.code == 1, printed[-2000:]
    assert re.search(case.sentence, printed), printed[-2000:]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out", "sealed"))]
