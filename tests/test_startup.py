"""What a command imports: a matter of modules, not of time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import clean_env

PROGRAM = """
import sys
before = set(sys.modules)
from loratools.__main__ import main
sys.argv = ["loratools", *sys.argv[1:]]
code = main()
import json
added = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps([code, sorted(added)]), file=sys.stderr)
"""


def imported(arguments: list[str], folder: Path) -> set[str]:
    """Run a command line in a fresh interpreter and return the top-level packages it imported, outside the stdlib."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=folder,
        env=clean_env(),
        capture_output=True,
        text=True,
        check=True,
    )
    code, added = json.loads(done.stderr.splitlines()[-1])
    assert code in (0, 1), done.stderr
    return set(added)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["inspect", "--help"], ["merge", "--help"], ["completion", "bash"]]
)
def test_help_imports_only_click(arguments: list[str], prepared: Path) -> None:
    added = imported(arguments, prepared)
    assert added == {"click", "loratools"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "adapter"],
        ["inspect", "sealed", "--modules"],
        ["inspect", "base", "--json"],
        ["validate", "sealed"],
        ["validate", "adapter"],
        ["validate", "sealed", "--base", "base"],
        ["hash", "base"],
        ["dialects"],
    ],
)
def test_header_only_commands_import_neither_torch_nor_numpy(arguments: list[str], prepared: Path) -> None:
    assert imported(arguments, prepared) <= {"click", "loratools", "blake3"}
