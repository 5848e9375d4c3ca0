"""`loratools help`: topics by their file names, and pages of commands; tests/test_docs.py runs what topics show."""

from __future__ import annotations

import json
import re

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
    assert "; did you mean 'quantized'?" in capsys.readouterr().err


def test_a_topic_flows_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert run(["help", "recipes"]) == 0
    piped = capsys.readouterr().out
    assert piped == (TOPICS / "recipes.md").read_text(encoding="utf-8")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert run(["help", "recipes"]) == 0
    flowing = capsys.readouterr().out
    assert flowing.split() == piped.split()
    prose = re.sub(r"^```.*?^```$", "", flowing, flags=re.MULTILINE | re.DOTALL).splitlines()
    assert max(len(line) for line in prose if not line.startswith("#")) <= 60
    assert [line for line in flowing.splitlines() if line.startswith("  model: {")]


def test_the_documents(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["help", "--json"]) == 0
    topics = json.loads(capsys.readouterr().out)["topics"]
    assert sorted(topics) == sorted(path.stem for path in TOPICS.iterdir())
    assert run(["help", "python", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == (TOPICS / "python.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("topic", "more"),
    [
        ("quantisation", "; did you mean 'quantized'?"), ("undo", "; did you mean 'undoing'?"),
        ("seal", "; did you mean 'sealing'?"), ("mrge", "; did you mean 'merge'?"), ("qqqqq", ""),
    ],
)  # fmt: skip
def test_what_is_no_topic_gets_a_suggestion(topic: str, more: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["help", topic]) == 2
    assert capsys.readouterr().err.splitlines()[0].endswith(f"{topic!r} is neither a topic nor a command{more}")


def test_the_list_of_commands_cuts_no_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    page = capsys.readouterr().out
    for line in page[page.index("\nLook:") : page.index("\nOptions,")].splitlines():
        assert not line.endswith("..."), line


def test_what_is_no_weight_is_told_the_three_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["merge", "base", "adapter", "-o", "out", "-w", "abc"]) == 2
    error = capsys.readouterr().err
    assert "'abc' is no weight: it is a number, PATTERN=NUMBER" in error
    assert "lbw: and a number for each block" in error


def test_a_word_leads_to_the_topics_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    for word, topic in (("lbw", "combining"), ("kohya", "layouts")):
        assert run(["help", word]) == 2
        told = capsys.readouterr().err.partition("topics that have the word: ")[2]
        assert topic in told.split("\n")[0].split(", "), told
    assert run(["help", "xyzzy"]) == 2
    assert "have the word" not in capsys.readouterr().err
