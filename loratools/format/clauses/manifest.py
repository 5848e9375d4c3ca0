"""Chapter 3, the fields of the manifest, and the limits of chapter 7 that bind them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

from loratools.errors import BadFile
from loratools.format.canonical import joined
from loratools.format.clauses import (
    COUNT,
    FLAG,
    REAL,
    TEXT,
    Chapter,
    Fault,
    Form,
    Subject,
    natural,
    number,
    shown,
    text,
)
from loratools.format.manifest import is_path, unmatched, unused, usual
from loratools.format.registry import Kind
from loratools.storage import digest

CHAPTER = Chapter()
MAX_NAME = 512
MAX_DEPTH = 32

_NO_LAYOUT: Mapping[str, Any] = {}
_path = lru_cache(4096)(re.compile(r"[^.\x00-\x1f\x7f]+(\.[^.\x00-\x1f\x7f]+)*").fullmatch)  # the next has the same


@CHAPTER.clause("M-02")
def canonical_text(subject: Subject) -> Iterator[Fault]:
    """Compare the text with the canonical one (RFC 8785)."""
    try:
        canon = joined(subject.fields)
    except ValueError as error:
        yield "manifest", str(error)
        return
    if canon != subject.text:
        at = next((i for i, (a, b) in enumerate(zip(canon, subject.text, strict=False)) if a != b), len(canon))
        yield "manifest", f"not in canonical form (RFC 8785): it differs at character {at}"


def _usual(subject: Subject, field: str, form: Form) -> Iterator[Fault]:
    """Check a field that is the value which most modules have, the smallest of them on a tie."""
    (formed, expected), value = form, subject.manifest.get(field)
    values: list[Any] = [entry.get(field) for _, entry in subject.entries()]
    if not formed(value):
        yield field, f"expected {expected}, found {shown(value)}"
    elif values.count(value) < len(values) and all(map(formed, values)):
        most = usual(values)
        if value != most:
            yield field, f"is {shown(value)}, but most modules have {shown(most)}"


def _stated(subject: Subject, field: str, form: Form, default: Any = None) -> Iterator[Fault]:
    """Check the form of a field."""
    value = subject.manifest.get(field, default)
    if not form[0](value):
        yield field, f"expected {form[1]}, found {shown(value)}"


def _each(subject: Subject, field: str, form: Form) -> Iterator[Fault]:
    """Check the form of a field of each module."""
    for path, entry in subject.entries():
        if not form[0](entry.get(field)):
            yield path, f"{field}: expected {form[1]}, found {shown(entry.get(field))}"


def _sorted_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(text, value)) and value == sorted(set(value))


def _rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(natural, value)) and len(set(value)) == len(value)


_LAYOUT: Mapping[type, Form] = {
    bool: FLAG, int: COUNT, str: TEXT, float: REAL, list: (_rows, "different integers from 0"),
}  # fmt: skip
_OF_ANY: Mapping[str, type] = {"transposed": bool, "experts": int, "parameter": str}  # in modules of any kind
_NAMES: Form = (_sorted_names, "a sorted list of different non-empty strings")
_OBJECT: Form = (lambda value: isinstance(value, dict), "an object")
_OBJECTS: Form = (
    lambda value: isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values()),
    "an object of objects",
)
CHAPTER |= {
    "M-04": partial(_usual, field="rank", form=COUNT),
    "M-05": partial(_usual, field="alpha", form=REAL),
    "M-06": partial(_stated, field="target_modules", form=_NAMES),
    "M-12": partial(_each, field="rank", form=COUNT),
    "M-13": partial(_each, field="alpha", form=REAL),
    "M-14": partial(_each, field="scaling", form=REAL),
    "M-19": partial(_stated, field="replacements", form=_OBJECTS, default={}),
    "M-23": partial(_stated, field="settings", form=_OBJECT, default={}),
}


@CHAPTER.clause("M-07")
def targets_used(subject: Subject) -> Iterator[Fault]:
    """Check that each target names a module."""
    for target in unused(subject.targeted(), _targets(subject) or []):
        yield "target_modules", f"{target!r} matches none of the modules"


@CHAPTER.clause("M-08")
def modules_targeted(subject: Subject) -> Iterator[Fault]:
    """Check that each module but stacked experts is named by a target."""
    targets = _targets(subject)
    for path in unmatched(subject.targeted(), targets) if targets is not None else []:
        yield path, "no entry of target_modules matches this module"


def _targets(subject: Subject) -> list[str] | None:
    names: Any = subject.manifest.get("target_modules")
    return names if _sorted_names(names) else None


@CHAPTER.clause("M-09")
def modules(subject: Subject) -> Iterator[Fault]:
    """Check that `modules` is an object with at least one entry, each an object."""
    value = subject.manifest.get("modules")
    if not isinstance(value, dict) or not value:
        yield "modules", f"expected an object with at least one module, found {shown(value)}"
        return
    strays = [(path, entry) for path, entry in value.items() if not isinstance(entry, dict)]
    yield from ((path, f"expected an object, found {shown(entry)}") for path, entry in strays)


@CHAPTER.clause("M-10")
def paths(subject: Subject) -> Iterator[Fault]:
    """Check the grammar of module paths and of replaced parameters' paths."""
    for field in ("modules", "replacements"):
        for path, _ in subject.entries(field):
            if not _path(path):
                yield field, f"{shown(path)} is not a path of non-empty segments with dots between them"


