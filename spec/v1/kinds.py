"""The registered kinds: their parts and the shapes of these (chapter 4). Part of the independent reader."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Shapes = dict[str, list[int]]

LINEAR, EMBEDDING = {"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}
BIAS, MAGNITUDE, SCALE = "lora_B.bias", "lora_magnitude_vector", "dora_scale"
FLAG, ROWS = "on_input", "token_adapter.trainable_tokens_delta"
LOCON = LINEAR | {"lora_mid.weight"}
HADAMARD = {f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"}
LOHA = [HADAMARD, HADAMARD | {"hada_t1", "hada_t2"}]
W1 = [{"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}]
W2 = [{"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"}]
LOKR = [first | second for first in W1 for second in W2]
GLORA = {f"{name}.weight" for name in ("a1", "a2", "b1", "b2")}
# kind: (clause of its shapes, sets of parts, optional parts, the version that registered it)
KINDS: dict[str, tuple[str, list[set[str]], set[str], str]] = {
    "lora": ("T-06", [LINEAR], {BIAS}, "1.0"),
    "embedding": ("T-07", [EMBEDDING], set(), "1.0"),
    "conv": ("T-08", [LINEAR], {BIAS}, "1.0"),
    "dora": ("T-09", [LINEAR | {MAGNITUDE}, EMBEDDING | {MAGNITUDE}], {BIAS}, "1.0"),
    "experts": ("T-10", [LINEAR], set(), "1.0"),
    "locon": ("T-24", [LOCON], set(), "1.1"),
    "loha": ("T-26", LOHA, set(), "1.1"),
    "lokr": ("T-28", LOKR, set(), "1.1"),
    "glora": ("T-30", [GLORA], set(), "1.1"),
    "oft": ("T-32", [{"oft_blocks"}], {"rescale"}, "1.1"),
    "ia3": ("T-34", [{"weight", FLAG}], set(), "1.1"),
    "full": ("T-36", [{"diff"}], {"diff_b"}, "1.1"),
    "norm": ("T-38", [{"w_norm"}], {"b_norm"}, "1.1"),
    "wdora": ("T-40", [parts | {SCALE} for parts in (LINEAR, LOCON, *LOHA, *LOKR)], set(), "1.1"),
    "tokens": ("T-42", [{ROWS}], set(), "1.1"),
}
UNTARGETED = {"experts", "tokens"}  # PEFT finds them by other fields than target_modules
PEFT = {"lora", "embedding", "conv", "dora", "experts", "tokens"}
ON_WEIGHT = {"glora", "oft", "ia3", "wdora", "tokens"}  # their change depends on W
DIFFERENCES = {"full": ("diff", "diff_b"), "norm": ("w_norm", "b_norm")}


def factors(parts: dict[str, Any]) -> tuple[Any, Any]:
    if "lora_embedding_A" in parts:
        return parts["lora_embedding_A"], parts["lora_embedding_B"]
    return parts["lora_A.weight"], parts["lora_B.weight"]


def ones(kind: str, parts: Any) -> list[str]:
    """Return which of rank and scaling mean nothing, and so are 1."""
    if kind in ("full", "norm", "ia3", "tokens") or {"lokr_w1", "lokr_w2"} <= set(parts):
        return ["rank", "scaling"]
    return ["scaling"] if kind == "oft" else []


def fits(entry: dict[str, Any], shapes: Shapes) -> bool:
    """Tell whether the shapes of a module's tensors are those of its kind, its rank and its layout."""
    return FITS[entry["kind"]](entry["rank"], entry.get("layout", {}), shapes)


def plain(sides: tuple[int, ...]) -> Callable[[int, dict[str, Any], Shapes], bool]:
    """Return the rule of A and B, which may have so many sides of a kernel, and of a magnitude beside them."""

    def rule(rank: int, layout: dict[str, Any], s: Shapes) -> bool:
        a, b = factors(s)
        kernel = len(a) - 2
        magnitude = [1, *b[:1], *[1] * kernel] if kernel > 0 else b[:1]
        good = kernel in (sides if "lora_A.weight" in s else (0,)) and a[0] == rank and b[1:] == [rank, *[1] * kernel]
        return good and s.get(MAGNITUDE, magnitude) == magnitude

    return rule


def experts(rank: int, layout: dict[str, Any], s: Shapes) -> bool:
    return plain((0,))(rank * layout["experts"], layout, s)


def locon(rank: int, layout: dict[str, Any], s: Shapes) -> bool:
    a, b, mid = *factors(s), s["lora_mid.weight"]
    ones = [1] * (len(mid) - 2)
    good = 3 <= len(mid) <= 5 and len(a) == len(b) == len(mid) and a[0] == rank == mid[1] and b[1] == mid[0]
    return good and a[2:] == b[2:] == ones


