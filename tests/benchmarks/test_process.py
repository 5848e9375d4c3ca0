"""What is measured starts as an installed package does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.benchmarks.process import environment


def test_a_measured_process_keeps_its_compiled_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    told = [sys.executable, "-c", "import sys; print(sys.dont_write_bytecode)"]
    assert subprocess.run(told, env=environment(), capture_output=True, text=True, check=True).stdout == "False\n"
