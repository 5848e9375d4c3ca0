"""From placements to loaded factors: checked, joined for each site, in an order of their own.

Factors that are bytes of files come without torch: `load_sums` gives them as C has them, `load_products` as NumPy
arrays. `load_terms` gives what any kind makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from loratools.adapter.kinds import Factors, Term, Update
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.plan import Change, MergePlan
from loratools.errors import IncompatibleAdapter
from loratools.storage import dtypes, files
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import numpy as np
    import torch

    from loratools.linalg.native.factors import Matrix, Memory, Sum

    Array = np.ndarray[Any, np.dtype[Any]]


_UNSIGNED = bytes(byte & 0x7F for byte in range(256))  # the last byte of a number without its sign


def is_wide(change: Change, dtype: str) -> bool:
    """Tell whether a tensor is to be changed in float64: where the base's or the output's `dtype` is, or a factor's.

    And where updates act one on the other's result, for float32 would lose digits at each step.
    """
    return "F64" in (change.source.dtype, dtype) or _has_float64(change) or _in_turn(change)


def _has_float64(change: Change) -> bool:
    """Tell whether an update has tensors in float64, whose numbers float32 need not hold although it holds ΔW."""
    parts = (lazy for _, placement in change.placements for lazy in placement.update.parts.values())
    return any(lazy.dtype == "F64" for lazy in parts)


def _in_turn(change: Change) -> bool:
    """Tell whether one update acts on what another has changed, other than products that are joined to one."""
    pairs = combinations([placement for _, placement in change.placements], 2)
    return any(
        a.site.meets(b.site) and not (a.site == b.site and _is_product(a.update) and _is_product(b.update))
        for a, b in pairs
    )


def _is_product(update: Update) -> bool:
    return update.additive and update.factored() is not None


def is_stored(factors: Factors | None) -> bool:
    """Tell whether these are factors that `load_products` can read: bytes of files, in BF16, F16 or F32."""
    if factors is None:
        return False
    tensors = [factors.left, factors.right, *([factors.magnitude] if factors.magnitude else [])]
    return all(lazy.spec is not None and lazy.dtype in dtypes.ROW_DTYPES for lazy in tensors)


@dataclass(frozen=True, slots=True, eq=False)
class SiteProduct:
    """Σ w·s·left·right over the adapters for one site: `factor` (rows, k) · diag(`scale`) · `right` (k, columns).

    Factors are in float32, `scale` and DoRA's `magnitude` of each row, if there is one, in float64.
    """

    site: Site
    factor: Array
    scale: Array
    right: Array
    magnitude: Array | None = None


def load_products(plan: MergePlan, change: Change, name: str) -> list[SiteProduct]:
    """Load the stored factors of a tensor, joined for each site in the order of the adapters' digests.

    Raises `IncompatibleAdapter` for factors that are not finite.
    """
    import numpy as np

    sites: dict[Site, list[SiteProduct]] = {}
    for number, placement in _in_order(plan, change):
        site, factors = placement.site, placement.update.factored()
        assert factors is not None
        left, right = read_factor(factors.left)[site.part_rows], read_factor(factors.right)
        if site.transposed:
            left, right = right.T, left.T
        magnitude = None
        if factors.magnitude is not None:
            magnitude = read_factor(factors.magnitude)[site.part_rows].astype(np.float64)
        if not all(np.isfinite(array).all() for array in (left, right, magnitude) if array is not None):
            raise _damaged(number, placement, name)
        scale = np.full(len(right), plan.inputs[number].weight * factors.scale)
        sites.setdefault(site, []).append(SiteProduct(site, left, scale, right, magnitude))
    return [_joined(products) for products in sites.values()]


def _joined(products: Sequence[SiteProduct]) -> SiteProduct:
    """Return the sum of products on one site as one product: factors side by side along k."""
    import numpy as np

    if len(products) == 1:
        return products[0]
    return SiteProduct(
        products[0].site,
        np.concatenate([product.factor for product in products], axis=1),
        np.concatenate([product.scale for product in products]),
        np.concatenate([product.right for product in products], axis=0),
    )


def load_sums(plan: MergePlan, change: Change, name: str, memory: Memory) -> list[tuple[Site, Sum]]:
    """Load what `load_products` does into `memory`, where C has it: it stays until the next tensor is loaded.

    Raises `IncompatibleAdapter` for factors that are not finite.
    """
    from loratools.linalg.native.factors import Piece, Sum

    groups: dict[Site, list[tuple[int, Placement, Factors]]] = {}
    for number, placement in _in_order(plan, change):
        factors = placement.update.factored()
        assert factors is not None
        groups.setdefault(placement.site, []).append((number, placement, factors))
    sizes = [
        (*site.shape, sum(factors.left.shape[1] for _, _, factors in group), group[0][2].magnitude is not None)
        for site, group in groups.items()
    ]
    needed = [Sum.nbytes(rows, columns, rank, rescaled=rescaled) for rows, columns, rank, rescaled in sizes]
    room, at = memory.of("factors", sum(needed)), 0
    sums = []
    for (site, group), (rows, columns, rank, rescaled), nbytes in zip(groups.items(), sizes, needed, strict=True):
        part = Piece(room.address + at, room.view[at : at + nbytes])
        at += nbytes
        total = Sum(rows, columns, rank, part, rescaled=rescaled)
        for number, placement, factors in group:
            if not _add(total, site, factors, plan.inputs[number].weight * factors.scale, memory):
                raise _damaged(number, placement, name)
        sums.append((site, total))
    return sums


def _add(total: Sum, site: Site, factors: Factors, scale: float, memory: Memory) -> bool:
    """Read factors and add their product; tell whether they are finite."""
    left = _read_matrix(factors.left, memory, "left").rows(site.part_rows)
    right = _read_matrix(factors.right, memory, "right")
    ok = total.add(right.T, left.T, scale, memory) if site.transposed else total.add(left, right, scale, memory)
    if factors.magnitude is not None:
        magnitudes = _read_matrix(factors.magnitude, memory, "magnitudes").rows(site.part_rows)
        ok = total.rescale(magnitudes, memory) and ok
    return ok


def _read_matrix(lazy: LazyTensor, memory: Memory, name: str) -> Matrix:
    from loratools.linalg.native.factors import Matrix

    assert lazy.spec is not None
    piece = memory.of(name, lazy.spec.nbytes)
    with files.opened(lazy.spec) as read:
        read(piece.view, 0)
    return Matrix.of(piece, lazy.dtype, lazy.shape)


def read_factor(lazy: LazyTensor) -> Array:
    """Return a stored factor in float32."""
    import numpy as np

    from loratools.storage.codecs import floats

    assert lazy.spec is not None
    raw = np.frombuffer(files.read_bytes(lazy.spec), dtype=floats.numpy_dtype(lazy.dtype)).reshape(lazy.shape)
    return floats.exactly(raw, lazy.dtype).astype(np.float32, copy=False)


def load_terms(plan: MergePlan, change: Change, dtype: str, name: str, device: torch.device) -> list[tuple[Site, Term]]:
    """Load the terms of one tensor, in float32, or float64 where `is_wide` for the output's `dtype` says so.

    Products on one site become one product: one GEMM, and one sum over all adapters before the rounding. They are
    joined in the order of the adapters' digests, so that the order on the command line cannot show in the bytes.
    Where an update that is not additive (DoRA) meets another, all act in the order given.

    Raises `IncompatibleAdapter` for factors that are not finite.
    """
    import torch

    work = torch.float64 if is_wide(change, dtype) else torch.float32
    commute = all(placement.update.additive for _, placement in change.placements) or not _in_turn(change)
    sequence: list[tuple[Site, Term]] = []
    terms: dict[Site, list[Term]] = {}
    for number, placement in _in_order(plan, change) if commute else change.placements:
        term = placement.update.term(placement.site, plan.inputs[number].weight, work, device)
        if not term.is_finite():
            raise _damaged(number, placement, name)
        if commute:
            add_term(terms.setdefault(placement.site, []), term)
        else:
            sequence.append((placement.site, term))
    return sequence or [(site, term) for site, others in terms.items() for term in others]


def add_term(terms: list[Term], term: Term) -> None:
    """Add a term to those of its site: into the first with which it is one sum, else after them."""
    for i, other in enumerate(terms):
        if (total := other.plus(term)) is not None:
            terms[i] = total
            return
    terms.append(term)


def _in_order(plan: MergePlan, change: Change) -> list[tuple[int, Placement]]:
    """Return the placements of a tensor, each with the number of its adapter, in the order of the adapters' digests."""
    order = [(adapter.digest, adapter.weight) for adapter in plan.inputs]
    return sorted(change.placements, key=lambda item: order[item[0]])


