"""Every example in the help of every command is run, on tiny real files with the names that the examples use."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from loratools.cli._run import group
from tests.cli.test_schemas import assert_valid
from tests.hub.server import LocalHub
from tests.hub.server.client import environment
from tests.hub.trips import contents

ROOT = group()
CONTEXT = click.Context(ROOT)
COMMANDS = ROOT.list_commands(CONTEXT)


def examples(help_text: str) -> list[str]:
    """Return the lines under `Examples:`, without the remark that three spaces set apart."""
    block = re.search(r"Examples:\n((?: +.*\n?)+)", help_text)
    return [re.split(r"\s{3,}", line.strip())[0] for line in block[1].splitlines()] if block else []


@pytest.fixture(scope="module")
def lab(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which examples find lab/base and lab/adapter on a Hub of their own."""
    home = tmp_path_factory.mktemp("lab")
    with LocalHub(home / "hub") as hub:
        licensed = {"README.md": b"---\nlicense: apache-2.0\n---\n"}
        hub.seed("lab/base", contents(prepared / "base") | licensed)
        hub.seed("lab/adapter", contents(prepared / "adapter"))
        names = environment(hub, home / "home")
        yield {name: value for name, value in names.items() if name.startswith("HF_")}


def output(example: str) -> str:
    """Return what an example makes, which must not be there yet: `-o merged`."""
    return " ".join(re.findall(r"-o (\S+)", example))


def of_all_commands() -> list[tuple[str, str]]:
    found = [("loratools", ROOT.help or "")]
    found += [(name, command.help or "") for name in COMMANDS if (command := ROOT.get_command(CONTEXT, name))]
    return [(name, example) for name, text in found for example in examples(text)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_of_itself(name: str) -> None:
    command = ROOT.get_command(CONTEXT, name)
    assert command is not None
    assert any(f"loratools {name}" in example for example in examples(command.help or ""))


@pytest.mark.parametrize(("name", "example"), of_all_commands(), ids=lambda value: value)
def test_example_runs(name: str, example: str, shell: Callable, workplace: Path, lab: dict[str, str]) -> None:
    done = shell(f"rm -rf {output(example)}; {example}", workplace, **lab)
    assert done.code == 0, done.err or done.out
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("name", "example"),
    [(name, line) for name, line in of_all_commands() if name != "loratools" and line.startswith("loratools ")],
    ids=lambda value: value,
)
def test_example_prints_json_of_the_schema(
    name: str, example: str, shell: Callable, workplace: Path, lab: dict[str, str]
) -> None:
    """One document, or of several inputs one a line."""
    line = example.partition(">")[0]
    done = shell(f"rm -rf {output(line)}; {line} --json", workplace, **lab)
    assert done.code == 0
    assert done.err == ""  # with --run too, where transformers and what it imports would talk
    documents = [done.out] if done.out.startswith("{\n") else done.out.splitlines()
    assert len(documents) > ("--each" in example)
    for document in documents:
        assert_valid(name, json.loads(document))
