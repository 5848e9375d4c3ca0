"""Every clause of the specification that binds a file, checked at once (`spec/v1`).

A clause is one function in `loratools/format/clauses/`; a problem names it. What must hold before anything else can be
read (the container, the manifest's JSON, the version) is checked first, and stops the rest where it does not hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.errors import BadFile, InvalidFormat, LoraToolsError, UnsupportedAdapter, counted
from loratools.format import manifest
from loratools.format.clauses import ADAPTER_FILE, CONFIG_FILE, Check, Subject, integrity, layout, shown, tensors
from loratools.format.clauses import manifest as fields
from loratools.format.clauses.container import clause_of
from loratools.storage.header import Header, check_name, read_header
from loratools.storage.strict_json import parse_json_object, read_json

CLAUSES: Mapping[str, Check] = {
    identifier: chapter.CHAPTER[identifier]
    for chapter in (layout, fields, tensors, integrity)
    for identifier in sorted(chapter.CHAPTER)
}
"""Clause id -> the function that checks it, for all clauses behind the gate."""

GATE = ("L-01", "S-01", "S-02", "S-03", "S-04", "S-05", "S-06", "L-03", "L-02", "M-01", "S-08", "M-03", "V-01", "L-04")
"""Clauses without which nothing else can be read; `open_subject` checks them in this order."""

MAX_CONFIG = 10_000_000
"""Bytes of an `adapter_config.json` that are read."""

_DATA = frozenset({"I-02"})
_FIELDS_OF_ONE = frozenset({"base_model", "digest", "provenance"})
_OF_ONE = _DATA | {
    "I-01", "I-06", "I-07", "I-08", "I-14", "M-02", "M-16", "M-17", "M-20", "M-21", "M-22", "M-26",
}  # fmt: skip
"""The clauses that look at these fields, at the text of the manifest, or at the data."""
_REMEMBERED, _MANY = 16, 4096
_SOUND: dict[tuple[str, ...], Mapping[str, tuple[str, tuple[int, ...]]]] = {}
"""Likeness -> the tensors of an adapter without a problem; the oldest goes first, and those of many are not kept."""
_CHECKED = (*GATE, *CLAUSES)
_OF_HEADER = tuple(name for name in _CHECKED if name not in _DATA)
_PARENTS = frozenset({dict, list})
_BEYOND = frozenset({"V-01", "X-04", "M-11"})


@dataclass(frozen=True, slots=True)
class Problem:
    """A clause that an adapter breaks, where, and what was found."""

    clause: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"[{self.clause}] {self.where}: {self.message}"


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a validation: the problems, and what was looked at.

    `clauses` are the ids that were checked, `bytes_hashed` the data that went into the adapter's digest.
    """

    problems: tuple[Problem, ...]
    clauses: tuple[str, ...]
    format_version: str | None = None
    modules: int = 0
    replacements: int = 0
    tensors: int = 0
    bytes_hashed: int = 0


class _Refused(Exception):
    def __init__(self, clause: str, where: str, message: str) -> None:
        self.problem = Problem(clause, where, message)


def validate(path: Path, *, digest: bool = True) -> list[Problem]:
    """Return every problem of an adapter file or folder, each with the clause it breaks; none if it conforms.

    `digest` also reads all data and compares them with the adapter's own digest (clause I-02).
    Raises `BadFile` only where there is nothing to read at all.
    """
    return list(report(path, digest=digest).problems)


def report(path: Path, *, digest: bool = True) -> Report:
    """Validate like `validate`, and say what was looked at."""
    return report_of(open_subject(path), digest=digest)


def report_of(subject: Subject | Problem, *, digest: bool = True) -> Report:
    """Validate what `open_subject` returned, and say what was looked at."""
    if isinstance(subject, Problem):
        return Report((subject,), GATE)
    size = sum([spec.stop - spec.start for spec in subject.specs.values()]) if digest and subject.specs else 0
    return Report(
        tuple(problems(subject, digest=digest)), _CHECKED if digest else _OF_HEADER, subject.manifest["format_version"],
        len(subject.entries()), len(subject.entries("replacements")), len(subject.tensors), size,
    )  # fmt: skip


def problems(subject: Subject, *, digest: bool) -> list[Problem]:
    """Return the problems of a subject that came through the gate.

    The adapters of one trainer differ in their tensors' data and a few fields: of one that has all else from another
    without a problem, only the clauses are asked that look at these.
    """
    clauses = (_CHECKED if digest else _OF_HEADER)[len(GATE) :]
    likeness = _likeness(subject)
    alike = likeness is not None and _SOUND.get(likeness) == subject.tensors
    if alike and not _faults(subject, [name for name in clauses if name in _OF_ONE]):
        return []
    problems = _faults(subject, clauses)
    if likeness and not problems:
        for oldest in [*_SOUND][: max(0, len(_SOUND) - _REMEMBERED + 1)]:
            _SOUND.pop(oldest, None)  # another thread may have been first
        _SOUND[likeness] = subject.tensors
    return problems


