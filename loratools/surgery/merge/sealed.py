"""Is this the base that the adapters of a merge were sealed with? What is to be compared while its tensors are read.

A weight of a quantized base is that of the sealed one where its codes are, by the digests of its stored parts, or where
its numbers in 16 bit are: those of the sealed base's plain tensor, or of its codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter.identity import compare
from loratools.adapter.input import AdapterInput
from loratools.adapter.model import BaseIdentity
from loratools.adapter.naming.wrappers import normalized
from loratools.adapter.placement.resolve import Placement
from loratools.errors import WrongBase, counted
from loratools.options import CheckBase
from loratools.storage import digest
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import stored_names
from loratools.surgery.base import of_headers, other_type


@dataclass(frozen=True, slots=True, eq=False)
class Sealed:
    """What adapters recorded of the tensors that they change, by name, each with the number of its adapter.

    `numbers` are digests of the tensor, of codes by value; `parts` those of the stored parts of codes, by their names.
    """

    numbers: Mapping[str, tuple[tuple[int, str], ...]]
    parts: Mapping[str, tuple[tuple[int, Mapping[str, str]], ...]]
    notes: tuple[str, ...]


def sealed(
    inputs: Sequence[AdapterInput], placements: Mapping[str, Sequence[tuple[int, Placement]]], base: Checkpoint,
    check_base: CheckBase, below: BaseIdentity | None,
) -> Sealed:  # fmt: skip
    """Return the digests that adapters recorded of the tensors that they change; they are compared while it is merged.

    An adapter that recorded a schema alone is compared here, and so are tensors that are not the base's any more, with
    what is known of them (`below`). Raises `WrongBase` with all that differs, where `check_base` is strict.
    """
    numbers: dict[str, list[tuple[int, str]]] = {}
    parts: dict[str, list[tuple[int, Mapping[str, str]]]] = {}
    notes, problems = [], []
    for i, each in enumerate(inputs):
        who, identity = f"adapter {i + 1}", each.adapter.base
        if check_base != "off" and identity is not None and (typed := other_type(identity, base)):
            problems.append(f"{who}: {typed}")
        if check_base == "off":
            notes.append(f"{who}: base model not checked (--check-base off)")
        elif identity is None or not identity.sealed:
            notes.append(f"{who}: carries no base hash, so the base model cannot be checked")
        elif not identity.tensors and not identity.weights and identity.schema is None:
            notes.append(f"{who}: has a root hash only; compare it with `loratools hash`")
        elif not identity.tensors and not identity.weights:
            known = of_headers(base, identity)
            if below is not None and below.schema != base.schema():  # a cast: the schema below is another one
                known = BaseIdentity(schema=below.schema)
            if compare(identity, known).differing:
                problems.append(f"{who}: names, dtypes or shapes of the base differ from those it was sealed with")
        else:
            recorded = _by_any_name({**identity.tensors, **identity.weights})
            stored = _by_any_name(identity.tensors)
            gone = []
            for name in sorted(name for name, on_it in placements.items() if any(j == i for j, _ in on_it)):
                origin = base.origin(name)
                names = _parts_of(name, base)
                of_parts = {part: stored[part] for part in names if part in stored}
                value = recorded.get(origin) or recorded.get(normalized(origin)) or recorded.get(normalized(name))
                if of_parts.keys() & set(names[:1]):
                    parts.setdefault(name, []).append((i, of_parts))
                if value:
                    if below is None or origin not in below.tensors:
                        numbers.setdefault(name, []).append((i, value))
                        continue
                    then = below.tensors[origin]
                    if not then or digest.algorithm_of(then) != digest.algorithm_of(value):
                        gone.append(name)
                    elif then != value:
                        problems.append(f"{who}: {name} of the base is not the one it was sealed with")
                elif name in base.specs and not of_parts:
                    problems.append(f"{who}: changes {name}, which its recorded base does not list")
            if gone:
                notes.append(
                    f"{who}: no longer the base's: {counted(len(gone), 'tensor')} that it changes, such as {gone[0]}; "
                    "no record says what was there, so that is not compared with its seal"
                )
    if problems and check_base == "strict":
        hint = "Use the right base, or --check-base warn if you know better."
        raise WrongBase(f"{base.path} is not the base model that was recorded", problems, hint=hint)
    frozen = {name: tuple(each) for name, each in numbers.items()}
    return Sealed(frozen, {name: tuple(each) for name, each in parts.items()}, (*notes, *problems))


def _by_any_name(digests: Mapping[str, str]) -> dict[str, str]:
    return {normalized(name): value for name, value in digests.items()} | dict(digests)


def _parts_of(name: str, base: Checkpoint) -> list[str]:
    """Return the names of the stored parts of codes, the codes first; [] of a tensor that is numbers."""
    return stored_names(name, base) if name in base.specs and base.specs[name].encoding else []
