"""One adapter below a folder: what it is, and the sketch of what it changes, by which it is compared with others.

The modules have names of their own choosing in every dialect; they are sketched under one naming, as whole changes
s·B·A, so that neither the dialect nor the factors matter. An adapter of which the base decides what it does (DoRA, OFT,
tensors trained whole, …) has no sketch: it is compared by its parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loratools import dialects
from loratools.adapter.gathered import canonically_named
from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import normalized
from loratools.errors import UnknownKind
from loratools.format.canonical import canonical, said
from loratools.format.digest import tensor_digests
from loratools.linalg.delta import Delta
from loratools.linalg.sketch import sketch
from loratools.linalg.stacks import NO_SQUARES, squares_fit
from loratools.storage import dtypes
from loratools.storage.digest import root
from loratools.storage.lazy import LazyTensor, chunks_of_all, in_order_of_files
from loratools.surgery.change import Changes, ModuleChange, alone

_HELD = 1 << 25  # bytes of an adapter that are read at once; of more, one module after the other is in memory


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """An adapter below a folder.

    `path` is relative to the folder, "." for itself. `base` is the name of the base model that the file states, None
    where it states none. `kinds` are those of its updates, `ranks` the least and the largest rank, (0, 0) without one.
    `digest` is the root over its tensors, the one that sealing records. `by_parameters` says why it is compared with
    others by the numbers in its file and not by ΔW; "" where it is by ΔW. `warnings` were said as it was read.
    """

    path: str
    dialect: str
    base: str | None
    kinds: tuple[str, ...]
    ranks: tuple[int, int]
    modules: int
    replacements: int
    parameters: int
    nbytes: int
    digest: str
    by_parameters: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Sketched:
    """An adapter with what compares it, but for its sketch: nothing of its tensors is kept.

    `key` is the same of two adapters with the same tensors and scalings. `layout` is that of the names and shapes of
    what it changes. `rounding2` is the square of how far rounding the factors once more to their dtype would move ΔW,
    at most.
    """

    found: FoundAdapter
    key: str
    layout: str
    rounding2: float

    @property
    def by_change(self) -> bool:
        """Whether it is compared by ΔW, and has a sketch; else `found.by_parameters` says why not."""
        return not self.found.by_parameters


def opened(path: Path) -> Adapter | None:
    """Return the adapter at a path; None where a model or something else is.

    Raises:
        BadFile, InvalidFormat, UnknownKind, UnsupportedAdapter: It cannot be read.
    """
    listing = dialects.Listing.of(path)
    try:
        dialect, _ = dialects.detect(listing)
    except UnknownKind:
        if dialects.is_adapter(listing) or listing.factors:
            raise
        return None
    adapter = dialects.get(dialect).read(listing)
    return adapter if adapter.dialect == dialect else replace(adapter, dialect=dialect)


def held(adapter: Adapter) -> Adapter:
    """Return an adapter whose tensors are in memory where they are few bytes: read at once, in one pass.

    Raises:
        BadFile: Its file cannot be read.
    """
    tensors = {name: lazy for name, lazy in adapter.tensors().items() if lazy.spec and lazy.spec.encoding is None}
    if sum([lazy.nbytes for lazy in tensors.values()]) > _HELD:
        return adapter
    read = {
        tensors[name].spec: LazyTensor.holding(tensors[name].dtype, tensors[name].shape, memoryview(b"".join(chunks)))
        for name, chunks in chunks_of_all(in_order_of_files(tensors))
    }
    return adapter.mapped(lambda lazy: read.get(lazy.spec, lazy))


def sketched(adapter: Adapter, name: str, warnings: Sequence[str] = ()) -> tuple[Sketched, Tensor | None]:
    """Hash an adapter, and sketch what it changes: float32 (256,), None where the base decides what it does.

    Args:
        adapter: The adapter.
        name: What it is called in the result.
        warnings: What was said as it was opened. Default: nothing.

    Raises:
        BadFile: Its file cannot be read.
        ValueError: A change that is no product holds NaN or infinity.
    """
    adapter = held(adapter)
    digest = root(tensor_digests(adapter))  # which nothing remembers: the adapter goes with this call
    changes = alone(canonically_named(adapter))
    reason = _reason(changes)
    modules = named(changes)
    summed, terms2 = (None, 0.0) if reason else _summed(modules)
    rounding2 = _unit_roundoff(adapter) ** 2 * terms2
    if summed is not None and not summed.isfinite().all():
        reason = "its change has NaN, infinity, or numbers that are too large for float32"
        summed, rounding2 = None, 0.0
    if summed is not None and not (squares_fit(0.0, terms2) if terms2 else _are_zero(modules)):
        reason, summed, rounding2 = NO_SQUARES, None, 0.0
    tensors = adapter.tensors().values()
    ranks = [update.rank for update in adapter.updates.values()]
    found = FoundAdapter(
        name, adapter.dialect, adapter.base.id if adapter.base else None,
        tuple(sorted({update.kind for update in adapter.updates.values()})),
        (min(ranks, default=0), max(ranks, default=0)), len(adapter), len(adapter.replacements),
        sum(lazy.parameters for lazy in tensors), sum(lazy.nbytes for lazy in tensors), digest, reason,
        tuple(warnings),
    )  # fmt: skip
    scalings = {module: [update.kind, update.scaling] for module, update in adapter.updates.items()}
    layout = {module: list(change.shape) for module, change in modules.items()}
    return Sketched(found, f"{digest} {_hash(scalings)}", _hash(layout), rounding2), summed


def named(changes: Changes) -> dict[str, ModuleChange]:
    """Return the changes of a canonically named adapter by names that have no wrappers either."""
    return {normalized(module): change for module, change in changes.modules.items()}


def _are_zero(modules: Mapping[str, ModuleChange]) -> bool:
    """Tell whether every change is zero, as a sum of squares alone does not tell."""
    return not any(change.load().leading(1)[1] for change in modules.values())


def _summed(modules: Mapping[str, ModuleChange]) -> tuple[Tensor, float]:
    """Return the sketch of changes, and the sum of the squares of their terms."""
    terms2 = 0.0

    def loaded() -> Iterable[tuple[str, Delta]]:
        nonlocal terms2
        for module, change in modules.items():
            delta = change.load()
            terms2 += delta.terms2()
            yield module, delta

    summed = sketch(loaded()).float()
    return summed, terms2


def _reason(changes: Changes) -> str:
    """Return why ΔW is not all that an adapter does without its base; "" where it is."""
    unmeasured = {**changes.in_part, **changes.left_out}
    if not unmeasured:
        return "" if changes.modules else "it changes no module"
    module, reason = next(iter(unmeasured.items()))
    return f"{len(unmeasured)} of its changes depend on the base model, such as {module}: {reason}"


def _unit_roundoff(adapter: Adapter) -> float:
    """Return half the distance from 1 to the next number, in the coarsest dtype of an adapter's floats."""
    known = {dtypes.to_torch(lazy.dtype) for lazy in adapter.tensors().values()}
    return max((torch.finfo(dtype).eps / 2 for dtype in known if dtype.is_floating_point), default=0.0)


def _hash(value: Mapping[str, object]) -> str:
    return hashlib.blake2b(canonical(said(value)).encode(), digest_size=16).hexdigest()
