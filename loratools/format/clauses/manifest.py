"""Chapter 3, the fields of the manifest, and the limits of chapter 7 that bind them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from loratools.errors import BadFile
from loratools.format.clauses import Chapter, Fault, Subject, natural, number, shown
from loratools.format.manifest import canonical, is_path, unmatched, unused
from loratools.format.registry import KINDS
from loratools.storage import digest

CHAPTER = Chapter()
MAX_NAME = 512
MAX_DEPTH = 32

_PATH = re.compile(r"[^.\x00-\x1f\x7f]+(\.[^.\x00-\x1f\x7f]+)*")


@CHAPTER.clause("M-02")
def canonical_text(subject: Subject) -> Iterator[Fault]:
    """Compare the text with the canonical one (RFC 8785)."""
    try:
        text = canonical(subject.manifest)
    except ValueError as error:
        yield "manifest", str(error)
        return
    if text != subject.text:
        at = next((i for i, (a, b) in enumerate(zip(text, subject.text, strict=False)) if a != b), len(text))
        yield "manifest", f"not in canonical form (RFC 8785): it differs at character {at}"


@CHAPTER.clause("M-04")
def rank(subject: Subject) -> Iterator[Fault]:
    """Check `rank`: the one that most modules have, the smallest of them on a tie."""
    yield from _usual(subject, "rank", lambda value: natural(value, 1), "a positive integer")


@CHAPTER.clause("M-05")
def alpha(subject: Subject) -> Iterator[Fault]:
    """Check `alpha`: the one that most modules have, the smallest of them on a tie."""
    yield from _usual(subject, "alpha", number, "a finite number")


def _usual(subject: Subject, name: str, formed: Callable[[Any], bool], expected: str) -> Iterator[Fault]:
    value = subject.manifest.get(name)
    values = [entry.get(name) for _, entry in subject.entries()]
    if not formed(value):
        yield name, f"expected {expected}, found {shown(value)}"
    elif values and all(map(formed, values)):
        counts: Counter[Any] = Counter(values)
        usual = min(counts, key=lambda candidate: (-counts[candidate], candidate))
        if value != usual:
            yield name, f"is {shown(value)}, but most modules have {shown(usual)}"


@CHAPTER.clause("M-06")
def target_modules(subject: Subject) -> Iterator[Fault]:
    """Check that `target_modules` is a sorted list of different names."""
    if _targets(subject) is None:
        value = shown(subject.manifest.get("target_modules"))
        yield "target_modules", f"expected a sorted list of different non-empty strings, found {value}"


@CHAPTER.clause("M-07")
def targets_used(subject: Subject) -> Iterator[Fault]:
    """Check that each target names a module."""
    for target in unused(_targeted(subject), _targets(subject) or []):
        yield "target_modules", f"{target!r} matches none of the modules"


@CHAPTER.clause("M-08")
def modules_targeted(subject: Subject) -> Iterator[Fault]:
    """Check that each module but stacked experts is named by a target."""
    targets = _targets(subject)
    for path in unmatched(_targeted(subject), targets) if targets is not None else []:
        yield path, "no entry of target_modules matches this module"


def _targets(subject: Subject) -> list[str] | None:
    names = subject.manifest.get("target_modules")
    if not isinstance(names, list) or not all(isinstance(target, str) and target for target in names):
        return None
    return names if names == sorted(set(names)) else None


def _targeted(subject: Subject) -> list[str]:
    return [path for path, entry in subject.entries() if entry.get("kind") != "experts"]


@CHAPTER.clause("M-09")
def modules(subject: Subject) -> Iterator[Fault]:
    """Check that `modules` is an object with at least one entry, each an object."""
    value = subject.manifest.get("modules")
    if not isinstance(value, dict) or not value:
        yield "modules", f"expected an object with at least one module, found {shown(value)}"
        return
    yield from (
        (path, f"expected an object, found {shown(entry)}")
        for path, entry in value.items()
        if not isinstance(entry, dict)
    )


@CHAPTER.clause("M-10")
def paths(subject: Subject) -> Iterator[Fault]:
    """Check the grammar of module paths and of replaced parameters' paths."""
    for field in ("modules", "replacements"):
        for path, _ in subject.entries(field):
            if not _PATH.fullmatch(path):
                yield field, f"{shown(path)} is not a path of non-empty segments with dots between them"


