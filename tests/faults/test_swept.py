"""What a killed run left goes with the next command that has the same output, also with one that fails at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import loratools
from loratools.cli._run import run
from loratools.errors import LoraToolsError

COMMANDS = {
    "merge": "merge missing missing -o {out}",
    "merge, a wrong option": "merge base adapter --threads 0 -o {out}",
    "merge, nothing given": "merge -o {out}",
    "merge, the output is there": "merge base adapter -o {there}",
    "merge, only planned": "merge missing missing -o {out} --dry-run",
    "unmerge": "unmerge missing adapter -o {out}",
    "switch": "switch missing --take adapter --put adapter -o {out}",
    "combine": "combine missing missing -o {out}",
    "combine, a wrong word": "combine adapter adapter --method sorcery -o {out}",
    "resize": "resize missing --rank 2 -o {out}",
    "extract-svd": "extract-svd missing missing -o {out}",
    "convert": "convert missing -o {out}",
    "convert, a wrong dialect": "convert adapter --to sorcery -o {out}",
    "pull": "pull a/b/../c -o {out}",
    "dequantize": "dequantize missing -o {out}",
    "edit": "edit missing --title x -o {out}",
    "report": "report missing -o {out}",
    "demo": "demo --keep {out} nonsense",
}


def leftover(target: Path) -> list[Path]:
    """Make what killed runs for this output leave."""
    names = [f".{target.name}.partial-0123abcd", f".{target.name}.partial-4567abcd"]
    for name in names:
        (target.parent / name / "deep").mkdir(parents=True)
        (target.parent / name / "deep" / "file").write_text("half")
    return [target.parent / name for name in names]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_fails(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    out, there = workplace / "out", workplace / "merged"
    left = [*leftover(out), *leftover(there)]
    assert run(COMMANDS[name].format(out=out, there=there).split()) in (1, 2)
    used = there if "{there}" in COMMANDS[name] else out
    assert [path for path in left if path.exists()] == [path for path in left if f".{used.name}." not in path.name]
    assert not out.exists()


VERBS: dict[str, Callable[[Path], Any]] = {
    "merge": lambda out: loratools.merge("base", "adapter", out, threads=0),
    "dequantize": lambda out: loratools.dequantize("missing", out),
    "unmerge": lambda out: loratools.unmerge("merged", "adapter", out, threads=0),
    "switch": lambda out: loratools.switch("merged", "adapter", "other", out, threads=0),
    "combine": lambda out: loratools.combine("adapter", out, method="sorcery"),  # type: ignore[call-overload]
    "resize": lambda out: loratools.resize("adapter", out, 2, threads=0),
    "extract_svd": lambda out: loratools.extract_svd("base", "tuned", out, threads=0),
    "convert": lambda out: loratools.convert("adapter", out, to="sorcery"),
    "pull": lambda out: loratools.pull("a/b@c", out, revision="d"),
    "save_adapter": lambda out: loratools.save_adapter(loratools.open_adapter("adapter"), out, dialect="sorcery"),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_call_that_fails(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    left = leftover(workplace / "out")
    with pytest.raises(LoraToolsError):
        VERBS[name](workplace / "out")
    assert [path for path in left if path.exists()] == []


def test_every_command_with_an_output_is_here(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new command that writes has its place in the lists above."""
    from loratools.cli._run import group

    root = group()
    context = root.make_context("loratools", ["hash", "x"], resilient_parsing=True)
    writing = {
        name
        for name in root.list_commands(context)
        for option in (root.get_command(context, name) or root).params
        if isinstance(option, click.Option) and re.fullmatch(r"output|keep", option.name or "")
    }
    assert writing == {name.partition(",")[0] for name in COMMANDS}
