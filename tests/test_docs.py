"""The README and the topics of `loratools help` are true: every fenced block in them is run.

    ```bash      set-up of a fresh machine: .ci/run runs these blocks, in order, in a fresh copy of the checkout
    ```console   lines after `$ ` are run here, in a folder with the tiny models of `prepared`, and print what stands
                 below them; `...` stands for whatever varies; a trailing `# exits with 1` says that they fail
    ```python    is run here, each block by itself, in the same folder
    ```yaml      is written there, as the file that its first line names: `# recipe.yaml`

Any other block fails. The blocks of a text share one folder, so a later one may use what an earlier one made; those of
a topic find `tour` there, as `loratools demo --keep tour` leaves it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from loratools.cli._run import group, run
from tests.conftest import REPOSITORY, Result, clean_env
from tests.test_floors import FLOORS

README, CONTRIBUTING = REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"
TOPICS = sorted((REPOSITORY / "loratools" / "cli" / "topics").iterdir())
MOST_WORDS = 1500
KINDS = {"bash", "console", "python", "yaml"}


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


@pytest.mark.parametrize("path", [README, *TOPICS], ids=lambda path: path.stem)
def test_blocks_are_of_kinds_that_are_run(path: Path) -> None:
    kinds = KINDS if path == README else KINDS - {"bash"}
    found = blocks(path.read_text(encoding="utf-8"))
    strange = [f"{path.name}:{b.line}: {b.kind or 'no kind'}" for b in found if b.kind not in kinds]
    assert not strange, strange


def test_the_readme_is_short() -> None:
    assert len(readme().split()) < MOST_WORDS


@pytest.fixture(scope="session")
def toured(shell: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `loratools demo --keep tour` leaves. Read only."""
    folder = tmp_path_factory.mktemp("toured")
    done = shell("loratools demo --keep tour", folder)
    assert done.code == 0, done.err
    return folder


def test_what_the_readme_shows(shell: Callable[..., Result], workplace: Path) -> None:
    check(README, shell, workplace)


@pytest.mark.parametrize("path", TOPICS, ids=lambda path: path.stem)
def test_what_a_topic_shows(path: Path, shell: Callable[..., Result], toured: Path, tmp_path: Path) -> None:
    check(path, shell, Path(shutil.copytree(toured, tmp_path / "here")))


def check(path: Path, shell: Callable[..., Result], folder: Path) -> None:
    """Run the blocks of a text in a folder; fail with each that does not do what stands below it."""
    wrong = []
    found = [block for block in blocks(path.read_text(encoding="utf-8")) if block.kind in ("console", "python", "yaml")]
    for block in found:
        where = f"{path.name}:{block.line}"
        if block.kind == "yaml":
            (folder / block.text.partition("\n")[0].removeprefix("# ")).write_text(block.text, encoding="utf-8")
            continue
        if block.kind == "python":
            done = subprocess.run(
                [sys.executable, "-W", "error", "-c", block.text], cwd=folder, env=clean_env(), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
            )  # fmt: skip
            if done.returncode:
                wrong.append(f"{where}: this Python block fails:\n{done.stdout}")
            continue
        for command, code, expected in commands(block):
            result = shell(f"exec 2>&1; {command}", folder)
            if result.code != code or not matches(expected, result.out):
                wrong.append(f"{where}: $ {command}\nexits with {result.code} and prints:\n{result.out}")
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("name", group().list_commands(click.Context(group())))
def test_every_command_is_documented(name: str) -> None:
    texts = [readme(), *(path.read_text(encoding="utf-8") for path in TOPICS)]
    assert any(re.search(rf"\bloratools {name}\b", text) for text in texts), f"no text shows `loratools {name}`"


@pytest.mark.parametrize("path", TOPICS, ids=lambda path: path.stem)
def test_topics_are_found_by_their_file_names(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert path.suffix == ".md"
    assert path.stem not in group().list_commands(click.Context(group())), "`help` prints the command's page"
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert run(["help", path.stem]) == 0
    assert capsys.readouterr().out == text
    assert run(["help"]) == 0
    assert f"{path.stem} " in (listed := capsys.readouterr().out)
    assert text.partition("\n")[0].removeprefix("# ") in listed
    mentioned = set(re.findall(r"loratools help (\w+)", readme()))
    assert path.stem in mentioned, f"README.md does not lead to `loratools help {path.stem}`"


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
        "How is a store read, how written?",
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
