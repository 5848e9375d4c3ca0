"""The README is true: every fenced block in it is run.

    ```bash      set-up of a fresh machine: .ci/run runs these blocks, in order, in a fresh copy of the checkout
    ```console   lines after `$ ` are run here, in a folder with the tiny models of `prepared`, and print what stands
                 below them; `...` stands for whatever varies; a trailing `# exits with 1` says that they fail
    ```python    is run here, each block by itself, in the same folder

Any other block fails. The blocks share one folder, so a later one may use what an earlier one made.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from loratools.cli._run import group
from tests.conftest import REPOSITORY, Result, clean_env
from tests.test_floors import FLOORS

README, CONTRIBUTING = REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"


@dataclass(frozen=True)
class Block:
    """A fenced block: its kind, its text, and the line of the README it begins on."""

    kind: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a Markdown text."""
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1].strip(), m[2], text.count("\n", 0, m.start()) + 1) for m in found]


def commands(block: Block) -> list[tuple[str, int, str]]:
    """Return (command, exit code, expected output) of a console block; a backslash continues a command."""
    pieces = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not pieces[0].strip(), f"README.md:{block.line}: output before the first command"
    found = []
    for piece in pieces[1:]:
        match = re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", piece, re.DOTALL)
        assert match
        command, expected = match.groups()
        code = re.search(r"# exits with (\d+)", command)
        found.append((command, int(code[1]) if code else 0, expected))
    return found


def matches(expected: str, actual: str) -> bool:
    """Tell whether the output is the one expected, up to space at the ends of lines; `...` stands for anything."""
    clean = ["\n".join(line.rstrip() for line in text.splitlines()).strip() for text in (expected, actual)]
    pattern = ".*?".join(map(re.escape, clean[0].split("...")))
    return re.fullmatch(pattern, clean[1], re.DOTALL) is not None


def readme() -> str:
    assert README.is_file(), "README.md is missing: it documents every command, and this test runs what it says"
    return README.read_text(encoding="utf-8")


def test_blocks_are_of_kinds_that_are_run() -> None:
    strange = [f"README.md:{b.line}: {b.kind or 'no kind'}" for b in blocks(readme()) if b.kind not in KINDS]
    assert not strange, strange


def test_what_the_console_shows(shell: Callable[..., Result], workplace: Path) -> None:
    wrong = []
    found = [block for block in blocks(readme()) if block.kind in ("console", "python")]
    assert any(block.kind == "console" for block in found)
    for block in found:
        if block.kind == "python":
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", block.text], cwd=workplace, env=clean_env(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
            if done.returncode:
                wrong.append(f"README.md:{block.line}: this Python block fails:\n{done.stdout}")
            continue
        for command, code, expected in commands(block):
            result = shell(f"exec 2>&1; {command}", workplace)
            if result.code != code or not matches(expected, result.out):
                wrong.append(f"README.md:{block.line}: $ {command}\nexits with {result.code} and prints:\n{result.out}")
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("name", group().list_commands(click.Context(group())))
def test_every_command_is_documented(name: str) -> None:
    assert re.search(rf"\bloratools {name}\b", readme()), f"README.md does not show `loratools {name}`"


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the rows under a heading of a Markdown table."""
    table = text.partition(heading)[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_a_newcomers_walk_leads_there() -> None:
    walk = rows(CONTRIBUTING.read_text(encoding="utf-8"), "| question | file | name |")
    assert [question for question, _, _ in walk if question] == [
        "Where is TIES?",
        "Where is kohya's naming?",
        "Where are the bytes written?",
        "Where is the base compared?",
        "How do I add a kind?",
    ]
    for _, file, name in walk:
        assert name.strip("`") in (REPOSITORY / file.strip("`")).read_text(encoding="utf-8"), f"{file}: no {name}"


def test_the_floors_are_those_that_are_kept() -> None:
    table = rows(CONTRIBUTING.read_text(encoding="utf-8"), "| floor | folder | what |")
    listed = {int(floor): set(re.findall(r"`(\w+)(?:/|\.py)`", folders)) for floor, folders, _ in table}
    kept = {floor: set(names.split()) for floor, names in enumerate(FLOORS["loratools"])}
    assert listed == kept


def test_this_test_can_fail() -> None:
    text = "a\n```console\n$ loratools \\\n    --version\nloratools ...\n$ false  # exits with 1\n```\n```\nx\n```\n"
    first, second = blocks(text)
    assert (first.kind, first.line, second.kind, second.line) == ("console", 2, "", 8)
    assert commands(first) == [
        ("loratools \\\n    --version", 0, "loratools ...\n"),
        ("false  # exits with 1", 1, ""),
    ]
    assert matches("a ... c", "a b\nb c  \n")
    assert not matches("a ... c", "a b")
    assert not matches("a", "a\nb")
    assert not matches("", "warning")


KINDS = {"bash": ".ci/run", "console": "here", "python": "here"}
