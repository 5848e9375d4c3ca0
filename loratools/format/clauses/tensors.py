"""Chapter 4: the tensors of an adapter, every one accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from loratools.adapter.parts import BIAS, B
from loratools.format import keys
from loratools.format.clauses import Chapter, Fault, Subject, shown
from loratools.format.clauses.manifest import layout_faults
from loratools.format.registry import FLAG, KINDS
from loratools.storage import dtypes

CHAPTER = Chapter()
_FLOATS = frozenset(dtypes.FLOATS)


@CHAPTER.clause("T-01")
def names(subject: Subject) -> Iterator[Fault]:
    """Check that each tensor has one of PEFT's names."""
    for name, pair in subject.names.items():
        if pair is None:
            yield shown(name), f"the name does not have the form {keys.PREFIX}<module>.<part>"


@CHAPTER.clause("T-02")
def parts(subject: Subject) -> Iterator[Fault]:
    """Check that each module has exactly the parts of its kind."""
    for path, _, kind in subject.modules():
        if path not in subject.whole:
            have = sorted(subject.parts.get(path, ()))
            wanted = " or ".join(", ".join(sorted(required)) for required in kind.required)
            yield path, f"kind {kind.name} has the parts {wanted}; found {', '.join(have) or 'none'}"


@CHAPTER.clause("T-03")
def accounted(subject: Subject) -> Iterator[Fault]:
    """Check that no tensor is beside the modules and replacements of the manifest."""
    modules, expected = dict(subject.entries()), set(subject.replaced.values())
    for name, pair in subject.names.items():
        if pair and name not in expected and (not pair[1] or pair[0] not in modules):
            yield shown(name), "the manifest names neither a module nor a replacement for this tensor"


@CHAPTER.clause("T-04")
def replaced(subject: Subject) -> Iterator[Fault]:
    """Check that each replacement has its tensor."""
    for path, name in subject.replaced.items():
        if name not in subject.tensors:
            yield path, f"the manifest promises a replacement, but the file has no tensor {name}"


@CHAPTER.clause("T-05")
def dtype(subject: Subject) -> Iterator[Fault]:
    """Check that factors are floating-point numbers."""
    if {dtype for dtype, _ in subject.tensors.values()} <= _FLOATS:
        return
    for tensors in subject.parts.values():
        for part, name in tensors.items():
            if subject.tensors[name][0] not in dtypes.FLOATS and part != FLAG:
                yield name, f"dtype {subject.tensors[name][0]}; factors are one of {', '.join(dtypes.FLOATS)}"


def _shape(subject: Subject, wanted: str) -> Iterator[Fault]:
    """Check the shapes of the modules of a kind."""
    for path, entry, kind in subject.ranked.get(wanted, ()):
        layout = entry.get("layout", {})
        if (kind.layout or layout) and any(layout_faults(kind, entry)):
            continue
        shapes = {part: subject.tensors[name][1] for part, name in subject.parts[path].items()}
        if fault := kind.fault(shapes, entry["rank"], layout):
            yield path, f"{fault} (kind {kind.name}, rank {entry['rank']})"


CHAPTER |= {kind.clause: partial(_shape, wanted=name) for name, kind in KINDS.items()}


@CHAPTER.clause("T-11")
def bias(subject: Subject) -> Iterator[Fault]:
    """Check that the bias of B has one number for each output feature."""
    for path, tensors in subject.parts.items():
        if BIAS in tensors and B in tensors:
            have, out = subject.tensors[tensors[BIAS]][1], subject.tensors[tensors[B]][1][:1]
            if have != out:
                yield path, f"{BIAS} has shape {have}, expected {out}"


@CHAPTER.clause("T-12")
def empty(subject: Subject) -> Iterator[Fault]:
    """Check that no tensor is empty."""
    for name, (_, shape) in subject.tensors.items():
        if 0 in shape:
            yield shown(name), f"the tensor is empty, shape {shape} (an ungathered ZeRO-3 or FSDP save?)"
