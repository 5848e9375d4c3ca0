"""The shapes that the tensors of each registered kind have: a rule for each, by chapter 4 of `spec/v1`.

A rule takes (shapes by part, rank, layout), where the parts are those of the kind and the layout is well formed, and
returns a sentence about what does not fit, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING, MAGNITUDE, A, B

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Rule = Callable[[Shapes, int, Mapping[str, Any]], str | None]

SCALE = "dora_scale"
GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
WHOLE_KRONECKER = frozenset({"lokr_w1", "lokr_w2"})
"""The two factors of LoKr, both whole: then nothing is scaled."""

_KERNELS = (1, 2, 3)  # kernel sides that a convolution can have


def linear(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check A (r, in) and B (out, r)."""
    return _factors(shapes[A], shapes[B], rank, 2)


def embedding(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check A (r, V) and B (d, r)."""
    return _factors(shapes[A_EMBEDDING], shapes[B_EMBEDDING], rank, 2)


def conv(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check A (r, in, k…) and B (out, r, 1…)."""
    if len(shapes[A]) - 2 not in _KERNELS:
        return f"A has shape {shapes[A]}, expected (r, in) and one to three kernel sides"
    return _factors(shapes[A], shapes[B], rank, len(shapes[A]))


def experts(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check A (E·r, in) and B (out, r·E)."""
    return _factors(shapes[A], shapes[B], rank * layout["experts"], 2)


def dora(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check the factors, which are those of one of three kinds, and one number for each output feature."""
    if A_EMBEDDING in shapes:
        fault, expected = embedding(shapes, rank, layout), shapes[B_EMBEDDING][:1]
    elif len(shapes[A]) > 2:
        fault, expected = conv(shapes, rank, layout), (1, *shapes[B][:1], *(1,) * (len(shapes[A]) - 2))
    else:
        fault, expected = linear(shapes, rank, layout), shapes[B][:1]
    if fault or shapes[MAGNITUDE] == expected:
        return fault
    return f"the magnitude vector has shape {shapes[MAGNITUDE]}, expected {expected}"


def _factors(a: Shape, b: Shape, rank: int, dimensions: int) -> str | None:
    if len(a) != dimensions or a[0] != rank:
        return f"A has shape {a}, expected {dimensions} dimensions, the first of size {rank}"
    if len(b) != dimensions or b[1] != rank or set(b[2:]) - {1}:
        return f"B has shape {b}, expected (out, {rank}{', 1' * (dimensions - 2)})"
    return None


def locon(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check A (r, in, 1…), the core (m, r, k…) and B (out, m, 1…)."""
    a, b, core = shapes[A], shapes[B], shapes["lora_mid.weight"]
    pointwise = len(a) == len(b) == len(core) and set(a[2:] + b[2:]) <= {1}
    if len(core) - 2 in _KERNELS and pointwise and a[0] == rank and (b[1], a[0]) == core[:2]:
        return None
    return f"A {a}, the core {core} and B {b} are not (r, in, 1…), (m, r, k…) and (out, m, 1…)"


def loha(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check two pairs (out, r) and (r, in·k…), or with cores (r, r, k…) those of (r, out) and (r, in)."""
    a1, b1, a2, b2 = (shapes[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    good = {len(a1), len(b1), len(a2), len(b2)} == {2} and b1[0] == rank
    if good and "hada_t1" in shapes:
        t1, t2 = shapes["hada_t1"], shapes["hada_t2"]
        good = len(t1) - 2 in _KERNELS and t1[2:] == t2[2:] and (a1[1], b1[1]) == (a2[1], b2[1])
        good = good and (t1[:2], t2[:2]) == ((a1[0], b1[0]), (a2[0], b2[0]))
    elif good:
        good = (a1[1], a2[1]) == (b1[0], b2[0]) and (a1[0], b1[1]) == (a2[0], b2[1])
    return None if good else f"the factors do not go together: {dict(shapes)}"


def lokr(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check w1 (a, c) and w2 (b, d, k…), each whole or factored, w2 also with a core."""
    ranks = [shapes[name][0] for name in ("lokr_w2_b", "lokr_w1_b") if shapes.get(name)]
    good = ranks[:1] in ([], [rank]) and _matrix(shapes, "lokr_w1", 2)
    if "lokr_t2" in shapes:
        core, a, b = shapes["lokr_t2"], shapes["lokr_w2_a"], shapes["lokr_w2_b"]
        good = good and len(core) - 2 in _KERNELS and len(a) == len(b) == 2 and core[:2] == (a[0], b[0])
    else:
        good = good and _matrix(shapes, "lokr_w2", 5)
    return None if good else f"the factors do not go together: {dict(shapes)}"


def _matrix(shapes: Shapes, name: str, sides: int) -> bool:
    """Tell whether w1 or w2 has two sides, and at most so many: whole, or as (·, r) and (r, ·)."""
    if name in shapes:
        return 2 <= len(shapes[name]) <= sides
    a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
    return len(a) == 2 and 2 <= len(b) <= sides and a[1] == b[0]


def glora(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check a1 (in, r), a2 (r, in), b1 (out, q) and b2 (q, in, k…)."""
    a1, a2, b1, b2 = (shapes[name] for name in GLORA)
    good = all(len(shape) > 1 and set(shape[2:]) <= {1} for shape in (a1, a2, b1)) and len(b2) > 1
    if good and a2[0] == rank and a1[:2] == (a2[1], rank) and b1[1] == b2[0] and a2[1] == b2[1]:
        return None
    return f"the factors do not go together: a1 {a1}, a2 {a2}, b1 {b1}, b2 {b2}"


def oft(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check blocks (n, r, r), and n·r factors of rows."""
    blocks = shapes["oft_blocks"]
    if len(blocks) != 3 or blocks[1:] != (rank, rank):
        return f"the blocks have shape {blocks}, expected (n, {rank}, {rank})"
    if prod(shapes.get("rescale", (blocks[0] * rank,))) != blocks[0] * rank:
        return f"rescale has shape {shapes['rescale']}, expected {blocks[0] * rank} numbers"
    return None


def ia3(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check one number for each feature, and one for the side."""
    vector, flag = shapes["weight"], shapes["on_input"]
    if prod(vector) != max(vector, default=0):
        return f"the weight has shape {vector}, expected one number for each feature"
    return f"on_input has shape {flag}, expected one number" if prod(flag) != 1 else None


def full(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check a difference of a weight, and that of a bias (out)."""
    return _difference(shapes, "diff", "diff_b")


def norm(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check a difference of a normalization layer's weight, and that of its bias."""
    return _difference(shapes, "w_norm", "b_norm")


def _difference(shapes: Shapes, weight: str, bias: str) -> str | None:
    shape = shapes[weight]
    if not shape:
        return f"{weight} has no sides, expected a weight"
    if shapes.get(bias, shape[:1]) != shape[:1]:
        return f"{bias} has shape {shapes[bias]}, expected {shape[:1]}"
    return None


def tokens(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check a row of d numbers for each index of the layout."""
    (shape,), count = shapes.values(), len(layout["rows"])
    return None if len(shape) == 2 and shape[0] == count else f"the rows have shape {shape}, expected ({count}, d)"


def wdora(shapes: Shapes, rank: int, layout: Mapping[str, Any]) -> str | None:
    """Check the parts of the kind within, and one magnitude for each output feature, or each input feature."""
    held = {part: shape for part, shape in shapes.items() if part != SCALE}
    within, weight = next(pair for part, pair in _WITHIN.items() if part in held)
    if within is linear and len(held[A]) != 2:
        within = conv
    if fault := within(held, rank, layout):
        return fault
    (out, *inner), scale = weight(held), shapes[SCALE]
    by_input = len(scale) > 1 and scale[0] == 1 and prod(inner) % scale[1] == 0
    if len(scale) > 1 and prod(scale[2:]) == 1 and (scale[:2] == (out, 1) or by_input):
        return None
    return f"{SCALE} has shape {scale}, expected ({out}, 1) or one number for each input"


def _of_product(shapes: Shapes) -> Shape:
    return shapes[B][0], shapes[A][1], *shapes.get("lora_mid.weight", shapes[A])[2:]


def _of_loha(shapes: Shapes) -> Shape:
    a, b = shapes["hada_w1_a"], shapes["hada_w1_b"]
    return (a[1], b[1], *shapes["hada_t1"][2:]) if "hada_t1" in shapes else (a[0], b[1])


def _of_lokr(shapes: Shapes) -> Shape:
    (a, c), (b, d, *sides) = _sides(shapes, "lokr_w1"), _sides(shapes, "lokr_w2")
    return a * b, c * d, *sides


def _sides(shapes: Shapes, name: str) -> Shape:
    if name in shapes:
        return shapes[name]
    a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
    core = shapes.get("lokr_t2") if name == "lokr_w2" else None
    return (a[1], b[1], *core[2:]) if core else (a[0], *b[1:])


_WITHIN: Mapping[str, tuple[Rule, Callable[[Shapes], Shape]]] = {
    "lora_mid.weight": (locon, _of_product),
    "hada_w1_a": (loha, _of_loha),
    **dict.fromkeys(("lokr_w1", "lokr_w1_a"), (lokr, _of_lokr)),
    A: (linear, _of_product),
}
"""A part that tells which kind stands within `wdora` -> its rule, and the shape (out, in, k…) of its weight."""
