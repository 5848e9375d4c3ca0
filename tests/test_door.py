"""The front door, `loratools/__init__.py`: its lists agree, its page is true, and checkers see through it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

import click
import pytest

import loratools
from loratools.cli._run import group
from tests.conftest import REPOSITORY, clean_env

PAGE = loratools.__doc__ or ""
NAMES = {"dialects": "list_dialects", "demo": "run_demo", "extract-svd": "extract_svd"}
"""Commands whose function has another name: a package bears the command's, or Python does not allow it."""

SCRIPT = """\
from pathlib import Path
import loratools
adapter = loratools.open_adapter(Path("adapter"))
rank = adapter.updates["model.layers.0.self_attn.q_proj"].rank
report = loratools.merge("base", adapter, "merged", weights=0.5, dtype="bf16", max_shard_size="5GB")
assert report.changed > rank and loratools.verify("merged", "base", ["hf://lab/adapter"], weights=[0.5]).ok
loratools.unmerge("merged", [adapter], "unmerged", base="base")
loratools.switch("merged", ["adapter"], [Path("other"), adapter], "switched", check_base="warn")
loratools.push("merged", "lab/merged", private=True)
digests: str | None = loratools.hash(loratools.Checkpoint.open("base")).root
"""
CONFIG = """\
[mypy]
strict = true
[mypy-loratools.*]
ignore_errors = true
[mypy-torch.*,numpy.*]
follow_imports = skip
"""
"""Of an installed package mypy shows no errors, only the user's. torch and numpy would take it minutes."""

WRONG = {
    'private=True)': ('privat=True)', 'Unexpected keyword argument "privat" for "push"'),
    'max_shard_size="5GB"': ("max_shard_size=[5]", 'Argument "max_shard_size" to "merge" has incompatible type'),
    "loratools.unmerge(": ("loratools.unmrege(", 'Module has no attribute "unmrege"'),
    'check_base="warn"': ('check_base="loud"', 'Argument "check_base" to "switch" has incompatible type'),
    'str | None =': ("int =", 'expression has type "str | None", variable has type "int"'),
}  # fmt: skip


def declared() -> tuple[dict[str, str], dict[str, str]]:
    """Return the names that checkers see, and those that are there at run time, each with where it comes from."""
    tree = ast.parse((REPOSITORY / "loratools" / "__init__.py").read_text(encoding="utf-8"))
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    home = next(node for node in branch.orelse if isinstance(node, ast.Assign))
    return seen, ast.literal_eval(home.value)


def test_checkers_and_python_see_the_same_names() -> None:
    seen, there = declared()
    assert seen == there
    assert loratools.__all__ == sorted([*there, "__version__"])
    assert list(there) == sorted(there)


@pytest.mark.parametrize("command", group().list_commands(click.Context(group())))
def test_every_command_is_a_function(command: str) -> None:
    if command != "completion":
        assert callable(getattr(loratools, NAMES.get(command, command)))


def test_no_package_bears_the_name_of_a_public_name() -> None:
    # importing it would put the package in the place of the function
    assert not {module.name for module in iter_modules(loratools.__path__)} & set(loratools.__all__)


def test_the_page_names_everything_in_a_line_each() -> None:
    listed = re.findall(r"^    ([a-zA-Z_.]+(?:, [a-z_]+)*)  +\S", PAGE, re.MULTILINE)
    named = {name.split(".")[0] for line in listed for name in line.split(", ")}
    other_names = {"extract", "hash_checkpoint", "LoraToolsError", "Adapter", "__version__"}
    assert named == set(loratools.__all__) - other_names
    assert all(len(line) <= 120 for line in PAGE.splitlines())


def test_the_first_example_runs(workplace: Path) -> None:
    example = re.search(r"A first example:\n\n((?:    .*\n|\n)+)", PAGE)
    assert example
    code = re.sub(r"^    ", "", example[1], flags=re.MULTILINE)
    assert code.count("loratools.") == 4
    for made in ("sealed", "merged"):
        shutil.rmtree(workplace / made)
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=workplace, env=clean_env(), check=True)


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy_finds_what_is_wrong_in_a_users_script_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(SCRIPT)
    wrong = SCRIPT
    for right, (other, _) in WRONG.items():
        assert wrong.count(right) == 1
        wrong = wrong.replace(right, other)
    (tmp_path / "wrong.py").write_text(wrong)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "right.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "MYPYPATH": str(REPOSITORY)},
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    for other, message in WRONG.values():
        line = next(number for number, text in enumerate(wrong.splitlines(), 1) if other in text)
        assert any(error.startswith(f"wrong.py:{line}: ") and message in error for error in errors), done.stdout
    assert len(errors) == len(WRONG), done.stdout
