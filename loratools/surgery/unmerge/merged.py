"""A model that holds adapters, with what its record and its residual know of the merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.adapter.placement.image import named_for
from loratools.adapter.placement.layers import replicates
from loratools.engine.plan import MergePlan
from loratools.engine.residual import Residual
from loratools.errors import IncompatibleAdapter
from loratools.format.digest import checked_digest
from loratools.storage import dtypes, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.codecs.floats import unsigned, widen
from loratools.storage.companions import RECORD, RESIDUAL
from loratools.storage.header import TensorSpec
from loratools.storage.strict_json import read_json


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """A merged model, its record ({} if it has none), and its adapters in the order of the record, with weights.

    The adapters are under the model's names; `digests` are those of the adapters as they were read.
    """

    model: Checkpoint
    record: Mapping[str, Any]
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    left: tuple[str, ...]
    digests: tuple[str, ...]

    @classmethod
    def open(
        cls, path: str | Path, adapters: Sequence[str | Path | Adapter], weights: Sequence[float] | None
    ) -> Merged:
        """Open a merged model and find each adapter in its record by its digest.

        `left` are the digests of merged adapters that were not given. `weights` are for a model without a record;
        beside one they must be those recorded. Raises `IncompatibleAdapter` for an adapter that was not merged.
        """
        model = Checkpoint.open(path)
        opened = [one if isinstance(one, Adapter) else dialects.open_adapter(one, base=model) for one in adapters]
        if not opened or (weights is not None and len(weights) != len(opened)):
            raise ValueError(f"{len(opened)} adapter(s) and {len(weights or ())} weight(s)")
        file = model.root / RECORD
        record = read_json(file) if model.root.is_dir() and file.is_file() else {}
        entries: Any = record.get("adapters")
        digests = [checked_digest(one, str(given)) for one, given in zip(opened, adapters, strict=True)]
        named = [named_for(one, model) for one in opened]
        if record.get("operation") != "merge" or not _is_complete(record):
            return cls(model, {}, tuple(named), tuple(weights or [1.0] * len(opened)), (), tuple(digests))
        free = list(range(len(entries)))
        places: list[tuple[int, int]] = []
        problems = []
        for i, value in enumerate(digests):
            found = next((k for k in free if entries[k]["digest"] == value), None)
            if found is None:
                problems.append(f"adapter {i + 1}: its digest is {value}")
                continue
            if weights is not None and weights[i] != entries[found]["weight"]:
                problems.append(
                    f"adapter {i + 1}: merged with weight {entries[found]['weight']:g}, given {weights[i]:g}"
                )
            free.remove(found)
            places.append((found, i))
        if problems:
            raise IncompatibleAdapter(
                f"{file}: the record of this model's merge does not list what is to be taken out",
                [*problems, *(f"recorded: {entry['digest']}, weight {entry['weight']:g}" for entry in entries)],
            )
        places.sort()
        return cls(
            model, record, tuple(named[i] for _, i in places), tuple(float(entries[k]["weight"]) for k, _ in places),
            tuple(str(entries[k]["digest"]) for k in free), tuple(digests[i] for _, i in places),
        )  # fmt: skip

    def residual(self) -> Residual | None:
        """Open the residual, if the merge kept one."""
        path = self.model.root / RESIDUAL
        return Residual.open(path) if self.record and path.is_file() else None

    def check_layers(self) -> None:
        """Raise `IncompatibleAdapter` if the merge repeated layers: one of the base is several of the model."""
        if replicates(self.adapters):
            raise IncompatibleAdapter(
                f"{self.model.path}: the merge repeated layers of the base (layer_replication)",
                hint="Only the base model leads back to it: unmerge with --base.",
            )

    def check_complete(self) -> None:
        """Raise `IncompatibleAdapter` unless all merged adapters were given: only all of them lead back to the base."""
        if self.left:
            raise IncompatibleAdapter(
                f"{self.model.path}: holds {len(self.left)} more adapter(s), without which the base cannot be restored",
                [f"not given: {value}" for value in self.left],
                hint="Give every adapter of the merge; then merge those that are to stay into the result.",
            )


def check_sums(plan: MergePlan) -> None:
    """Raise `IncompatibleAdapter` unless all that a plan does is to add, so that it can be subtracted."""
    problems = [
        f"{name}: was replaced by the adapter's own" for name, change in plan.touched().items() if change.replaced
    ]
    problems += [
        f"{name}: {placement.update.kind} is not a sum"
        for name, change in plan.touched().items()
        for _, placement in change.placements
        if not placement.update.additive
    ]
    if problems:
        raise IncompatibleAdapter(
            "W' − ΔW does not undo this merge",
            problems[:20],
            hint="Merge with --keep-residual, which restores any base; or use the base model.",
        )


def error_bound(plan: MergePlan, folder: Path, name: str) -> float:
    """Return (2^-p + 8·2^-q)·(max |W'| + max |W̃|) of a tensor that a plan wrote: how far a sum undone can be off.

    2^-p is half a unit of the dtype, for each of the two roundings; 2^-q that of the arithmetic, 24 bits (53 for F64),
    whose sums err by a few.
    """
    file, slot = next((file, slot) for file in plan.files for slot in file.slots if slot.name == name)
    after = TensorSpec(slot.dtype, slot.shape, folder / file.name, slot.offset, slot.offset + slot.nbytes)
    total = sum(_largest(spec) for spec in (plan.changes[name].source, after))
    precision = dtypes.MANTISSA[slot.dtype]
    return float((2.0**-precision + 8 * 2.0 ** -max(precision, 24)) * total)


def _largest(spec: TensorSpec) -> float:
    import numpy as np

    largest = 0.0
    for chunk in files.chunks(spec):
        bits = np.frombuffer(chunk, unsigned(spec.dtype))
        largest = max(largest, float(np.abs(widen(bits, spec.dtype, np.float64)).max()))
    return largest


def _is_complete(record: Mapping[str, Any]) -> bool:
    """Tell whether a record has what is needed to undo its merge: a file that people may edit."""
    adapters, base = record.get("adapters"), record.get("base")
    return (
        isinstance(adapters, list)
        and all(
            isinstance(entry, Mapping)
            and isinstance(entry.get("digest"), str)
            and isinstance(entry.get("weight"), int | float)
            for entry in adapters
        )
        and isinstance(base, Mapping)
        and isinstance(base.get("tensors"), Mapping)
    )
