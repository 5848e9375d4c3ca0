"""An adapter that was trained on the original model, carried into a folded base: A·diag(s_in), diag(1/s_out)·B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loratools.adapter.basis import Basis, along, made
from loratools.adapter.input import AdapterInput
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.adapter.placement.image import named_for
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.whole import resolve_replacements
from loratools.errors import UnsupportedAdapter, counted
from loratools.format.digest import adapter_digest
from loratools.format.record import TOOL
from loratools.storage.codecs.floats import Array
from loratools.storage.lazy import LazyTensor
from loratools.surgery.folding.scales import Scales, reader
from loratools.surgery.folding.table import OPERATION
from loratools.surgery.inputs import in_a_file

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """An adapter in the basis of the base, and how many of its modules and whole tensors another basis changed."""

    input: AdapterInput
    modules: int


def onto(scales: Scales, given: AdapterInput) -> Carried:
    """Return an adapter of the original that changes the folded base as it changed the original.

    Its factors are float32 then, its digest is that of the new tensors, and it is no longer sealed with the original.

    Raises `UnsupportedAdapter` with every module whose kind cannot be carried, `WrongBase` where the weights that it
    changes are not the original's, folded.
    """
    adapter = named_for(given.adapter, scales.base)
    updates, placed = dict(adapter.updates), _placed(adapter, scales)
    problems, tensors = [], set()
    for module, placements in placed.items():
        tensors |= {placement.site.tensor for placement in placements}
        update = placements[0].update if placements[0].expert is None else adapter.updates[module]
        try:
            updates[module] = _carried(update, placements, scales, given.weight)
        except ValueError as error:
            problems.append(f"{module}: kind {update.kind}: {error}")
    shapes = scales.base.shapes
    placed_whole = resolve_replacements(adapter, shapes, scales.base.config)
    whole = {id(lazy): name for name, lazy in placed_whole.items()}
    replacements = {
        path: _whole(whole[id(lazy)], lazy, scales) if id(lazy) in whole else lazy
        for path, lazy in adapter.replacements.items()
    }
    if problems:
        raise UnsupportedAdapter(
            f"{counted(len(problems), 'module')} of the adapter "
            f"cannot be carried into {scales.base.path}, whose weights are "
            "scaled",
            problems,
            hint="Merge it into the original, then quantize the result; --trained-on folded if it is of this base.",
        )
    scales.check(tensors)
    changed = sum(updates[module] is not update for module, update in adapter.updates.items())
    changed += sum(replacements[path] is not lazy for path, lazy in adapter.replacements.items())
    identity = adapter.base and BaseIdentity(adapter.base.id, adapter.base.revision, model_type=adapter.base.model_type)
    step = Step(OPERATION, TOOL, {}, ({"digest": given.digest},))
    made_of = replace(adapter, updates=updates, replacements=replacements, base=identity)
    kept = in_a_file(replace(made_of, provenance=(*adapter.provenance, step)))
    return Carried(replace(given, adapter=kept, digest=adapter_digest(kept)), changed)


def _placed(adapter: Adapter, scales: Scales) -> dict[str, list[Placement]]:
    """Return where the modules land into which scales may be folded; those of a bias are with their weight."""
    updates = {module: update for module, update in adapter.updates.items() if scales.concerns(module)}
    if not updates:
        return {}
    placed: dict[str, list[Placement]] = {}
    some = replace(adapter, updates=updates, replacements={}, copies={})
    for placement in resolve(some, scales.base.shapes, scales.base.config):
        if not placement.bias:
            placed.setdefault(placement.module, []).append(placement)
    return placed


def _carried(update: Update, placements: Sequence[Placement], scales: Scales, weight: float) -> Update:
    """Return one update in the basis of the base; itself where nothing is scaled there.

    Raises `ValueError` where it cannot be carried.
    """
    paths = [placement.site.tensor.rpartition(".")[0] for placement in placements]
    of_rows, of_columns = [scales.rows(path) for path in paths], [scales.columns(path) for path in paths]
    if all(each is None for each in (*of_rows, *of_columns)):
        return update
    import torch  # late: most merges do without it

    if update.members or any(placement.site.transposed for placement in placements):
        raise ValueError("the base stores its weight as a stack of experts, or turned")
    if any(not _alike(of_columns[0], other) for other in of_columns[1:]):
        raise ValueError("the parts of the base's weight have scales of their own")
    rows = np.ones(update.shape[0])
    for placement, divided in zip(placements, of_rows, strict=True):
        if divided is not None:
            rows[placement.site.part_rows] = 1 / divided[slice(*placement.site.rows)]
    factors = torch.from_numpy(rows) if any(each is not None for each in of_rows) else None
    columns = None if of_columns[0] is None else torch.from_numpy(of_columns[0])

    def read(wanted: slice) -> Tensor:
        return _rows(wanted, placements, scales, update.shape[1])

    return update.carried(Basis(factors, columns, read, weight))


def _rows(wanted: slice, placements: Sequence[Placement], scales: Scales, columns: int) -> Tensor:
    """Read rows of the base's weight, or weights, by their numbers in the update."""
    import torch

    out = np.zeros((wanted.stop - wanted.start, columns))
    for site in (placement.site for placement in placements):
        low, high = max(wanted.start, site.part[0]), min(wanted.stop, site.part[1])
        if low >= high:
            continue
        first, _, step = site.rows
        start = first + (low - site.part[0]) * step
        with reader(scales.base.specs[site.tensor]) as read:
            out[low - wanted.start : high - wanted.start] = read(start, (high - low - 1) * step + 1)[::step]
    return torch.from_numpy(out)


def _whole(name: str, lazy: LazyTensor, scales: Scales) -> LazyTensor:
    """Return a tensor that takes the place of one of the base, as it has to be there; itself where nothing changes."""
    path, _, parameter = name.rpartition(".")
    rows, columns = scales.rows(path), scales.columns(path)
    if rows is None and (columns is None or parameter != "weight"):
        return lazy
    import torch

    if len(lazy.shape) == 1 and parameter == "weight" and rows is not None:
        return made(lazy.shape, lambda: torch.from_numpy(scales.of_norm(path, lazy.load().double().numpy())), lazy)
    divided = along(lazy, None if rows is None else torch.from_numpy(1 / rows), 0)
    return along(divided, None if columns is None or parameter != "weight" else torch.from_numpy(columns), 1)


def _alike(first: Array | None, other: Array | None) -> bool:
    return (first is None and other is None) or (
        first is not None and other is not None and np.array_equal(first, other)
    )