@CHAPTER.clause("M-11")
def kind(subject: Subject) -> Iterator[Fault]:
    """Check that each kind is registered."""
    for path, entry, kind in subject.kinds:
        if kind is None:
            version = subject.manifest.get("format_version")
            yield path, f"kind {shown(entry.get('kind'))} is not one that version {version} registers"


@CHAPTER.clause("M-15")
def base_tensor(subject: Subject) -> Iterator[Fault]:
    """Check the base tensor names."""
    for path, entry in subject.entries("modules", "replacements"):
        if "tensor" in entry and not text(entry["tensor"]):
            yield path, f"tensor: expected a non-empty string, found {shown(entry['tensor'])}"


@CHAPTER.clause("M-16")
def base_model(subject: Subject) -> Iterator[Fault]:
    """Check that `base_model` is an object with strings for names."""
    base = subject.manifest.get("base_model", {})
    if not isinstance(base, dict):
        yield "base_model", f"expected an object, found {shown(base)}"
        return
    yield from _named(base, "id", "revision")


def _named(base: Mapping[str, Any], *names: str) -> Iterator[Fault]:
    for name in names:
        if name in base and not text(base[name]):
            yield f"base_model.{name}", f"expected a non-empty string, found {shown(base[name])}"


@CHAPTER.clause("M-26")
def model_type(subject: Subject) -> Iterator[Fault]:
    """Check that the base's model type is a string."""
    base = subject.manifest.get("base_model")
    yield from _named(base if isinstance(base, dict) else {}, "model_type")


@CHAPTER.clause("M-17")
def base_id(subject: Subject) -> Iterator[Fault]:
    """Check that the base model's id is a name and not a path of some machine."""
    base = subject.manifest.get("base_model")
    identifier = base.get("id") if isinstance(base, dict) else None
    if isinstance(identifier, str) and is_path(identifier):
        yield "base_model.id", f"{shown(identifier)} is a path of some machine, not a name"


@CHAPTER.clause("M-18")
def layout(subject: Subject) -> Iterator[Fault]:
    """Check the layout of each module, and that it is there where its kind needs it."""
    yield from _layout(subject, "M-18")


@CHAPTER.clause("M-27")
def layout_of_kind(subject: Subject) -> Iterator[Fault]:
    """Check the fields of a layout that only one kind has."""
    yield from _layout(subject, "M-27")


def _layout(subject: Subject, clause: str) -> Iterator[Fault]:
    for path, entry, kind in subject.laid_out:
        if not has_needed(kind, entry):
            yield from ((path, message) for identifier, message in layout_faults(kind, entry) if identifier == clause)


