"""A run of the tests draws the same sample each time, and leaves no file behind."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_env
from tests.session import PREFIX

TESTS = """
import os, signal, subprocess, sys, tempfile
import pytest

@pytest.mark.sweep(3)
@pytest.mark.parametrize("number", range(50))
def test_number(number):
    print("number", number)

def test_files(tmp_path):
    (tmp_path / "x").write_text("x")
    tempfile.mkdtemp()

def test_a_killed_process():
    program = "import os, signal, tempfile; tempfile.mkdtemp(); os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL

def test_this_process():
    if "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run(folder: Path, *options: str, **environment: str) -> str:
    """Run TESTS with the hooks of tests/session.py and return what was printed; temporary files go to folder/tmp."""
    (folder / "tmp").mkdir(exist_ok=True)
    (folder / "test_x.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rP", "-p", "tests.session", "-p", "no:cacheprovider", *options, "."]
    env = clean_env() | {"TMPDIR": str(folder / "tmp")} | environment
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False).stdout


def numbers(printed: str) -> list[str]:
    return re.findall(r"^number (\d+)$", printed, re.MULTILINE)


@pytest.mark.slow
def test_a_sample_is_the_same_until_another_is_asked_for(tmp_path: Path) -> None:
    first, again, other = run(tmp_path), run(tmp_path), run(tmp_path, "--seed", "1")
    assert "6 passed, 47 deselected" in first
    assert "drawn with --seed 1" in other
    assert len(numbers(first)) == 3
    assert numbers(first) == numbers(again) != numbers(other)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--whole"], ["-n", "2"]], ids=["one process", "two"])
def test_a_run_leaves_no_file_not_even_of_killed_processes(tmp_path: Path, options: list[str]) -> None:
    printed = run(tmp_path, *options)
    assert ("53 passed" if options == ["--whole"] else "6 passed") in printed
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    assert "passed" not in run(tmp_path, KILL="1")
    assert [path.name.startswith(PREFIX) for path in (tmp_path / "tmp").iterdir()] == [True]
    assert "6 passed" in run(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []
