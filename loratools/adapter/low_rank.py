"""An update that is a product, s·left·right: its factors as matrices, and an update of the same kind from new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING, BIAS, A, B
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    from torch import Tensor

# Names of A and B, and whether B·A is the weight's transpose: an embedding's weight (V, d) changes by (B·A)ᵀ.
_PAIRS = ((A, B, False), (A_EMBEDDING, B_EMBEDDING, True))


def refusal(update: Update) -> str | None:
    """Return why an update is no product of two factors that weights can add up, or None."""
    if _pair(update):
        return None
    if "lora_magnitude_vector" in update.parts:
        return f"kind {update.kind}: it rescales the base weight, so its change is no product that could be added up"
    return f"kind {update.kind}: its change is no product of two factors"


def matrices(update: Update) -> tuple[Tensor, Tensor]:
    """Load left (rows, r) and right (r, columns) with ΔW = s·left·right, in the dtypes of the file.

    The weight is seen as a matrix, first side × the rest: (out, in), (out, in·k…), or (V, d) for an embedding.
    """
    a, b, turned = _names(update)
    left, right = update.parts[b].load().flatten(1), update.parts[a].load().flatten(1)
    return (right.T, left.T) if turned else (left, right)


def bias(update: Update) -> LazyTensor | None:
    """Return the bias of B, which adds s·c to the module's bias."""
    return update.parts.get(BIAS)


def rebuilt(like: Update, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Update:
    """Return an update of the kind of `like` with ΔW = left·right: alpha = r, so that its scaling is 1."""
    a, b, turned = _names(like)
    rank = left.shape[1]
    if turned:
        left, right = right.T, left.T
    parts = {
        a: LazyTensor.of(right.reshape(rank, *like.parts[a].shape[1:]).contiguous()),
        b: LazyTensor.of(left.reshape(left.shape[0], rank, *like.parts[b].shape[2:]).contiguous()),
    }
    parts |= {BIAS: LazyTensor.of(bias)} if bias is not None else {}
    built: Update = kinds.get(like.kind).build(parts, 1.0, float(rank))
    return built


def bare(like: Update, bias: Tensor) -> Update:
    """Return an update of the kind of `like` that changes nothing but the bias: of rank 1, for no rank is 0."""
    left, right = matrices(like)
    return rebuilt(like, left[:, :1].to(bias.dtype).zero_(), right[:1].to(bias.dtype).zero_(), bias)


def takes_bias(update: Update) -> bool:
    """Tell whether PEFT's `lora_bias` gives a module of this kind a bias."""
    return B in update.parts


def _pair(update: Update) -> tuple[str, str, bool] | None:
    for a, b, turned in _PAIRS:
        named = update.parts.keys() - {BIAS} == {a, b}
        # The factors of stacked experts have these names too, but rank·experts rows.
        if named and update.parts[a].shape[0] == update.parts[b].shape[1] == update.rank:
            return a, b, turned
    return None


def _names(update: Update) -> tuple[str, str, bool]:
    found = _pair(update)
    if found is None:
        raise ValueError(refusal(update))
    return found


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