def has_needed(kind: Kind, entry: Mapping[str, Any]) -> bool:
    """Tell whether a layout of which the kind needs nothing says no more than how the base stores the weight."""
    layout = entry.get("layout", _NO_LAYOUT)
    if kind.layout or not isinstance(layout, dict) or "experts" in layout or "parameter" in layout:
        return False
    return isinstance(layout.get("transposed", False), bool)


def layout_faults(kind: Kind, entry: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (clause, message) for each fault of a module's layout."""
    if has_needed(kind, entry):
        return
    value = entry.get("layout", _NO_LAYOUT)
    if not isinstance(value, dict):
        yield "M-18", f"layout: expected an object, found {shown(value)}"
        return
    needed = kind.layout or {}
    for name, kind_of in {**_OF_ANY, **needed}.items():
        formed, expected = _LAYOUT[kind_of]
        if (name in needed or name in value) and not formed(value.get(name)):
            clause = "M-18" if name in _OF_ANY else "M-27"
            yield clause, f"layout.{name}: expected {expected}, found {shown(value.get(name))}"


@CHAPTER.clause("M-28")
def unscaled(subject: Subject) -> Iterator[Fault]:
    """Check that rank and scaling are 1 where the formula has none."""
    for path, entry, kind in subject.modules():
        for field in kind.ones(subject.whole[path]) if path in subject.whole else ():
            if number(entry.get(field)) and entry[field] != 1:
                yield path, f"{field}: expected 1, for kind {kind.name} has none here; found {shown(entry[field])}"


@CHAPTER.clause("M-20")
def provenance(subject: Subject) -> Iterator[Fault]:
    """Check that `provenance` is a list of steps, each with its operation and tool."""
    steps = subject.manifest.get("provenance", [])
    if not isinstance(steps, list):
        yield "provenance", f"expected a list, found {shown(steps)}"
        return
    for i, step in enumerate(steps):
        formed = isinstance(step, dict) and text(step.get("operation")) and text(step.get("tool"))
        if not formed or not isinstance(step.get("parameters", {}), dict):
            yield f"provenance[{i}]", f"expected an object with operation and tool, found {shown(step)}"


@CHAPTER.clause("M-21")
def inputs(subject: Subject) -> Iterator[Fault]:
    """Check the inputs of each step: objects with a digest, a weight or neither."""
    for i, step in enumerate(_steps(subject)):
        listed = step.get("inputs", [])
        for item in listed if isinstance(listed, list) else [listed]:
            formed = isinstance(listed, list) and isinstance(item, dict) and number(item.get("weight", 1))
            if not formed or ("digest" in item and not is_digest(item["digest"])):
                yield f"provenance[{i}]", f"inputs: expected objects with digest and weight, found {shown(item)}"


@CHAPTER.clause("M-22")
def seed(subject: Subject) -> Iterator[Fault]:
    """Check the seed of each step."""
    for i, step in enumerate(_steps(subject)):
        if "seed" in step and not natural(step["seed"]):
            yield f"provenance[{i}]", f"seed: expected an integer from 0 to 2^53 - 1, found {shown(step['seed'])}"


def _steps(subject: Subject) -> list[dict[str, Any]]:
    steps = subject.manifest.get("provenance", [])
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


@CHAPTER.clause("S-07")
def name_length(subject: Subject) -> Iterator[Fault]:
    """Check the length of names."""
    entries = subject.entries("modules", "replacements")
    stated = [name for path, entry in entries for name in (path, entry.get("tensor")) if isinstance(name, str)]
    for name in [name for name in [*subject.tensors, *stated] if len(name) > MAX_NAME // 4]:
        if len(name.encode()) > MAX_NAME:
            yield shown(name), f"the name is {len(name.encode())} bytes long; the limit is {MAX_NAME}"


def is_digest(value: Any) -> bool:
    """Tell whether a JSON value is a well-formed digest of a registered algorithm."""
    try:
        return isinstance(value, str) and bool(digest.algorithm_of(value))
    except BadFile:
        return False
