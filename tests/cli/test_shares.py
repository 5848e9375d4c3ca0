"""--workers and --part on the command line: what is printed and written is that of one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratools.cli._run import run
from tests.cli.test_schemas import assert_valid
from tests.faults.killer import hashes

Spoken = Callable[..., Any]


@pytest.fixture
def spoken(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Spoken:
    """Run a command line in the workplace; return its document, or its documents by path."""
    monkeypatch.chdir(workplace)

    def speak(*words: str, code: int = 0) -> Any:
        assert run([*words, "--json"]) == code
        out = capsys.readouterr().out
        return json.loads(out) if out.startswith("{\n") else [json.loads(line) for line in out.splitlines()]

    return speak


def test_parts_of_an_extraction_are_gathered(spoken: Spoken, workplace: Path) -> None:
    alone = spoken("extract-svd", "base", "tuned", "--rank", "4", "-o", "alone")
    words = ["extract-svd", "base", "tuned", "--rank", "4", "-o", "apart"]
    for part in ("2/2", "1/2"):
        assert_valid("extract-svd", written := spoken(*words, "--part", part))
        assert written["part"] == part
    assert_valid("gather", gathered := spoken("gather", "apart"))
    assert hashes(workplace / "apart") == hashes(workplace / "alone")
    assert gathered | {"output": ""} == alone | {"output": ""}


def test_part_and_workers_do_not_go_together(spoken: Spoken) -> None:
    spoken("extract-svd", "base", "tuned", "-o", "out", "--part", "1/2", "--workers", "2", code=2)
    spoken("inspect", "base", "adapter", "-j", "2", "--workers", "2", code=2)
    spoken("verify", "merged", "--base", "base", "--adapter", "adapter", "--certificate", "--workers", "2", code=2)


def test_who_cannot_be_a_worker_is_told(spoken: Spoken) -> None:
    spoken("hash", "base", "--workers", "http://host", code=2)
    spoken("inspect", "base", "adapter", "--workers", "http://host", code=2)


@pytest.mark.slow
def test_workers_give_what_one_process_gives(spoken: Spoken, workplace: Path) -> None:
    pytest.importorskip("distributed")
    assert spoken("hash", "base", "--tier", "all", "--workers", "2") == spoken("hash", "base", "--tier", "all")
    words = ["verify", "merged", "--base", "base", "--adapter", "adapter", "--seed", "1"]
    assert spoken(*words, "--workers", "2") == spoken(*words)


@pytest.mark.slow
def test_each_path_is_done_by_a_worker_and_told_in_order(spoken: Spoken, workplace: Path) -> None:
    pytest.importorskip("distributed")
    for number in range(5):
        shutil.copytree(workplace / "sealed", workplace / "library" / f"a{number}")
    (workplace / "library" / "broken.safetensors").write_text("no tensors at all")
    for words in (["validate"], ["inspect"], ["resize", "--rank", "2"]):
        more = ["-o", "apart"] if words[0] == "resize" else []
        apart = spoken(*words, "--each", "library", "--workers", "2", *more, code=1)
        more = ["-o", "alone"] if more else []
        alone = spoken(*words, "--each", "library", *more, code=1)
        assert [each | {"output": ""} for each in apart] == [each | {"output": ""} for each in alone]
    assert hashes(workplace / "apart") == hashes(workplace / "alone") != {}