def loha(rank: int, layout: dict[str, Any], s: Shapes) -> bool:
    a1, b1, a2, b2 = (s[f"hada_w{i}_{side}"] for i in (1, 2) for side in "ab")
    if any(len(shape) != 2 for shape in (a1, b1, a2, b2)) or b1[0] != rank:
        return False
    if "hada_t1" not in s:
        return (a1[1], a2[1]) == (b1[0], b2[0]) and (a1[0], b1[1]) == (a2[0], b2[1])
    t1, t2 = s["hada_t1"], s["hada_t2"]
    cores = t1[:2] == [a1[0], b1[0]] and t2[:2] == [a2[0], b2[0]] and t1[2:] == t2[2:] and 3 <= len(t1) <= 5
    return cores and (a1[1], b1[1]) == (a2[1], b2[1])


def lokr(rank: int, layout: dict[str, Any], s: Shapes) -> bool:
    firsts = [shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if (shape := s.get(name))]
    if firsts[:1] not in ([], [rank]):
        return False
    if "lokr_w1" in s:
        first = len(s["lokr_w1"]) == 2
    else:
        a, b = s["lokr_w1_a"], s["lokr_w1_b"]
        first = len(a) == len(b) == 2 and a[1] == b[0]
    if "lokr_w2" in s:
        return first and 2 <= len(s["lokr_w2"]) <= 5
    a, b, core = s["lokr_w2_a"], s["lokr_w2_b"], s.get("lokr_t2")
    if core is None:
        return first and len(a) == 2 and 2 <= len(b) <= 5 and a[1] == b[0]
    return first and len(a) == len(b) == 2 and 3 <= len(core) <= 5 and core[:2] == [a[0], b[0]]


def glora(rank: int, layout: dict[str, Any], s: Shapes) -> bool:
    a1, a2, b1, b2 = (s[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    flat = all(len(shape) > 1 and set(shape[2:]) <= {1} for shape in (a1, a2, b1)) and len(b2) > 1
    return flat and a2[0] == rank and a1[:2] == [a2[1], rank] and b1[1] == b2[0] and a2[1] == b2[1]


def oft(rank: int, layout: dict[str, Any], s: Shapes) -> bool:
    blocks = s["oft_blocks"]
    good = len(blocks) == 3 and blocks[1:] == [rank, rank]
    return good and math.prod(s.get("rescale", [blocks[0] * rank])) == blocks[0] * rank


def ia3(rank: int, layout: dict[str, Any], s: Shapes) -> bool:
    return math.prod(s[FLAG]) == 1 and math.prod(s["weight"]) == max(s["weight"], default=0)


def difference(kind: str) -> Callable[[int, dict[str, Any], Shapes], bool]:
    weight, bias = DIFFERENCES[kind]
    return lambda rank, layout, s: len(s[weight]) > 0 and s.get(bias, s[weight][:1]) == s[weight][:1]


def tokens(rank: int, layout: dict[str, Any], s: Shapes) -> bool:
    return len(s[ROWS]) == 2 and s[ROWS][0] == len(layout["rows"])


def wdora(rank: int, layout: dict[str, Any], s: Shapes) -> bool:
    held = {part: shape for part, shape in s.items() if part != SCALE}
    kind = around(held)
    if not FITS[kind](rank, layout, held):
        return False
    (out, *inner), scale = weight_shape(kind, held), s[SCALE]
    if len(scale) < 2 or math.prod(scale[2:]) != 1:
        return False
    return scale[:2] == [out, 1] or (scale[0] == 1 and math.prod(inner) % scale[1] == 0)


FITS: dict[str, Callable[[int, dict[str, Any], Shapes], bool]] = {
    "lora": plain((0,)), "embedding": plain((0,)), "conv": plain((1, 2, 3)), "dora": plain((0, 1, 2, 3)),
    "experts": experts, "locon": locon, "loha": loha, "lokr": lokr, "glora": glora, "oft": oft, "ia3": ia3,
    "full": difference("full"), "norm": difference("norm"), "wdora": wdora, "tokens": tokens,
}  # fmt: skip


def around(parts: Any) -> str:
    """Return the kind whose parts stand within `wdora`."""
    names = set(parts)
    if "lora_mid.weight" in names:
        return "locon"
    if "hada_w1_a" in names:
        return "loha"
    if names & {"lokr_w1", "lokr_w1_a"}:
        return "lokr"
    return "lora" if len(parts["lora_A.weight"]) == 2 else "conv"


def weight_shape(kind: str, s: Shapes) -> list[int]:
    """Return (out, in, k…) as the parts of a kind within `wdora` say it."""
    if kind == "loha":
        a, b, t = s["hada_w1_a"], s["hada_w1_b"], s.get("hada_t1")
        return [a[0], b[1]] if t is None else [a[1], b[1], *t[2:]]
    if kind == "lokr":
        first = s["lokr_w1"] if "lokr_w1" in s else [s["lokr_w1_a"][0], s["lokr_w1_b"][1]]
        if "lokr_w2" in s:
            second = s["lokr_w2"]
        elif "lokr_t2" in s:
            second = [s["lokr_w2_a"][1], s["lokr_w2_b"][1], *s["lokr_t2"][2:]]
        else:
            second = [s["lokr_w2_a"][0], *s["lokr_w2_b"][1:]]
        return [first[0] * second[0], first[1] * second[1], *second[2:]]
    a_shape, b_shape = factors(s)
    return [b_shape[0], a_shape[1], *(s["lora_mid.weight"] if kind == "locon" else a_shape)[2:]]
