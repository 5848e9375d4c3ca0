"""From placements to loaded terms: factors in working precision, checked, joined, in an order of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.adapter.resolve import Placement
from loratools.adapter.sites import Site
from loratools.adapter.updates import Term
from loratools.adapter.updates.lora import Product
from loratools.errors import IncompatibleAdapter

if TYPE_CHECKING:
    import torch

    from loratools.surgery.plan import Change, MergePlan


def load_terms(
    plan: MergePlan, change: Change, dtype: str, digests: Sequence[str], name: str, device: torch.device
) -> list[tuple[Site, Term]]:
    """Load the terms of one tensor, in float32, or float64 where the base's or the output's `dtype` is.

    Products on one site become one product: one GEMM, and one sum over all adapters before the rounding. They are
    joined in the order of the adapters' digests, so that the order on the command line cannot show in the bytes.

    Raises `IncompatibleAdapter` for factors that are not finite.
    """
    import torch

    work = torch.float64 if "F64" in (change.source.dtype, dtype) else torch.float32
    loaded = [(i, p, p.update.term(p.site, plan.weights[i], work, device)) for i, p in change.placements]
    for i, placement, term in loaded:
        _check(i, placement, term, name)
    if not all(isinstance(term, Product) for _, _, term in loaded):
        return [(placement.site, term) for _, placement, term in loaded]
    products: dict[Site, list[Product]] = {}
    for _, placement, term in sorted(loaded, key=lambda item: (digests[item[0]], plan.weights[item[0]])):
        if isinstance(term, Product):
            products.setdefault(placement.site, []).append(term)
    return [(site, Product.joined(terms)) for site, terms in products.items()]


def check_effect(plan: MergePlan) -> None:
    """Raise `IncompatibleAdapter` for adapters whose ΔW is exactly zero: merging them would change nothing.

    The first module that is not zero settles it, so little is read.
    """
    import torch

    idle = []
    for i, adapter in enumerate(plan.adapters):
        here = (p for change in plan.changes.values() for j, p in change.placements if j == i)
        terms = (p.update.term(p.site, plan.weights[i], torch.float32, torch.device("cpu")) for p in here)
        if not adapter.replacements and not any(_acts(term) for term in terms):
            reason = "its weight is 0" if plan.weights[i] == 0 else "s·B·A is zero in every module, as before training"
            idle.append(f"adapter {i + 1}: {reason}")
    if idle:
        raise IncompatibleAdapter("a merge that would change nothing", idle, hint="Leave it out, or check the file.")


def _acts(term: Term) -> bool:
    """Tell whether a product has a rank whose column of B and row of A both are not zero."""
    return not isinstance(term, Product) or bool((term.left.any(0) & term.right.any(1)).any())


def _check(number: int, placement: Placement, term: Term, name: str) -> None:
    import torch

    tensors = [
        value for slot in getattr(term, "__slots__", ()) if isinstance(value := getattr(term, slot), torch.Tensor)
    ]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise IncompatibleAdapter(
            f"adapter {number + 1}: {placement.module} has NaN or infinite factors (for {name})",
            hint="The training diverged, or the file is damaged; such an adapter would destroy the model.",
        )