@CHAPTER.clause("M-11")
def kind(subject: Subject) -> Iterator[Fault]:
    """Check that each kind is registered."""
    for path, entry in subject.entries():
        name = entry.get("kind")
        if not isinstance(name, str) or name not in KINDS:
            yield path, f"kind {shown(name)} is not one that version 1.0 registers: {', '.join(KINDS)}"


@CHAPTER.clause("M-12")
def module_rank(subject: Subject) -> Iterator[Fault]:
    """Check the rank of each module."""
    return _each(subject, "rank", lambda value: natural(value, 1), "a positive integer")


@CHAPTER.clause("M-13")
def module_alpha(subject: Subject) -> Iterator[Fault]:
    """Check the alpha of each module."""
    return _each(subject, "alpha", number, "a finite number")


@CHAPTER.clause("M-14")
def module_scaling(subject: Subject) -> Iterator[Fault]:
    """Check the scaling of each module."""
    return _each(subject, "scaling", number, "a finite number")


def _each(subject: Subject, name: str, formed: Any, expected: str) -> Iterator[Fault]:
    for path, entry in subject.entries():
        if not formed(entry.get(name)):
            yield path, f"{name}: expected {expected}, found {shown(entry.get(name))}"


@CHAPTER.clause("M-15")
def base_tensor(subject: Subject) -> Iterator[Fault]:
    """Check the base tensor names."""
    for field in ("modules", "replacements"):
        for path, entry in subject.entries(field):
            if "tensor" in entry and not _text(entry["tensor"]):
                yield path, f"tensor: expected a non-empty string, found {shown(entry['tensor'])}"


@CHAPTER.clause("M-16")
def base_model(subject: Subject) -> Iterator[Fault]:
    """Check that `base_model` is an object with strings for names."""
    base = subject.manifest.get("base_model", {})
    if not isinstance(base, dict):
        yield "base_model", f"expected an object, found {shown(base)}"
        return
    for name in ("id", "revision"):
        if name in base and not _text(base[name]):
            yield f"base_model.{name}", f"expected a non-empty string, found {shown(base[name])}"


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
    for path, entry, kind in subject.modules():
        value = entry.get("layout")
        if value is None and "layout" not in entry and kind.layout is None:
            continue
        if not isinstance(value, dict):
            yield path, f"layout: kind {kind.name} expected an object, found {shown(value)}"
            continue
        for name, kind_of in {"transposed": bool, **(kind.layout or {})}.items():
            formed, expected = _LAYOUT[kind_of]
            if (kind.layout or name in value) and not formed(value.get(name)):
                yield path, f"layout.{name}: expected {expected}, found {shown(value.get(name))}"


@CHAPTER.clause("M-19")
def replacements(subject: Subject) -> Iterator[Fault]:
    """Check that `replacements` is an object of objects."""
    value = subject.manifest.get("replacements", {})
    if not isinstance(value, dict) or not all(isinstance(entry, dict) for entry in value.values()):
        yield "replacements", f"expected an object of objects, found {shown(value)}"


@CHAPTER.clause("M-20")
def provenance(subject: Subject) -> Iterator[Fault]:
    """Check that `provenance` is a list of steps, each with its operation and tool."""
    steps = subject.manifest.get("provenance", [])
    if not isinstance(steps, list):
        yield "provenance", f"expected a list, found {shown(steps)}"
        return
    for i, step in enumerate(steps):
        formed = isinstance(step, dict) and _text(step.get("operation")) and _text(step.get("tool"))
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


@CHAPTER.clause("M-23")
def settings(subject: Subject) -> Iterator[Fault]:
    """Check that `settings` is an object."""
    if not isinstance(subject.manifest.get("settings", {}), dict):
        yield "settings", f"expected an object, found {shown(subject.manifest['settings'])}"


@CHAPTER.clause("S-07")
def name_length(subject: Subject) -> Iterator[Fault]:
    """Check the length of names."""
    names = [*subject.tensors]
    for field in ("modules", "replacements"):
        for path, entry in subject.entries(field):
            tensor = entry.get("tensor", "")
            names += [path, tensor] if isinstance(tensor, str) else [path]
    for name in names:
        if len(name.encode()) > MAX_NAME:
            yield shown(name), f"the name is {len(name.encode())} bytes long; the limit is {MAX_NAME}"


def is_digest(value: Any) -> bool:
    """Tell whether a JSON value is a well-formed digest of a registered algorithm."""
    try:
        return isinstance(value, str) and bool(digest.algorithm_of(value))
    except BadFile:
        return False


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


_LAYOUT: dict[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (lambda value: natural(value, 1), "a positive integer"),
    str: (_text, "a non-empty string"),
}
