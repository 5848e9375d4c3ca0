"""The schema of every command is shipped, is what its types say, and holds for results and errors.

Those of the examples in help are held against it in test_examples.py.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
from jsonschema import Draft202012Validator

from loratools.cli._run import group, run
from tests.cli import schemas

NAMES = group().list_commands(click.Context(group()))


@cache
def validator(command: str) -> Draft202012Validator:
    schema = json.loads((schemas.FOLDER / f"{command}.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def assert_valid(command: str, document: dict[str, Any]) -> None:
    """Fail with the deepest reason why a document is not one of its command's."""
    errors = list(validator(command).iter_errors(document))
    best = [min(error.context or [error], key=lambda each: (-len(each.path), each.message)).message for error in errors]
    assert not errors, best


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_what_the_types_say(name: str) -> None:
    shipped = (schemas.FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert shipped == schemas.text(name), "run python -m tests.cli.schemas"


def test_no_schema_is_left_over() -> None:
    assert sorted(path.stem for path in schemas.FOLDER.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_command_prints_its_schema(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--json-schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == f"loratools {name} --json"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [["--such-an-option"], ["no/such/place"]])
def test_an_error_is_one_document_of_the_schema(
    name: str, wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([name, *wrong, "--json"]) in (1, 2)
    out, err = capsys.readouterr()
    assert err == ""
    for text in [out] if out.startswith("{\n") else out.splitlines():  # of several paths a line each
        document = json.loads(text)
        assert document["error"]["message"]
        assert_valid(name, document)


MORE = {
    "validate": ["validate adapter", "validate sealed --base tuned"],
    "verify": ["verify base --base base --adapter adapter", "verify merged --base base --adapter adapter --exact"],
    "inspect": ["inspect quantized --modules", "inspect merged"],
    "merge": ["merge base adapter -o out --keep-residual --verify", "merge quantized adapter -o out --dry-run"],
    "hash": ["hash base --tier all", "hash quantized --modules", "hash adapter --tier schema"],
    "combine": ["combine adapter other -o out --rank 2 --dry-run"],
    "resize": ["resize adapter -o out --energy 0.5 --dry-run"],
    "dequantize": ["dequantize quantized -o out --dry-run"],
    "unmerge": ["unmerge merged adapter -o out --dry-run"],
    "switch": ["switch merged --take adapter --put other -o out --dry-run"],
    "extract-svd": ["extract-svd base tuned -o out --exclude q_proj"],
    "recipe": ["recipe blend --last"],
    "run": ["run recipe.yaml", "run recipe.yaml --input base=tuned --folder out"],
    "compare": ["compare adapter other --base base --include q_proj --paper"],
    "convert": ["convert adapter -o out --base base --dry-run", "convert adapter -o out.safetensors --to kohya"],
}


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in MORE.items() for line in lines])
def test_documents_beside_the_examples(
    name: str, line: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    assert run([*line.split(), "--json"]) in (0, 1)
    out, err = capsys.readouterr()
    assert err == ""
    assert not isinstance(json.loads(out).get("error"), dict)
    assert_valid(name, json.loads(out))


def test_a_document_with_an_unknown_key_is_not_valid() -> None:
    with pytest.raises(AssertionError):
        assert_valid("completion", {"schema": 1, "warnings": [], "shell": "bash", "script": "", "more": 1})
