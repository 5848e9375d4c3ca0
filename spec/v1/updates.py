"""What the kinds do: delta weights, and weights that they change (chapter 4). Part of the independent reader."""

from __future__ import annotations

import math
import struct
from typing import Any

from kinds import DIFFERENCES, FLAG, ON_WEIGHT, ROWS, SCALE, Shapes, around, factors, fits, weight_shape

__all__ = ["changed", "delta_weight", "fits", "numbers"]

Tensor = tuple[str, list[int], bytes]
Parts = dict[str, Tensor]
Vector = list[float]

CODES = {"F16": "e", "F32": "f", "F64": "d", "I64": "q", "I32": "i", "U8": "B", "BOOL": "B"}


def numbers(tensor: Tensor) -> Vector:
    dtype, _, data = tensor
    if dtype == "BF16":  # the upper half of an F32
        dtype, data = "F32", b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    return [value for (value,) in struct.iter_unpack(f"<{CODES[dtype]}", data)] if dtype in CODES else []


def nested(flat: Vector, shape: list[int]) -> Any:
    if len(shape) <= 1:
        return flat
    step = math.prod(shape[1:])
    return [nested(flat[i : i + step], shape[1:]) for i in range(0, len(flat), step)]


def flattened(value: Any) -> Vector:
    return [number for part in value for number in flattened(part)] if isinstance(value, list) else [value]


def matrix(tensor: Tensor) -> list[Vector]:
    """Return a tensor's numbers as rows: its first side by all others."""
    flat = numbers(tensor)
    step = len(flat) // tensor[1][0]
    return [flat[i : i + step] for i in range(0, len(flat), step)]


def transpose(rows: list[Vector]) -> list[Vector]:
    return [list(column) for column in zip(*rows, strict=True)]


def times(left: list[Vector], right: list[Vector]) -> list[Vector]:
    columns = transpose(right)
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in left]


def shapes_of(parts: Parts) -> Shapes:
    return {part: tensor[1] for part, tensor in parts.items()}


def delta_weight(entry: dict[str, Any], parts: Parts) -> Any:
    """Return the ΔW that a kind adds, in the shape that its formula gives; None for kinds whose change depends on W."""
    kind, s = entry["kind"], entry["scaling"]
    if kind in ON_WEIGHT - {"wdora"}:
        return None
    if kind in DIFFERENCES:
        tensor = parts[DIFFERENCES[kind][0]]
        return nested(numbers(tensor), tensor[1])
    held = {part: tensor for part, tensor in parts.items() if part != SCALE}
    kind = around(shapes_of(held)) if kind == "wdora" else kind
    if kind in ("locon", "loha", "lokr"):
        rows = {"locon": locon, "loha": loha, "lokr": lokr}[kind](held)
        return nested([s * value for row in rows for value in row], weight_shape(kind, shapes_of(held)))
    return product(kind, entry, held)


def product(kind: str, entry: dict[str, Any], parts: Parts) -> Any:
    """Return s·B·A in the shape that the formulas T-13 to T-17 give."""
    a_tensor, b_tensor = factors(parts)
    A, B, s, r = numbers(a_tensor), numbers(b_tensor), entry["scaling"], entry["rank"]
    experts = entry["layout"]["experts"] if kind == "experts" else 1
    out, inputs = b_tensor[1][0], math.prod(a_tensor[1][1:])

    def of_expert(e: int) -> list[Vector]:  # A is expert-major, B expert-minor; one expert is the plain case
        a = [A[(e * r + k) * inputs : (e * r + k + 1) * inputs] for k in range(r)]
        b = [[B[(o * r + k) * experts + e] for k in range(r)] for o in range(out)]
        return [[s * sum(b[o][k] * a[k][i] for k in range(r)) for i in range(inputs)] for o in range(out)]

    one = of_expert(0)
    if kind == "experts":
        each = [of_expert(e) for e in range(experts)]
        return [transpose(rows) for rows in each] if entry["layout"]["transposed"] else each
    if "lora_embedding_A" in parts:
        return transpose(one)
    return nested([value for row in one for value in row], [out, *a_tensor[1][1:]])


def cored(core: Tensor, left: list[Vector], right: list[Vector]) -> list[Vector]:
    """Return Σ left[o][p]·core[p, q, k…]·right[q][i] as rows o of (i, k…)."""
    p, q, *sides = core[1]
    kernel, flat = math.prod(sides), numbers(core)
    return [
        [
            sum(row[x] * flat[(x * q + y) * kernel + k] * right[y][i] for x in range(p) for y in range(q))
            for i in range(len(right[0]))
            for k in range(kernel)
        ]
        for row in left
    ]


def locon(parts: Parts) -> list[Vector]:
    return cored(parts["lora_mid.weight"], matrix(parts["lora_B.weight"]), matrix(parts["lora_A.weight"]))


