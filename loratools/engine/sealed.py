"""Hold the base's tensors, while they are merged, against what adapters recorded of them when they were sealed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from loratools.engine.plan import Change, MergePlan
from loratools.engine.task import TensorResult
from loratools.errors import WrongBase
from loratools.storage import digest, files

if TYPE_CHECKING:
    from loratools.storage.codecs import Encoding


def algorithms(change: Change) -> list[str]:
    """Return the algorithms to hash a base tensor with: those that adapters recorded, and the default one.

    What is stored as codes is hashed by value, and only where an adapter recorded a digest.
    """
    if not change.placements or change.replaced:
        return []
    recorded = {digest.algorithm_of(value) for _, value in change.expected}
    return sorted(recorded if _encoding(change) else recorded | {digest.DEFAULT})


def compare(plan: MergePlan, change: Change, result: TensorResult) -> None:
    """Hold the digests of a tensor of the base against the recorded ones: raise `WrongBase`, or warn."""
    numbers, stored = dict(change.expected), dict(change.stored)
    for number in sorted(numbers.keys() | stored.keys()):
        recorded = numbers.get(number)
        read = result.digests[digest.algorithm_of(recorded)] if recorded else None
        if (recorded and read == recorded) or (number in stored and _is_stored(plan, stored[number])):
            continue
        text = f"tensor {result.name} is not that of the base which adapter {number + 1} was sealed with"
        which = f"its digest is {read}, recorded is {recorded}"
        if encoding := _encoding(change):
            which = (
                f"this base is a quantized copy ({encoding.module.scheme}, {encoding.label}), and neither its codes "
                "nor the numbers that they stand for are those that were sealed"
            )
        if plan.strict:
            raise WrongBase(
                f"{change.source.file}: {text}: {which}",
                hint="Use the right base, or --check-base warn to merge all the same.",
            )
        result.warnings.append(f"{text}: {which}" if encoding else text)


def _encoding(change: Change) -> Encoding | None:
    """Return how the base stores a tensor as codes; None where it is numbers."""
    return change.recoded.encoding if change.recoded else cast("Encoding | None", change.source.encoding)


def _is_stored(plan: MergePlan, recorded: Mapping[str, str]) -> bool:
    """Tell whether stored parts of codes, by name, have the digests that were recorded; it reads them."""
    stored = (plan.base.stored or plan.base).specs
    return all(
        digest.tensor(spec.dtype, spec.shape, files.chunks(spec), digest.algorithm_of(value)) == value
        for spec, value in ((stored[name], value) for name, value in recorded.items())
    )
