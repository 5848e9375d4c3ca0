"""The text of the specification: one MUST for each clause, and something that shows each."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import container
import jsonschema
import kinds as second_kinds
import pytest

from loratools.format import manifest, validate
from loratools.format.registry import KINDS
from loratools.storage.strict_json import parse_json_object

from . import SPEC, adapter_of, cases, note

CHAPTERS = sorted(SPEC.glob("[1-8]-*.md"))
SCHEMA = json.loads((SPEC / "schema" / "manifest.schema.json").read_text())
CONSTRUCTIONS = {"I-03", "I-04", "I-05", "I-09"}  # how a digest is made: seen only in digests


def paragraphs() -> list[str]:
    return [p for chapter in CHAPTERS for p in re.split(r"\n\s*\n", chapter.read_text())]


def clauses() -> dict[str, str]:
    """Return id -> sentence, for every clause of the text."""
    matches = [re.match(r"\*\*\[([LMTIXSV]-\d\d)\]\*\* (.*)", p, re.DOTALL) for p in paragraphs()]
    return {match[1]: " ".join(match[2].split()) for match in matches if match}


def file_clauses() -> set[str]:
    actors = re.compile(r"\bA (Reader|Writer)\b")
    return {name for name, sentence in clauses().items() if not actors.match(sentence)} - CONSTRUCTIONS


def test_each_clause_has_one_must_and_each_must_a_clause() -> None:
    for chapter in CHAPTERS[1:]:
        for paragraph in re.split(r"\n\s*\n", chapter.read_text()):
            expected = 1 if paragraph.startswith("**[") else 0
            assert len(re.findall(r"\bMUST\b", paragraph)) == expected, paragraph


def test_ids_are_unique_and_cited_ids_exist() -> None:
    heads = [m for p in paragraphs() for m in re.findall(r"^\*\*\[([A-Z]-\d\d)\]\*\*", p, re.MULTILINE)]
    assert len(heads) == len(set(heads))
    assert len(heads) == len(clauses())
    texts = [*SPEC.parent.glob("*.md"), *SPEC.glob("*.md")]
    cited = {name for text in texts for name in re.findall(r"\[([LMTIXSV]-\d\d)\]", text.read_text())}
    assert cited == set(heads)


def test_rules_check_exactly_the_clauses_on_files() -> None:
    assert {*validate.CLAUSES, *validate.GATE} == file_clauses() | {"X-04", "V-01"}
    assert not set(validate.CLAUSES) & set(validate.GATE)


def test_every_clause_is_shown_by_a_vector_or_by_a_test_named_for_it() -> None:
    shown = {note("invalid", name)["clause"] for name in cases("invalid")}
    for area in ("valid", "hash"):
        shown |= {clause for name in cases(area) for clause in note(area, name)["clauses"]}
    for folder in ("spec", "format"):
        for file in (Path(__file__).parents[1] / folder).glob("test_*.py"):
            in_names = re.findall(r"^def test_([LMTIXSV])_(\d\d)_", file.read_text(), re.MULTILINE)
            shown |= {f"{letter}-{number}" for letter, number in in_names}
    assert shown == set(clauses())


def test_every_clause_on_files_has_an_invalid_vector() -> None:
    broken = {note("invalid", name)["clause"] for name in cases("invalid")}
    assert broken == file_clauses() | {"I-10", "I-13", "X-04", "V-01"}


def test_registry_says_what_the_code_knows() -> None:
    rows = list(csv.DictReader((SPEC / "kinds.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == sorted(KINDS)
    for row in rows:
        kind = KINDS[row["name"]]
        assert row["clause"] == kind.clause
        assert row["clause"] in clauses()
        assert f"kind `{row['name']}`" in clauses()[row["formula"]]
        assert {frozenset(words.split()) for words in row["parts"].split("|")} == set(kind.required)
        assert frozenset(row["optional_parts"].split()) == kind.optional
        assert row["layout"].split() == sorted(kind.layout or {})
        assert row["since"] == ".".join(map(str, kind.since)) == second_kinds.KINDS[row["name"]][3]
        assert (row["formula"], row["numbers"].split()) == (kind.formula, list(kind.numbers))
        assert bool(row["peft"]) == kind.peft == (row["name"] in second_kinds.PEFT)
    assert set(SCHEMA["$defs"]["module"]["properties"]["kind"]["enum"]) == set(KINDS)


def test_examples_in_the_text_are_sound() -> None:
    text = "".join(chapter.read_text() for chapter in CHAPTERS)
    blocks = re.findall(r"```json (\w+)\n(.*?)```", text, re.DOTALL)
    whole = next(json.loads(text) for label, text in blocks if label == "manifest")
    jsonschema.validate(whole, SCHEMA)
    fragments = [json.loads(text) for label, text in blocks if label == "fragment"]
    assert len(fragments) >= 5
    for fragment in fragments:
        jsonschema.validate(whole | fragment, SCHEMA)
        assert json.loads(manifest.canonical(whole | fragment)) == whole | fragment


def manifest_text(path: Path) -> str | None:
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    try:
        return container.load(file)[1].get("loratools")
    except (container.Refused, OSError):
        return None


@pytest.mark.parametrize("name", cases("valid"))
def test_schema_accepts_valid_manifests(name: str) -> None:
    text = manifest_text(adapter_of("valid", name))
    assert text is not None
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("name", cases("invalid"))
def test_schema_refuses_what_it_can(name: str) -> None:
    text, why = manifest_text(adapter_of("invalid", name)), note("invalid", name)
    document: Any = None
    try:
        document = json.loads(text or "")
    except ValueError:
        assert not why["schema"]
        return
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(document) == (not why["schema"]), why


def test_schema_is_itself_sound() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", cases("valid"))
def test_canonical_text_of_both_implementations(name: str) -> None:
    text = manifest_text(adapter_of("valid", name))
    assert text is not None
    document = parse_json_object(text.encode(), Path(name))
    assert manifest.canonical(document) == container.canonical(document) == text
