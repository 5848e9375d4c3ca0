"""The valid cases: name -> (clauses they show, how they differ from the plain adapter, what a reader must print)."""

from __future__ import annotations

import math
from typing import Any

from make import CONFIG, FILE, ONES, ZERO, Case, Change, P, add, both, folder, kind, module, put, safetensors, tensor

A, B = "lora_A.weight", "lora_B.weight"
PLAIN = {"rank": 1, "scaling": 2, "delta_weight": [[2, 1, -4], [6, 3, -12]]}
TWO_A, TWO_B = [1.0, 2, 3, 0, -1, 0.5], [1.0, 0, 0.5, 2]  # (2, 3) and (2, 2)
TWO = [[1.0, 2, 3], [0.5, -1, 2.5]]  # their product
BASE = {"blk.q.weight": tensor([2, 3], [0.5, -1, 2, 4, 0.25, 8]), "norm.weight": tensor([2], [1, 1], "F16")}


def two(dtype: str = "F32", scaling: float = 1.0) -> Change:
    parts = {A: tensor([2, 3], TWO_A, dtype), B: tensor([2, 2], TWO_B, dtype)}
    return kind("lora", parts, rank=2, alpha=2, scaling=scaling)


def scaled(matrix: list[list[float]], scaling: float, rank: int = 2, **more: Any) -> dict[str, Any]:
    return {"blk.q": {"rank": rank, "scaling": scaling, "delta_weight": [[scaling * v for v in r] for r in matrix]} | more}


def second(rank: int, scaling: float, alpha: float) -> Change:
    """Add a module blk.v of another rank and scaling."""

    def change(case: Case) -> None:
        case["manifest"]["modules"]["blk.v"] = module(rank, alpha, scaling)
        case["manifest"] |= {"target_modules": ["q", "v"], "alpha": min(alpha, 2)}
        case["tensors"][f"{P}blk.v.{A}"] = tensor([rank, 2], [1.0] * 2 * rank)
        case["tensors"][f"{P}blk.v.{B}"] = tensor([1, rank], [0.5] * rank)

    return change


def experts(nested: bool, transposed: bool) -> Change:
    layout = {"experts": 2, "parameter": "down", "transposed": transposed}
    parts = {A: tensor([2, 2], [1, 2, 3, 4]), B: tensor([1, 2], [1, -1])}

    def change(case: Case) -> None:
        kind("experts", parts, layout=layout, targets=[])(case)
        names = ["blk.q.down"]
        if nested:
            inner = {f"{P}blk.q.base_layer.{part}": value for part, value in parts.items()}
            case["tensors"] = inner | case["tensors"]
            case["manifest"]["modules"]["blk.q.base_layer"] = module(kind="experts", layout={**layout, "parameter": "up"})
            names = ["blk.q.up", "blk.q.down"]
        folder(case, target_parameters=names)

    return change


EXPERTS = {"rank": 1, "scaling": 2, "delta_weight": [[[2, 4]], [[-6, -8]]]}
DORA = {"lora_magnitude_vector": tensor([2], [0.5, 4])}
LINEAR = {A: tensor([1, 3], [1, 0.5, -2]), B: tensor([2, 1], [1, 3])}
EMBEDDING = {"lora_embedding_A": tensor([1, 3], [1, 0.5, -2]), "lora_embedding_B": tensor([2, 1], [1, 3])}
CONV = {A: tensor([1, 2, 1, 2], [1, 2, 3, 4]), B: tensor([2, 1, 1, 1], [1, -0.5])}
CONV_DELTA = [[[[2, 4]], [[6, 8]]], [[[-1, -2]], [[-3, -4]]]]
TURNED = [[2, 6], [1, 3], [-4, -12]]


