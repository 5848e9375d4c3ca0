"""From placements to loaded terms: factors in working precision, checked, joined, in an order of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from loratools.adapter.kinds import Term, Update
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.errors import IncompatibleAdapter

if TYPE_CHECKING:
    import torch

    from loratools.engine.plan import Change, MergePlan


def is_wide(change: Change, dtype: str) -> bool:
    """Tell whether a tensor is to be changed in float64: where the base's or the output's `dtype` is.

    And where one update acts on what another has changed (other than products that are joined to one), for float32
    would lose digits at each step.
    """
    pairs = combinations([placement for _, placement in change.placements], 2)
    return "F64" in (change.source.dtype, dtype) or any(
        one.site.meets(other.site)
        and not (one.site == other.site and _is_product(one.update) and _is_product(other.update))
        for one, other in pairs
    )


def _is_product(update: Update) -> bool:
    return update.additive and update.factored() is not None


def load_terms(
    plan: MergePlan, change: Change, dtype: str, digests: Sequence[str], name: str, device: torch.device
) -> list[tuple[Site, Term]]:
    """Load the terms of one tensor, in float32, or float64 where `is_wide` for the output's `dtype` says so.

    Products on one site become one product: one GEMM, and one sum over all adapters before the rounding. They are
    joined in the order of the adapters' digests, so that the order on the command line cannot show in the bytes. Where
    an update is not additive (DoRA), the adapters act in the order given.

    Raises `IncompatibleAdapter` for factors that are not finite.
    """
    import torch

    work = torch.float64 if is_wide(change, dtype) else torch.float32
    loaded = [(i, p, p.update.term(p.site, plan.weights[i], work, device)) for i, p in change.placements]
    for i, placement, term in loaded:
        _check(i, placement, term, name)
    if not all(placement.update.additive for _, placement, _ in loaded):
        return [(placement.site, term) for _, placement, term in loaded]
    terms: dict[Site, list[Term]] = {}
    for _, placement, term in sorted(loaded, key=lambda item: (digests[item[0]], plan.weights[item[0]])):
        add_term(terms.setdefault(placement.site, []), term)
    return [(site, term) for site, others in terms.items() for term in others]


def add_term(terms: list[Term], term: Term) -> None:
    """Add a term to those of its site: into the first with which it is one sum, else after them."""
    for i, other in enumerate(terms):
        if (total := other.plus(term)) is not None:
            terms[i] = total
            return
    terms.append(term)


def check_effect(plan: MergePlan, acts: Callable[[int, Placement], bool] | None = None) -> None:
    """Raise `IncompatibleAdapter` for adapters whose ΔW is exactly zero: merging them would change nothing.

    `acts` tells it of one placement of an adapter, by its number; the first that is not zero settles it, so little is
    read.
    """

    def loaded(number: int, placement: Placement) -> bool:
        import torch

        term = placement.update.term(placement.site, plan.weights[number], torch.float32, torch.device("cpu"))
        return not term.is_zero()

    idle = []
    for i, adapter in enumerate(plan.adapters):
        here = (p for change in plan.changes.values() for j, p in change.placements if j == i)
        if not adapter.replacements and not any((acts or loaded)(i, p) for p in here):
            reason = "its weight is 0" if plan.weights[i] == 0 else "s·B·A is zero in every module, as before training"
            idle.append(f"adapter {i + 1}: {reason}")
    if idle:
        raise IncompatibleAdapter("a merge that would change nothing", idle, hint="Leave it out, or check the file.")


def _check(number: int, placement: Placement, term: Term, name: str) -> None:
    if not term.is_finite():
        raise IncompatibleAdapter(
            f"adapter {number + 1}: {placement.module} has NaN or infinite factors (for {name})",
            hint="The training diverged, or the file is damaged; such an adapter would destroy the model.",
        )
