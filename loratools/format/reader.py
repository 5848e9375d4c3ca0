"""Read an adapter of our format into an `Adapter`, from its header alone."""

from __future__ import annotations

from pathlib import Path

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.errors import UnsupportedAdapter
from loratools.format import manifest, validate
from loratools.format.clauses import Subject
from loratools.format.registry import KINDS
from loratools.storage.header import Header
from loratools.storage.lazy import LazyTensor


def read(path: Path, *, verify: bool = False, header: Header | None = None) -> Adapter:
    """Return the adapter of a sealed file or folder; its tensors stay in the file until they are asked for.

    Every clause of `spec/v1` that a header can show is checked, and with `verify` the data against the adapter's digest
    too. `header` is the file's, where the caller has read it. `settings["loratools"]` keeps the manifest as found, so
    that a rewrite loses nothing.

    Raises `InvalidFormat` with every clause that is broken, `UnsupportedAdapter` for a newer format, an extension that
    must be understood, or a registered kind that this loratools does not apply yet.
    """
    subject = validate.open_subject(path, header)
    problems = [subject] if isinstance(subject, validate.Problem) else validate.problems(subject, digest=verify)
    if problems or isinstance(subject, validate.Problem):
        raise validate.refusal(path, problems)
    return adapter_of(path, subject)


def adapter_of(path: Path, subject: Subject) -> Adapter:
    """Return the adapter of a subject that breaks no clause, opened at `path`; raise as `read` what is not applied."""
    document, specs = subject.manifest, subject.specs or {}
    layers = manifest.layers_of(document)
    return Adapter(
        updates=_updates(path, subject),
        replacements={parameter: LazyTensor.stored(specs[name]) for parameter, name in subject.replaced.items()},
        base=manifest.base_of(document),
        provenance=manifest.steps_of(document),
        dialect="loratools",
        orientation={
            path: entry["layout"]["transposed"]
            for path, entry in document["modules"].items()
            if "transposed" in entry.get("layout", {})
        },
        settings={
            **document.get("settings", {}),
            **({manifest.LAYERS: layers} if layers else {}),
            manifest.ORIGIN: document,
        },
    )


def _updates(path: Path, subject: Subject) -> dict[str, Update]:
    updates: dict[str, Update] = {}
    unknown: list[str] = []
    tensors, modules, specs = subject.parts, subject.manifest["modules"], subject.specs or {}
    stored = LazyTensor.stored
    build = {kind: kinds.get(kind).build for kind in {entry["kind"] for entry in modules.values()} & {*kinds.names()}}
    for module, entry in modules.items():
        kind = entry["kind"]
        if kind not in build:
            unknown.append(f"{module}: kind {kind!r}")
            continue
        parts = {part: stored(specs[name]) for part, name in tensors[module].items()}
        extra = {"layout": entry["layout"]} if KINDS[kind].layout else {}
        update: Update = build[kind](parts, float(entry["scaling"]), float(entry["alpha"]), **extra)
        if update.parts.keys() != parts.keys() and (left := parts.keys() - update.parts.keys()):
            unknown.append(f"{module}: kind {kind!r} with {', '.join(sorted(left))}")
        updates[module] = update
    if unknown:
        share, known = f"{len(unknown)} of {len(modules)} modules", ", ".join(kinds.names())
        raise UnsupportedAdapter(f"{path}: this loratools does not apply {share}; it knows {known}", unknown)
    return updates