def sealed(case: Case) -> None:
    from container import tiers

    put("modules", "blk.q", "tensor", "blk.q.weight")(case)
    found = tiers(BASE, "blake3")
    found["tensors"] = {"blk.q.weight": found["tensors"]["blk.q.weight"]}
    case["manifest"]["base_model"] = {"id": "org/base", "revision": "main", "hash": found}
    shards = {name: {name: value} for name, value in BASE.items()}
    case["files"] = {f"base/{name}.safetensors": safetensors(shard, {}, {}) for name, shard in shards.items()}
    folder(case)


def provenance(case: Case) -> None:
    case["manifest"]["provenance"] = [
        {"operation": "train", "tool": "peft 0.21.2"},
        {"operation": "combine", "tool": "loratools 0.1.0", "parameters": {"method": "linear"}, "seed": 7,
         "inputs": [{"digest": ZERO, "weight": -0.5}, {"digest": ONES, "weight": 1}]},
    ]  # fmt: skip
    case["manifest"]["settings"] = {"task_type": "CAUSAL_LM"}


def later(case: Case) -> None:
    case["manifest"] |= {"format_version": "1.7", "a_new_field": {"x": [1, None]}}
    case["manifest"]["modules"]["blk.q"]["another"] = True


def long_name(case: Case) -> None:
    path = "b" * (512 - len(P) - len(".lora_A.weight"))
    case["tensors"] = {f"{P}{path}.{part}": value for part, value in LINEAR.items()}
    case["manifest"] |= {"modules": {path: module()}, "target_modules": [path]}


def other_files(case: Case) -> None:
    folder(case, a_field_of_tomorrow=1)
    case["files"] = {"adapter/README.md": b"# A card\n", "adapter/notes.bin": b"\0\1"}


def replaced(path: str, name: str) -> Change:
    return both(put("replacements", path, {}), add(name, tensor([3], [1, 2, 3])))


