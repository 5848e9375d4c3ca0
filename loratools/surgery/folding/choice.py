"""Which of a call's adapters are carried into a base, by what is known of the base and of what they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratools.adapter.input import AdapterInput
from loratools.adapter.model import Adapter
from loratools.decisions import decided, warned
from loratools.errors import IncompatibleAdapter, WrongBase, counted
from loratools.options import CheckBase, TrainedOn
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.codecs.folded import folded
from loratools.storage.codecs.state import statement
from loratools.surgery.inputs import ModelSource, open_model


@dataclass(frozen=True, slots=True, eq=False)
class InBasis:
    """The adapters of a call in the basis of its base.

    `original` is the original in that basis too, where the base is folded; `is_folded` says whether it is known to be.
    `told` says that nobody has to be warned, for the basis of every adapter is known. `carried_from` has the digests of
    the adapters as they were, None for those that stay.
    """

    inputs: tuple[AdapterInput, ...]
    original: Checkpoint | None
    is_folded: bool
    told: bool
    carried_from: tuple[str | None, ...]
    notes: tuple[str, ...] = ()


def in_basis_of(
    base: Checkpoint, inputs: Sequence[AdapterInput], original: ModelSource | None, trained_on: TrainedOn | None,
    check_base: CheckBase = "strict",
) -> InBasis:  # fmt: skip
    """Carry the adapters that were trained on the original into a base that is folded.

    `base` is logical. Raises what `onto` raises; `IncompatibleAdapter` where adapters of the original are to be carried
    and no original is given; `WrongBase` where an adapter is sealed with another original, and that is strict.
    """
    why = folded(statement(base.config), base.root)
    seen = [trained_on or _trained_on(each.adapter, base) for each in inputs]
    stay = (None,) * len(inputs)
    if original is None:
        if why and trained_on == "original":
            raise IncompatibleAdapter(
                f"{base.path} is another basis of the model that the adapter was trained on: {why}; the scales are "
                "read from the norms of the original, and none is given",
                hint="Give --original, the model that the base was quantized from.",
            )
        return InBasis(tuple(inputs), None, bool(why), all(one == "folded" for one in seen), stay)
    from loratools.surgery.folding.carry import onto
    from loratools.surgery.folding.original import in_basis
    from loratools.surgery.folding.scales import Scales

    opened = logical(open_model(original))
    scales = Scales(base, opened)
    if not why and not scales.in_norms():
        return InBasis(tuple(inputs), opened, False, True, stay)
    made: list[AdapterInput] = []
    before: list[str | None] = []
    notes: list[str] = []
    for i, (each, basis) in enumerate(zip(inputs, seen, strict=True), 1):
        if basis == "folded":
            made.append(each)
            before.append(None)
            continue
        _check_seal(each.adapter, opened, check_base)
        carried = onto(scales, each)
        made.append(carried.input)
        before.append(each.digest)
        notes.append(
            f"adapter {i} is carried from {opened.path} into the basis of {base.path}: {carried.modules} of its "
            f"{len(each.adapter.updates) + len(each.adapter.replacements)} modules change"
        )
    return InBasis(tuple(made), in_basis(scales), True, True, tuple(before), tuple(notes))


def carried(
    base: Checkpoint, given: AdapterInput, original: ModelSource | None, trained_on: TrainedOn | None
) -> AdapterInput:
    """Return an adapter in the basis of a base, to be served beside it; what is done is said.

    Raises what `in_basis_of` raises, and `IncompatibleAdapter` where a base is folded and nothing tells the basis.
    """
    basis = in_basis_of(base, [given], original, trained_on)
    if basis.is_folded and not basis.told:
        raise IncompatibleAdapter(
            f"{base.path} may be another basis of the model that the adapter was trained on, and no original is given "
            "from which the scales could be read",
            hint="Give --original, the model that the base was made from; --trained-on folded for an adapter of it.",
        )
    if original is not None and not basis.is_folded:
        warned("%s is not folded: its norms are those of the original, and the adapter stays as it is", base.path)
    for note in basis.notes:
        decided("%s", note)
    return basis.inputs[0]


def _trained_on(adapter: Adapter, base: Checkpoint) -> TrainedOn | None:
    """Return what an adapter's own file says of the model that it was trained on, as far as it tells the base."""
    if adapter.provenance:
        from loratools.surgery.folding.table import OPERATION

        if any(step.operation == OPERATION for step in adapter.provenance):
            return "folded"
    stored = base.stored or base
    return "folded" if adapter.base and adapter.base.schema and adapter.base.schema == stored.schema() else None


def _check_seal(adapter: Adapter, original: Checkpoint, check_base: CheckBase) -> None:
    """Raise `WrongBase` where an adapter is sealed, and not with the original."""
    if check_base != "strict" or adapter.base is None or not adapter.base.tensors:
        return
    from loratools.surgery.hash import hash_tensors

    recorded = adapter.base.tensors
    present = {name: original.specs[name] for name in recorded if name in original.specs}
    digests = hash_tensors(present)
    if other := sorted(name for name in recorded if digests.get(name) != recorded[name]):
        raise WrongBase(
            f"{original.path} is not the original that the adapter is sealed with: "
            f"{counted(len(other), 'tensor differs', 'tensors differ')}",
            other[:20],
            hint="Give the model that it was trained on; --trained-on folded if it was trained on the folded base.",
        )