def loha(parts: Parts) -> list[Vector]:
    pairs = [(matrix(parts[f"hada_w{i}_a"]), matrix(parts[f"hada_w{i}_b"])) for i in (1, 2)]
    if "hada_t1" in parts:
        whole = [cored(parts[f"hada_t{i + 1}"], transpose(a), b) for i, (a, b) in enumerate(pairs)]
    else:
        whole = [times(a, b) for a, b in pairs]
    return [[x * y for x, y in zip(*rows, strict=True)] for rows in zip(*whole, strict=True)]


def lokr(parts: Parts) -> list[Vector]:
    one, two = (
        matrix(parts[f"lokr_{w}"])
        if f"lokr_{w}" in parts
        else cored(parts["lokr_t2"], transpose(matrix(parts["lokr_w2_a"])), matrix(parts["lokr_w2_b"]))
        if w == "w2" and "lokr_t2" in parts
        else times(matrix(parts[f"lokr_{w}_a"]), matrix(parts[f"lokr_{w}_b"]))
        for w in ("w1", "w2")
    )
    return [[x * y for x in upper for y in lower] for upper in one for lower in two]


# ---- what depends on W --------------------------------------------------------------------------------------------


def changed(entry: dict[str, Any], parts: Parts, weight: Tensor) -> Any:
    """Return W' for a base weight (out, in, k…), or (V, d), of the kinds whose change depends on it."""
    change = {"glora": glora, "oft": oft, "ia3": ia3, "wdora": wdora, "tokens": tokens}[entry["kind"]]
    return nested([value for row in change(entry, parts, weight) for value in row], weight[1])


def glora(entry: dict[str, Any], parts: Parts, weight: Tensor) -> list[Vector]:
    a1, a2, b1, b2 = (matrix(parts[f"{name}.weight"]) for name in ("a1", "a2", "b1", "b2"))
    W, mix, added, s = matrix(weight), times(a1, a2), times(b1, b2), entry["scaling"]
    kernel = len(W[0]) // len(mix)
    return [
        [
            row[i * kernel + k]
            + s * (sum(row[j * kernel + k] * mix[j][i] for j in range(len(mix))) + added[o][i * kernel + k])
            for i in range(len(mix))
            for k in range(kernel)
        ]
        for o, row in enumerate(W)
    ]


def inverse(square: list[Vector]) -> list[Vector]:
    n = len(square)
    rows = [[*row, *(float(i == j) for j in range(n))] for i, row in enumerate(square)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda at: abs(rows[at][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(n):
            if j != i:
                rows[j] = [a - rows[j][i] * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[n:] for row in rows]


def oft(entry: dict[str, Any], parts: Parts, weight: Tensor) -> list[Vector]:
    n, b, _ = parts["oft_blocks"][1]
    X = nested(numbers(parts["oft_blocks"]), [n, b, b])
    Q = [[[x[i][j] - x[j][i] for j in range(b)] for i in range(b)] for x in X]
    limit, length = entry["layout"]["constraint"] * n * b, math.sqrt(sum(value**2 for value in flattened(Q))) + 1e-8
    shrink = limit / length if 0 < limit < length else 1.0
    rescale = numbers(parts["rescale"]) if "rescale" in parts else [1.0] * (n * b)
    W, rows = matrix(weight), []
    for k in range(n):
        plus, minus = (
            [[float(i == j) + sign * shrink * Q[k][i][j] for j in range(b)] for i in range(b)] for sign in (1, -1)
        )
        turned = times(transpose(times(plus, inverse(minus))), W[k * b : (k + 1) * b])
        rows += [[rescale[k * b + i] * value for value in turned[i]] for i in range(b)]
    return rows


def ia3(entry: dict[str, Any], parts: Parts, weight: Tensor) -> list[Vector]:
    v, W = numbers(parts["weight"]), matrix(weight)
    if not numbers(parts[FLAG])[0]:
        return [[value * (1 + v[o]) for value in row] for o, row in enumerate(W)]
    kernel = len(W[0]) // len(v)
    return [[value * (1 + v[i // kernel]) for i, value in enumerate(row)] for row in W]


def wdora(entry: dict[str, Any], parts: Parts, weight: Tensor) -> list[Vector]:
    scale, m = parts[SCALE][1], numbers(parts[SCALE])
    flat = flattened(delta_weight(entry, parts))
    W = matrix(weight)
    step = len(W[0])
    W = [[w + flat[o * step + i] for i, w in enumerate(row)] for o, row in enumerate(W)]
    if scale[0] != 1 or len(W) == 1:
        return [[value * m[o] / math.hypot(*row) for value in row] for o, row in enumerate(W)]
    kernel = step // len(m)
    norms = [math.hypot(*(row[i * kernel + k] for row in W for k in range(kernel))) for i in range(len(m))]
    return [[value * m[i // kernel] / norms[i // kernel] for i, value in enumerate(row)] for row in W]


def tokens(entry: dict[str, Any], parts: Parts, weight: Tensor) -> list[Vector]:
    W, rows = matrix(weight), matrix(parts[ROWS])
    for place, row in zip(entry["layout"]["rows"], rows, strict=True):
        W[place] = row
    return W
