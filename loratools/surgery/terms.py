"""From placements to loaded terms: factors in working precision, checked, joined, in an order of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.adapter.resolve import Placement
from loratools.adapter.sites import Site
from loratools.adapter.updates import Term
from loratools.adapter.updates.lora import Product
from loratools.errors import IncompatibleAdapter
from loratools.storage import dtypes

if TYPE_CHECKING:
    import torch

    from loratools.surgery.plan import Change, MergePlan


def load_terms(
    plan: MergePlan, change: Change, digests: Sequence[str], name: str, device: torch.device
) -> list[tuple[Site, Term]]:
    """Load the terms of one tensor, in float32, or float64 where base or output is.

    Products on one site become one product: one GEMM, and one sum over all adapters before the rounding. They are
    joined in the order of the adapters' digests, so that the order on the command line cannot show in the bytes.

    Raises `IncompatibleAdapter` for factors that are not finite.
    """
    import torch

    work = torch.float64 if dtypes.to_torch(change.source.dtype) == torch.float64 else torch.float32
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
