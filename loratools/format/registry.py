"""The kinds of update that the format registers: their tensors and the shapes these have. Twin of `spec/v1/kinds.csv`.

What a kind does to a weight is in `loratools/adapter/kinds/`; a registered kind says only what a header can show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING, BIAS, MAGNITUDE, A, B

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Fault = Callable[[Shapes, int, Mapping[str, Any]], str | None]


@dataclass(frozen=True, slots=True)
class Kind:
    """A registered kind: the clause of its shapes, the sets of parts it may have, and `fault`.

    `fault(shapes, rank, layout)` returns a sentence about the first shape that does not fit, or None.
    """

    name: str
    clause: str
    required: tuple[frozenset[str], ...]
    fault: Fault
    optional: frozenset[str] = frozenset()
    layout: Mapping[str, type] | None = None
    """Fields of a layout that the kind REQUIRES; None where it needs no layout."""

    def accepts(self, parts: frozenset[str]) -> bool:
        """Tell whether a module of this kind may have exactly these parts."""
        return any(required <= parts <= required | self.optional for required in self.required)


def _pair(a: str, b: str) -> Fault:
    return lambda shapes, rank, layout: _factors(shapes[a], shapes[b], rank, 2)


_linear, _embedding = _pair(A, B), _pair(A_EMBEDDING, B_EMBEDDING)


def _conv(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    if len(shapes[A]) not in (3, 4, 5):
        return f"A has shape {shapes[A]}, expected (r, in) and one to three kernel sides"
    return _factors(shapes[A], shapes[B], rank, len(shapes[A]))


def _experts(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    return _factors(shapes[A], shapes[B], rank * layout["experts"], 2)


def _dora(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    # The factors are those of one of the three kinds below it; the magnitude is one number for each output feature.
    if A_EMBEDDING in shapes:
        fault, expected = _embedding(shapes, rank, layout), shapes[B_EMBEDDING][:1]
    elif len(shapes[A]) > 2:
        fault, expected = _conv(shapes, rank, layout), (1, *shapes[B][:1], *(1,) * (len(shapes[A]) - 2))
    else:
        fault, expected = _linear(shapes, rank, layout), shapes[B][:1]
    if fault or shapes[MAGNITUDE] == expected:
        return fault
    return f"the magnitude vector has shape {shapes[MAGNITUDE]}, expected {expected}"


def _factors(a: Shape, b: Shape, rank: int, dimensions: int) -> str | None:
    if len(a) != dimensions or a[0] != rank:
        return f"A has shape {a}, expected {dimensions} dimensions, the first of size {rank}"
    if len(b) != dimensions or b[1] != rank or set(b[2:]) - {1}:
        return f"B has shape {b}, expected (out, {rank}{', 1' * (dimensions - 2)})"
    return None


_PAIR, _PAIR_EMBEDDING = frozenset({A, B}), frozenset({A_EMBEDDING, B_EMBEDDING})
_BIAS = frozenset({BIAS})

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("conv", "T-08", (_PAIR,), _conv, _BIAS),
        Kind("dora", "T-09", (_PAIR | {MAGNITUDE}, _PAIR_EMBEDDING | {MAGNITUDE}), _dora, _BIAS),
        Kind("embedding", "T-07", (_PAIR_EMBEDDING,), _embedding),
        Kind("experts", "T-10", (_PAIR,), _experts, layout={"experts": int, "parameter": str, "transposed": bool}),
        Kind("lora", "T-06", (_PAIR,), _linear, _BIAS),
    )
}
"""Registry of version 1.0, by name."""