def _damaged(number: int, placement: Placement, name: str) -> IncompatibleAdapter:
    return IncompatibleAdapter(
        f"adapter {number + 1}: {placement.module} has NaN or infinite factors (for {name})",
        hint="The training diverged, or the file is damaged; such an adapter would destroy the model.",
    )


def check_effect(plan: MergePlan) -> None:
    """Raise `IncompatibleAdapter` for adapters whose ΔW is exactly zero: merging them would change nothing.

    The first update that is not zero settles it for an adapter, so little is read; stored factors are looked at first.
    """
    idle = []
    for number, adapter in enumerate(plan.inputs):
        weight = adapter.weight
        placements = [p for change in plan.changes.values() for i, p in change.placements if i == number]
        placements.sort(key=lambda placement: not is_stored(placement.update.factored()))
        if not adapter.adapter.replacements and not any(_acts(placement, weight) for placement in placements):
            reason = "its weight is 0" if weight == 0 else "s·B·A is zero in every module, as before training"
            idle.append(f"adapter {number + 1}: {reason}")
    if idle:
        raise IncompatibleAdapter("a merge that would change nothing", idle, hint="Leave it out, or check the file.")


def _acts(placement: Placement, weight: float) -> bool:
    """Tell whether an update may change a weight: a product does by a column of left and its row of right."""
    factors = placement.update.factored()
    if factors is None or not is_stored(factors):
        import torch

        return not placement.update.term(placement.site, weight, torch.float64, torch.device("cpu")).is_zero()
    if factors.magnitude is not None:
        return True
    if weight * factors.scale == 0:
        return False
    left, right = _bits(factors.left), _bits(factors.right)
    rank = factors.left.shape[1]
    columns = len(right) // rank if rank else 0
    return any(_any(left[k::rank]) and _any(right[k * columns : (k + 1) * columns]) for k in range(rank))


def _bits(lazy: LazyTensor) -> memoryview:
    """Return the bits of a stored factor, number by number, without the sign."""
    assert lazy.spec is not None
    sign, raw = dtypes.bits(lazy.dtype) // 8 - 1, files.read_bytes(lazy.spec)
    raw[sign :: sign + 1] = raw[sign :: sign + 1].translate(_UNSIGNED)
    return memoryview(raw).cast("H" if sign == 1 else "I")


def _any(bits: memoryview) -> bool:
    return any(bits.tobytes())
