"""The registered kinds: parts, shapes and delta weights (chapter 4). Part of the independent reader (`reader.py`)."""

from __future__ import annotations

import math
import struct
from typing import Any

Parts = dict[str, tuple[str, list[int], bytes]]
Vector = list[float]

CODES = {"F16": "e", "F32": "f", "F64": "d"}
LINEAR, EMBEDDING = {"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}
BIAS, MAGNITUDE = "lora_B.bias", "lora_magnitude_vector"
# kind: (clause of its shapes, sets of parts, optional parts)
KINDS: dict[str, tuple[str, list[set[str]], set[str]]] = {
    "lora": ("T-06", [LINEAR], {BIAS}),
    "embedding": ("T-07", [EMBEDDING], set()),
    "conv": ("T-08", [LINEAR], {BIAS}),
    "dora": ("T-09", [LINEAR | {MAGNITUDE}, EMBEDDING | {MAGNITUDE}], {BIAS}),
    "experts": ("T-10", [LINEAR], set()),
}


def factors(parts: dict[str, Any]) -> tuple[Any, Any]:
    if "lora_embedding_A" in parts:
        return parts["lora_embedding_A"], parts["lora_embedding_B"]
    return parts["lora_A.weight"], parts["lora_B.weight"]


def fits(entry: dict[str, Any], shapes: dict[str, list[int]]) -> bool:
    """Tell whether the shapes of a module's factors and magnitude are those of its kind and rank."""
    (a, b), kind = factors(shapes), entry["kind"]
    rank = entry["rank"] * (entry["layout"]["experts"] if kind == "experts" else 1)
    kernel = len(a) - 2
    sides = {"conv": (1, 2, 3), "dora": (0, 1, 2, 3)}.get(kind, (0,)) if "lora_A.weight" in shapes else (0,)
    magnitude = [1, *b[:1], *[1] * kernel] if kernel > 0 else b[:1]
    good = kernel in sides and a[0] == rank and b[1:] == [rank, *[1] * kernel]
    return good and shapes.get(MAGNITUDE, magnitude) == magnitude


def numbers(tensor: tuple[str, list[int], bytes]) -> Vector:
    dtype, _, data = tensor
    if dtype == "BF16":  # the upper half of an F32
        dtype, data = "F32", b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    return [value for (value,) in struct.iter_unpack(f"<{CODES[dtype]}", data)] if dtype in CODES else []


def nested(flat: Vector, shape: list[int]) -> Any:
    if len(shape) == 1:
        return flat
    step = math.prod(shape[1:])
    return [nested(flat[i : i + step], shape[1:]) for i in range(0, len(flat), step)]


def transpose(matrix: list[Vector]) -> list[Vector]:
    return [list(column) for column in zip(*matrix, strict=True)]


def delta_weight(entry: dict[str, Any], parts: Parts) -> Any:
    """Return s·B·A in the shape that the formulas T-13 to T-17 give."""
    a_tensor, b_tensor = factors(parts)
    A, B, s, r = numbers(a_tensor), numbers(b_tensor), entry["scaling"], entry["rank"]
    experts = entry["layout"]["experts"] if entry["kind"] == "experts" else 1
    out, inputs = b_tensor[1][0], math.prod(a_tensor[1][1:])

    def product(e: int) -> list[Vector]:  # A is expert-major, B expert-minor; one expert is the plain case
        a = [A[(e * r + k) * inputs : (e * r + k + 1) * inputs] for k in range(r)]
        b = [[B[(o * r + k) * experts + e] for k in range(r)] for o in range(out)]
        return [[s * sum(b[o][k] * a[k][i] for k in range(r)) for i in range(inputs)] for o in range(out)]

    one = product(0)
    if entry["kind"] == "experts":
        each = [product(e) for e in range(experts)]
        return [transpose(matrix) for matrix in each] if entry["layout"]["transposed"] else each
    if "lora_embedding_A" in parts:
        return transpose(one)
    return nested([value for row in one for value in row], [out, *a_tensor[1][1:]])