def _faults(subject: Subject, clauses: Iterable[str]) -> list[Problem]:
    return [Problem(name, where, message) for name in clauses for where, message in CLAUSES[name](subject)]


def _likeness(subject: Subject) -> tuple[str, ...] | None:
    """Return what the other clauses look at but for the tensors, as texts, which tell 1 from 1.0 and from true."""
    if len(subject.tensors) > _MANY:
        return None
    try:
        fields = [f"{name}:{text}" for name, text in subject.fields.items() if name not in _FIELDS_OF_ONE]
    except ValueError:
        return None
    return json.dumps(subject.config), *fields


def refusal(path: Path, problems: list[Problem]) -> LoraToolsError:
    """Return the exception that says these problems: `UnsupportedAdapter` if all are of what a newer reader knows."""
    lines = tuple(map(str, problems))
    if all(problem.clause in _BEYOND for problem in problems):
        return UnsupportedAdapter(f"{path}: this adapter needs a newer reader", lines, hint="Upgrade loratools.")
    return InvalidFormat(
        f"{path}: not a valid adapter of format {manifest.VERSION}: {counted(len(problems), 'problem')}", lines
    )


def open_subject(path: Path, header: Header | None = None) -> Subject | Problem:
    """Read the header, the manifest and the config of an adapter file or folder, or the first clause that forbids it.

    `header` is the file's, where the caller has read it already.

    Raises `BadFile` if there is no such file or folder.
    """
    try:
        if not path.is_dir():
            return _open(path, header)
        if header is None and not (path / ADAPTER_FILE).is_file():
            raise _Refused("L-01", str(path), f"a folder without {ADAPTER_FILE}")
        return _open(path / ADAPTER_FILE, header, path)
    except _Refused as refused:
        return refused.problem


def _open(path: Path, header: Header | None = None, folder: Path | None = None) -> Subject:
    try:
        header = header or read_header(path)
    except BadFile as error:
        if not path.is_file():
            raise
        raise _Refused(clause_of(path), path.name, error.line.removeprefix(f"{path}: ")) from None
    text = header.metadata.get(manifest.METADATA_KEY)
    if text is None:
        raise _Refused("L-03", path.name, "no loratools manifest: the adapter is not sealed in this format")
    if header.metadata.get("format") != "pt":
        raise _Refused("L-02", path.name, f"metadata format: expected pt, found {shown(header.metadata.get('format'))}")
    document = _parse(text, path)
    _check_version(document, path)
    modules = document.get("modules")
    for name in modules if isinstance(modules, dict) else ():
        check_name(name, path)  # what compares them takes time that grows faster than they do
    shapes = {name: (spec.dtype, spec.shape) for name, spec in header.tensors.items()}
    config = _config(folder / CONFIG_FILE) if folder else None
    return Subject(folder or path, shapes, document, text, config, header.tensors)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        document = parse_json_object(text.encode(), path)
    except BadFile as error:
        why = error.line.removeprefix(f"{path}: ")
        raise _Refused("M-01", path.name, f"the manifest is not a JSON object: {why}") from None
    level: list[Any] = [document]
    for _ in range(fields.MAX_DEPTH):
        if not level:
            break
        below: list[Any] = []
        for parent in level:
            children = parent.values() if type(parent) is dict else parent
            below += [child for child in children if type(child) in _PARENTS]
        level = below
    if level:
        raise _Refused("S-08", path.name, f"the manifest is nested more than {fields.MAX_DEPTH} levels deep")
    return document


def _check_version(document: Mapping[str, Any], path: Path) -> None:
    version = document.get("format_version")
    if not isinstance(version, str) or not re.fullmatch(r"[1-9][0-9]{0,8}\.(0|[1-9][0-9]{0,8})", version):
        raise _Refused("M-03", path.name, f"format_version: expected MAJOR.MINOR, found {shown(version)}")
    ours, theirs = manifest.VERSION.partition(".")[0], version.partition(".")[0]
    if int(theirs) > int(ours):
        raise _Refused("V-01", path.name, f"the format version is {version}; this reader knows {ours}.x")


def _config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise _Refused("L-04", str(path.parent), f"a folder without {CONFIG_FILE}")
    try:
        return read_json(path, strict=True, most=MAX_CONFIG)
    except BadFile as error:
        raise _Refused("L-05", path.name, error.line.removeprefix(f"{path}: ")) from None
