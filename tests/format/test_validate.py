"""What an adapter has from a sound one is not looked at again, and nothing that it has of its own is passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import BadFile
from loratools.format import validate
from loratools.format.clauses import Subject
from tests.spec import adapter_of, cases

VECTORS = [(kind, name) for kind in ("valid", "invalid") for name in cases(kind)]
OWN = {"base_model", "digest", "provenance"}


class Watched(dict[str, Any]):
    """A manifest that notes the fields that are looked at."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(fields)
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def items(self) -> Any:
        self.seen |= self.keys()
        return super().items()


def subject_of(kind: str, name: str) -> Subject | None:
    try:
        subject = validate.open_subject(adapter_of(kind, name))
    except BadFile:
        return None
    return subject if isinstance(subject, Subject) else None


@pytest.fixture(autouse=True)
def nothing_before() -> Iterator[None]:
    before = dict(validate._SOUND)
    validate._SOUND.clear()
    yield
    validate._SOUND.clear()
    validate._SOUND.update(before)


@pytest.mark.parametrize("clause", validate.CLAUSES)
def test_a_clause_that_is_not_asked_again_looks_at_nothing_of_one_adapter_alone(clause: str) -> None:
    looked = False
    for kind, name in VECTORS:
        if (subject := subject_of(kind, name)) is None:
            continue
        watched = Watched(dict(subject.manifest))
        plain = [*validate.CLAUSES[clause](subject)]
        if clause in validate._OF_ONE:
            [*validate.CLAUSES[clause](replace(subject, manifest=watched))]
            looked = looked or bool(watched.seen & OWN)
        else:
            alone = replace(subject, manifest=watched, text="", specs=None, path=Path("elsewhere"))
            assert [*validate.CLAUSES[clause](alone)] == plain, name
            assert not watched.seen & OWN, name
    assert looked == (clause in validate._OF_ONE)


@pytest.mark.parametrize(("kind", "name"), VECTORS)
def test_the_problems_are_those_of_an_adapter_read_first(kind: str, name: str) -> None:
    if (subject := subject_of(kind, name)) is None:
        pytest.skip("it is refused before it has a manifest")
    alone = validate.problems(subject, digest=True)
    again = validate.problems(replace(subject), digest=True)
    assert again == alone
    assert bool(validate._SOUND) == (not alone)


@pytest.mark.parametrize(
    ("field", "value", "clause"),
    [
        ("digest", "blake3:" + "0" * 64, "I-02"), ("digest", 1, "I-01"), ("provenance", [{}], "M-20"),
        ("base_model", {"id": ""}, "M-16"), ("rank", True, "M-04"), ("alpha", 16.0, "M-05"),
        ("settings", [], "M-23"), ("meaning", "blake3:" + "0" * 64, "I-12"),
    ],
)  # fmt: skip
def test_what_differs_from_a_sound_one_is_found(field: str, value: Any, clause: str) -> None:
    sound = subject_of("valid", "linear/plain")
    assert sound is not None
    assert validate.problems(sound, digest=True) == []
    document = {**sound.manifest, field: value}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    found = {problem.clause for problem in validate.problems(replace(sound, manifest=document, text=text), digest=True)}
    assert clause in found
    assert validate.problems(replace(sound), digest=True) == []
    shapes = {tensor: (dtype, (*shape[:-1], shape[-1] + 1)) for tensor, (dtype, shape) in sound.tensors.items()}
    assert "T-06" in {each.clause for each in validate.problems(replace(sound, tensors=shapes), digest=False)}
