"""Chapters 5, 6 and 8: digests, extensions, versions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from loratools.format import meaning
from loratools.format.clauses import Chapter, Fault, Subject, natural, shown
from loratools.format.clauses.manifest import is_digest
from loratools.format.manifest import LAYERS
from loratools.storage import digest, files

CHAPTER = Chapter()
UNDERSTOOD = frozenset({LAYERS})
"""Names of the extensions that this reader implements: those that the specification registers."""

_NAME = r"[a-z0-9]+([._-][a-z0-9]+)*"


@CHAPTER.clause("I-01")
def own_digest(subject: Subject) -> Iterator[Fault]:
    """Check that `digest` is well formed."""
    if not is_digest(subject.manifest.get("digest")):
        yield "digest", f"expected blake3: or sha256: and 64 hex digits, found {shown(subject.manifest.get('digest'))}"


@CHAPTER.clause("I-02")
def own_tensors(subject: Subject) -> Iterator[Fault]:
    """Compare `digest` with the tensors of the file: the one clause that reads all data."""
    stated = subject.manifest.get("digest")
    if subject.specs is None or not isinstance(stated, str) or not is_digest(stated):
        return
    algorithm = digest.algorithm_of(stated)
    computed = digest.root_of_all(subject.specs, files.chunks_of_all, algorithm)
    if computed != stated:
        fault = f"the tensors are not those that were sealed: the manifest says {stated}, the file has {computed}"
        yield "digest", fault


@CHAPTER.clause("I-11")
def meaning_form(subject: Subject) -> Iterator[Fault]:
    """Check that `meaning` is well formed, and there where the version promises it."""
    needed = "meaning" in subject.manifest or subject.manifest.get("format_version") == "1.1"
    if needed and not is_digest(subject.manifest.get("meaning")):
        found = shown(subject.manifest.get("meaning"))
        yield "meaning", f"expected blake3: or sha256: and 64 hex digits, found {found}"


@CHAPTER.clause("I-12")
def sealed_meaning(subject: Subject) -> Iterator[Fault]:
    """Compare `meaning` with what the manifest says of modules and replacements."""
    stated = subject.manifest.get("meaning")
    listed = subject.manifest.get("extensions", [])
    sound = isinstance(listed, list) and len(_extensions(subject)) == len(listed)
    if not isinstance(stated, str) or not is_digest(stated) or not sound:
        return
    document = {name: dict(subject.entries(name)) for name in ("modules", "replacements")} | {"extensions": listed}
    try:
        computed = meaning.of(document, subject.parts, digest.algorithm_of(stated))
    except ValueError:  # what canonical JSON cannot hold breaks M-02
        return
    if computed != stated:
        yield (
            "meaning",
            (
                "kinds, scalings, layouts or target tensors are not those that were sealed: the manifest says "
                f"{stated}, its modules have {computed}"
            ),
        )


@CHAPTER.clause("I-06")
def base_hash(subject: Subject) -> Iterator[Fault]:
    """Check the form of the base hash: its tiers and their digests."""
    base = subject.manifest.get("base_model")
    if not isinstance(base, dict) or "hash" not in base:
        return
    tiers = base["hash"]
    if not isinstance(tiers, dict) or not isinstance(tiers.get("tensors", {}), dict):
        yield "base_model.hash", f"expected an object with schema, tensors and root, found {shown(tiers)}"
        return
    for where, value in _digests(tiers):
        if not is_digest(value):
            yield f"base_model.hash.{where}", f"expected a digest, found {shown(value)}"


@CHAPTER.clause("I-14")
def base_numbers(subject: Subject) -> Iterator[Fault]:
    """Check the form of what a base hash says of a quantized base's numbers."""
    tiers = _tiers(subject)
    if not isinstance(tiers.get("weights", {}), dict):
        yield "base_model.hash.weights", f"expected an object of digests, found {shown(tiers['weights'])}"
    for where, value in _numbers(tiers):
        if not is_digest(value):
            yield f"base_model.hash.{where}", f"expected a digest, found {shown(value)}"


@CHAPTER.clause("I-07")
def one_algorithm(subject: Subject) -> Iterator[Fault]:
    """Check that all digests of a base hash are of one algorithm."""
    stated = [value for _, value in (*_digests(_tiers(subject)), *_numbers(_tiers(subject))) if isinstance(value, str)]
    if len({value.partition(":")[0] for value in stated}) < 2:  # of which the others are no more
        return
    algorithms = {digest.algorithm_of(value) for value in stated if is_digest(value)}
    if len(algorithms) > 1:
        yield "base_model.hash", f"mixes digests of {' and '.join(sorted(algorithms))}"


