"""Updates that are products, ΔW = s·left·right: which they are, and their factors for analysis in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter

if TYPE_CHECKING:
    from torch import Tensor


def refusal(update: Update) -> str | None:
    """Return why an update is no product of two factors that weights can add up, or None where it is one."""
    factors = update.factored()
    if factors is None:
        return f"kind {update.kind}: its change is no product of two factors"
    if not update.additive:
        return f"kind {update.kind}: it rescales the base weight, so its change is no product that could be added up"
    return None


def low_rank(update: Update) -> Update | None:
    """Return the part of an update that is a product, DoRA's without its magnitude; None for a kind that has none."""
    direction = update.direction
    return direction if direction.factored() else None


def products(adapter: Adapter) -> dict[str, Update]:
    """Return module -> part that is a product, where there is one; a stack of experts has one for each, `module.7`."""
    parts: dict[str, Update] = {}
    for module, update in adapter.updates.items():
        parts |= {f"{module}.{e}": expert for e, expert in enumerate(update.members)}
        if (part := low_rank(update)) is not None:
            parts[module] = part
    return parts


def load(part: Update) -> tuple[Tensor, Tensor]:
    """Return B (rows, r) with the scaling folded in, and A (r, columns), both float64: ΔW = B·A as a matrix.

    Raises `ValueError` for an update that is no product.
    """
    if (factors := part.factored()) is None:
        raise ValueError(f"kind {part.kind}: its change is no product of two factors")
    left, right = factors.load()
    return left.double() * factors.scale, right.double()