VALID: dict[str, tuple[list[str], Change, dict[str, Any]]] = {
    "linear/plain": (["T-13"], lambda case: None, {"blk.q": PLAIN}),
    "linear/rank-2-f16": (["T-13"], two("F16"), scaled(TWO, 1)),
    "linear/rank-2-bf16": (["T-13"], two("BF16"), scaled(TWO, 1)),
    "linear/rank-2-f64": (["T-13"], two("F64"), scaled(TWO, 1)),
    "linear/scaling-is-not-alpha-over-rank": (["T-20"], two(scaling=2 / math.sqrt(2)), scaled(TWO, 2 / math.sqrt(2))),
    "linear/scaling-negative": (["T-20"], two(scaling=-0.25), scaled(TWO, -0.25)),
    "linear/scaling-zero": (["T-20"], two(scaling=0), scaled(TWO, 0)),
    "linear/transposed": (["M-18"], put("modules", "blk.q", "layout", {"transposed": True}), {"blk.q": PLAIN}),
    "linear/bias": (["T-18"], add(f"{P}blk.q.lora_B.bias", tensor([2], [1, -1])), {"blk.q": PLAIN | {"bias": [2, -2]}}),
    "embedding/plain": (["T-14"], kind("embedding", EMBEDDING), {"blk.q": PLAIN | {"delta_weight": TURNED}}),
    "conv/1-by-2": (["T-15"], kind("conv", CONV), {"blk.q": PLAIN | {"delta_weight": CONV_DELTA}}),
    "conv/one-dimensional": (
        ["T-15"],
        kind("conv", {A: tensor([1, 1, 3], [1, 0.5, -2]), B: tensor([2, 1, 1], [1, 3])}),
        {"blk.q": PLAIN | {"delta_weight": [[[2, 1, -4]], [[6, 3, -12]]]}},
    ),
    "dora/linear": (["T-16"], kind("dora", LINEAR | DORA), {"blk.q": PLAIN | {"magnitude": [0.5, 4]}}),
    "dora/embedding": (
        ["T-16"],
        kind("dora", EMBEDDING | DORA),
        {"blk.q": PLAIN | {"delta_weight": TURNED, "magnitude": [0.5, 4]}},
    ),
    "dora/conv": (
        ["T-16"],
        kind("dora", CONV | {"lora_magnitude_vector": tensor([1, 2, 1, 1], [0.5, 4])}),
        {"blk.q": PLAIN | {"delta_weight": CONV_DELTA, "magnitude": [0.5, 4]}},
    ),
    "experts/two": (["T-17", "L-12"], experts(False, False), {"blk.q": EXPERTS}),
    "experts/transposed": (
        ["T-17"],
        experts(False, True),
        {"blk.q": EXPERTS | {"delta_weight": [[[2], [4]], [[-6], [-8]]]}},
    ),
    "experts/nested": (["L-12"], experts(True, False), {"blk.q": EXPERTS, "blk.q.base_layer": EXPERTS}),
    "replacements/head": (
        ["T-19"],
        replaced("head.bias", f"{P}head.bias"),
        {"blk.q": PLAIN, "head.bias": {"replacement": [1, 2, 3]}},
    ),
    "replacements/in-a-folder": (
        ["L-09"],
        both(replaced("head.out.bias", f"{P}head.out.bias"), lambda case: folder(case, modules_to_save=["head"])),
        {"blk.q": PLAIN, "head.out.bias": {"replacement": [1, 2, 3]}},
    ),
    "replacements/inside-a-module": (
        ["T-19"],
        both(replaced("blk.q.bias", f"{P}blk.q.base_layer.bias"), folder),
        {"blk.q": PLAIN, "blk.q.bias": {"replacement": [1, 2, 3]}},
    ),
    "folder/plain": (["L-06", "L-07", "L-08"], folder, {"blk.q": PLAIN}),
    "folder/patterns": (
        ["L-06", "L-07"],
        both(second(2, 0.5, 1), lambda c: folder(c, rank_pattern={"^blk\\.v": 2}, alpha_pattern={"blk.q": 2})),
        {"blk.q": PLAIN, "blk.v": {"rank": 2, "scaling": 0.5, "delta_weight": [[0.5, 0.5]]}},
    ),
    "folder/rslora": (
        ["L-07"],
        both(two(scaling=2 / math.sqrt(2)), lambda case: folder(case, use_rslora=True)),
        scaled(TWO, 2 / math.sqrt(2)),
    ),
    "folder/other-files-and-fields": (["L-13"], other_files, {"blk.q": PLAIN}),
    "integrity/sha256": (["I-01", "I-02"], lambda case: case.update(algorithm="sha256"), {"blk.q": PLAIN}),
    "integrity/base-in-shards": (["I-08", "I-10"], sealed, {"blk.q": PLAIN}),
    "provenance/two-steps": (["M-20", "M-21", "M-22", "M-23"], provenance, {"blk.q": PLAIN}),
    "extensions/not-understood-and-optional": (
        ["X-01", "X-04"],
        put("extensions", [{"name": "org.example", "must_understand": False, "configuration": {"a": 1}}]),
        {"blk.q": PLAIN},
    ),
    "versioning/later-minor": (["V-02", "V-03"], later, {"blk.q": PLAIN}),
    "manifest/names-beyond-ascii": (["M-02"], put("settings", {"é": "ß", "\U0001f600": "\n", "ﬀ": 0}), {"blk.q": PLAIN}),
    "manifest/numbers": (["M-02"], put("settings", {"n": [1e-7, 0.000001, 1e21, 0.1, 2**53 - 1]}), {"blk.q": PLAIN}),
    "limits/name-of-512-bytes": (["S-07"], long_name, {"b" * (512 - len(P) - 14): PLAIN}),
    "limits/fields-are-not-paths": (
        ["S-09"],
        put("modules", "blk.q", "tensor", "../../../../etc/passwd"),
        {"blk.q": PLAIN},
    ),
}

__all__ = ["BASE", "CONFIG", "FILE", "VALID"]
