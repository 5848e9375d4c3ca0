"""`loratools help`: topics by their file names, and pages of commands; tests/test_docs.py runs what topics show."""

from __future__ import annotations

import json

import pytest

from loratools.cli._run import run
from loratools.cli.help import TOPICS


def test_help_of_a_command_is_its_page_and_leads_to_its_topics(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["help", "merge"]) == 0
    page = capsys.readouterr().out
    assert run(["merge", "--help"]) == 0
    own = capsys.readouterr().out
    assert page.startswith(own.rstrip())
    assert "loratools help merging" in page
    assert run(["help", "quantised"]) == 2
    assert "perhaps quantized" in capsys.readouterr().err


def test_the_documents(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["help", "--json"]) == 0
    topics = json.loads(capsys.readouterr().out)["topics"]
    assert sorted(topics) == sorted(path.stem for path in TOPICS.iterdir())
    assert run(["help", "python", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == (TOPICS / "python.md").read_text(encoding="utf-8")
