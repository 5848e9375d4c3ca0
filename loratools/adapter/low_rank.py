"""Updates that are products, ΔW = s·left·right: which they are, and their factors for analysis in float64.

`arrays` reads factors that are bytes of a file, or held in memory, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from loratools.adapter.kinds import Factors, Update
from loratools.adapter.model import Adapter
from loratools.storage import files
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, np.dtype[Any]]

_FLOATS = ("BF16", "F16", "F32", "F64")


def refusal(update: Update) -> str | None:
    """Return why an update is no product of two factors that weights can add up, or None where it is one."""
    if update.members:
        return next(filter(None, map(refusal, update.members)), None)
    factors = update.factored()
    if factors is None:
        return f"kind {update.kind}: its change is no product of two factors"
    if update.unsettled:
        return f"kind {update.kind}: only the base tells {update.unsettled}"
    if not update.additive:
        return f"kind {update.kind}: it rescales the base weight, so its change is no product that could be added up"
    return None


def low_rank(update: Update) -> Update | None:
    """Return the part of an update that is a product, DoRA's without its magnitude; None for a kind that has none."""
    direction = update.direction
    return direction if not direction.unsettled and direction.factored() else None


def products(adapter: Adapter) -> dict[str, Update]:
    """Return path -> part that is a product, where there is one; a stack has one for each expert, `….down_proj.7`."""
    parts: dict[str, Update] = {}
    for module, update in adapter.updates.items():
        parts |= {expert.path(module): expert for expert in update.members}
        if (part := low_rank(update)) is not None:
            parts[module] = part
    return parts


def alike(first: Update, other: Update) -> Update:
    """Return `other` in factors that lie as those of `first`, another update of the same weight: itself, or turned.

    Only stacks of experts are ever turned round, exactly: shapes tell it, and of square ones what their files say.
    Raises `ValueError` where these leave it open.
    """
    (*_, out, inner), shape = first.shape, other.shape
    if first is other or not first.readings or not other.readings or len(first.shape) != len(shape):
        return other
    if out != inner:
        return other.turned_round() if shape == (first.shape[0], inner, out) and shape != first.shape else other
    if shape != first.shape or first.shape[0] == 1:
        return other
    lies, others = (
        [update.stored_in_out(is_transposed) for is_transposed in (True, False)] for update in (first, other)
    )
    same = {None if None in pair else pair[0] == pair[1] for pair in zip(lies, others, strict=True)}
    if same == {True}:
        return other
    if same == {False}:
        return other.turned_round()
    raise ValueError(
        f"square in each expert ({out} x {inner}), and the adapters are of versions of PEFT that take it differently"
    )


def load(part: Update) -> tuple[Tensor, Tensor]:
    """Return B (rows, r) with the scaling folded in, and A (r, columns), both float64: ΔW = B·A as a matrix.

    Raises `ValueError` for an update that is no product.
    """
    left, right = (factors := _factors(part)).load()
    return left.double() * factors.scale, right.double()


def arrays(part: Update) -> tuple[Array, Array, float]:
    """Return left (rows, r), right (r, columns) and the scaling of a product, in float64 where stored so, else float32.

    Raises `ValueError` for an update that is no product.
    """
    factors = _factors(part)
    return _numbers(factors.left), _numbers(factors.right), factors.scale


def stacked(parts: Sequence[Update]) -> tuple[Array, Array, list[float]]:
    """Return what `arrays` does of products of one shape: left (n, rows, r), right (n, r, columns), and the scalings.

    Raises `ValueError` as `arrays`, and where shapes differ.
    """
    factors = [_factors(part) for part in parts]
    return _stack([each.left for each in factors]), _stack([each.right for each in factors]), [
        each.scale for each in factors
    ]  # fmt: skip


def _factors(part: Update) -> Factors:
    if (factors := part.factored()) is None:
        raise ValueError(f"kind {part.kind}: its change is no product of two factors")
    return factors


def _numbers(lazy: LazyTensor) -> Array:
    import numpy as np

    from loratools.storage.codecs import floats

    known = lazy.held if lazy.spec is None else files.read_bytes(lazy.spec)
    if known is None or lazy.dtype not in _FLOATS:
        numbers: Array = lazy.load().double().numpy()
        return numbers
    return floats.numbers(np.frombuffer(known, floats.unsigned(lazy.dtype)).reshape(lazy.shape), lazy.dtype)


def _stack(lazies: Sequence[LazyTensor]) -> Array:
    """Return the numbers of tensors as one array; those that are bytes of a file are read into it."""
    import numpy as np

    from loratools.storage.codecs import floats

    dtype, shape = lazies[0].dtype, lazies[0].shape
    specs = [
        lazy.spec
        for lazy in lazies
        if lazy.spec and lazy.spec.encoding is None and lazy.dtype == dtype and lazy.shape == shape
    ]
    if dtype not in _FLOATS or len(specs) < len(lazies):
        return np.stack([_numbers(lazy) for lazy in lazies])
    bits = np.empty((len(lazies), *shape), floats.unsigned(dtype))
    into, start = floats.bytes_of(bits), 0
    for path, run in groupby(specs, key=lambda spec: spec.file):
        with files.descriptor(path) as source:
            for spec in run:
                files.read_into(source, into[start : start + spec.nbytes], spec.start, path)
                start += spec.nbytes
    return floats.numbers(bits, dtype)