@CHAPTER.clause("I-08")
def touched(subject: Subject) -> Iterator[Fault]:
    """Check that a base hash covers each base tensor that the manifest names."""
    covered = _tiers(subject).get("tensors")
    if not isinstance(covered, dict):
        return
    for path, entry in subject.entries("modules", "replacements"):
        tensor = entry.get("tensor")
        if isinstance(tensor, str) and tensor and tensor not in covered:
            yield path, f"base_model.hash.tensors has no digest of {shown(tensor)}"


def _tiers(subject: Subject) -> Mapping[str, Any]:
    base = subject.manifest.get("base_model")
    tiers = base.get("hash") if isinstance(base, dict) else None
    return tiers if isinstance(tiers, dict) else {}


def _digests(tiers: Mapping[str, Any]) -> list[tuple[str, Any]]:
    tensors = tiers.get("tensors", {})
    covered = [(f"tensors.{name}", value) for name, value in tensors.items()] if isinstance(tensors, dict) else []
    return [(name, tiers[name]) for name in ("schema", "root") if name in tiers] + covered


def _numbers(tiers: Mapping[str, Any]) -> list[tuple[str, Any]]:
    weights = tiers.get("weights", {})
    covered = [(f"weights.{name}", value) for name, value in weights.items()] if isinstance(weights, dict) else []
    return [(name, tiers[name]) for name in ("logical",) if name in tiers] + covered


@CHAPTER.clause("X-01")
def extensions(subject: Subject) -> Iterator[Fault]:
    """Check that `extensions` is a list of objects with a name."""
    listed = subject.manifest.get("extensions", [])
    if not isinstance(listed, list):
        yield "extensions", f"expected a list, found {shown(listed)}"
        return
    for i, extension in enumerate(listed):
        if (
            not isinstance(extension, dict)
            or not isinstance(extension.get("name"), str)
            or not isinstance(extension.get("must_understand", True), bool)
            or not isinstance(extension.get("configuration", {}), dict)
        ):
            yield f"extensions[{i}]", f"expected name, must_understand and configuration, found {shown(extension)}"


@CHAPTER.clause("X-02")
def extension_name(subject: Subject) -> Iterator[Fault]:
    """Check the grammar of extension names."""
    for name, _ in _extensions(subject):
        if len(name) > 64 or not re.fullmatch(_NAME, name):
            yield "extensions", f"{shown(name)} is not a name of lower-case words with '.', '_' or '-' between them"


@CHAPTER.clause("X-03")
def extension_once(subject: Subject) -> Iterator[Fault]:
    """Check that no extension occurs twice."""
    counts = Counter(name for name, _ in _extensions(subject))
    yield from (("extensions", f"{shown(name)} occurs twice") for name in sorted(counts) if counts[name] > 1)


@CHAPTER.clause("X-04")
def extension_understood(subject: Subject) -> Iterator[Fault]:
    """Refuse an extension that must be understood and is not."""
    for name, must in _extensions(subject):
        if must and name not in UNDERSTOOD:
            yield "extensions", f"{shown(name)} must be understood, and this reader does not know it"


@CHAPTER.clause("X-06")
def layers(subject: Subject) -> Iterator[Fault]:
    """Check the layers that `layer_replication` repeats."""
    listed = subject.manifest.get("extensions", [])
    for extension in listed if isinstance(listed, list) else []:
        if not isinstance(extension, dict) or extension.get("name") != LAYERS:
            continue
        configuration = extension.get("configuration", {})
        ranges = configuration.get("layers") if isinstance(configuration, dict) else None
        if not _ranges(ranges) or extension.get("must_understand", True) is False:
            where = f"{LAYERS}: expected must_understand and layers, pairs [start, stop] of them"
            yield "extensions", f"{where}; found {shown(ranges)}"


def _ranges(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return pairs and bool(value) and all(natural(start) and natural(stop, 1) and start < stop for start, stop in value)


def _extensions(subject: Subject) -> list[tuple[str, bool]]:
    listed = subject.manifest.get("extensions", [])
    return [
        (extension["name"], extension.get("must_understand", True) is True)
        for extension in (listed if isinstance(listed, list) else [])
        if isinstance(extension, dict) and isinstance(extension.get("name"), str)
    ]
