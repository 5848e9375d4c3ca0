"""The valid cases: name -> (clauses they show, how they differ from the plain adapter, what a reader must print)."""

from __future__ import annotations

import math
from typing import Any

from make import CONFIG, FILE, ONES, ZERO, Case, Change, P, add, both, folder, kind, module, new, put, safetensors, tensor

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


def foreign(case: Case) -> None:
    """Make a case a folder whose config PEFT refuses."""
    targets = case["manifest"]["target_modules"]
    case["config"] = {"base_model_name_or_path": "org/base", "peft_type": "LORATOOLS", "target_modules": targets}


def on(weight: tuple[str, list[int], bytes], name: str, parts: dict[str, Any], **entry: Any) -> Change:
    """Make an adapter of a kind whose change depends on W, with a base model of this one weight."""

    def base(case: Case) -> None:
        case["files"] = {"base/model.safetensors": safetensors({"blk.q.weight": weight}, {}, {})}

    return both(new(kind(name, parts, tensor="blk.q.weight", **entry)), base, foreign)


def typed(case: Case) -> None:
    """Seal a square weight that the base stores (in, out), which only the base's model type tells."""
    put("base_model", {"id": "org/base", "model_type": "gpt2"})(case)
    put("modules", "blk.q", "layout", {"transposed": True})(case)


def with_config(case: Case, model_type: str = "gpt2") -> None:
    case["files"] = {
        "base/model.safetensors": safetensors(BASE, {}, {}),
        "base/config.json": f'{{"model_type": "{model_type}"}}\n'.encode(),
    }
    folder(case)


def tokens(case: Case) -> None:
    folder(case, target_modules=[], trainable_token_indices={"blk.q": [2, 0]})


def repeated(case: Case) -> None:
    path = "layers.1.q"
    case["tensors"] = {f"{P}{path}.{part}": value for part, value in LINEAR.items()}
    case["manifest"] |= {"modules": {path: module()}, "target_modules": ["q"]}
    layers = {"name": "layer_replication", "must_understand": True, "configuration": {"layers": LAYERS}}
    case["manifest"]["extensions"] = [layers]


def covered(case: Case) -> None:
    """Use everything that the meaning covers, and some that it does not."""
    replaced("head.bias", f"{P}head.bias")(case)
    case["manifest"]["replacements"]["head.bias"] = {"tensor": "head.bias", "note": "not covered"}
    case["manifest"]["modules"]["blk.q"] |= {"tensor": "blk.q.weight", "layout": {"transposed": False, "more": [1.5]}}
    case["manifest"]["modules"]["blk.q"]["note"] = "not covered"
    case["manifest"]["extensions"] = [{"name": "org.example", "must_understand": False}]


LAYERS = [[0, 1], [0, 1]]
W = tensor([2, 3], [0.5, -1, 2, 4, 0.25, 8])
CUBE = tensor([2, 2, 2], [1, 2, 3, 4, 5, 6, 7, 8])
LOCON = {A: tensor([1, 2, 1, 1], [1, -2]), B: tensor([2, 2, 1, 1], [1, 2, 0, -1]),
         "lora_mid.weight": tensor([2, 1, 1, 2], [1, 2, 0.5, -1])}  # fmt: skip
LOHA = {"hada_w1_a": tensor([2, 1], [1, 2]), "hada_w1_b": tensor([1, 3], [1, 0, -1]),
        "hada_w2_a": tensor([2, 2], [1, 1, 0, 2]), "hada_w2_b": tensor([2, 3], [2, 1, 0, 0, 1, 3])}  # fmt: skip
CORES = {"hada_w1_a": tensor([1, 2], [1, 3]), "hada_w1_b": tensor([1, 2], [2, -1]), "hada_t1": tensor([1, 1, 2], [1, 2]),
         "hada_w2_a": tensor([1, 2], [1, 1]), "hada_w2_b": tensor([1, 2], [1, 4]),
         "hada_t2": tensor([1, 1, 2], [0.5, -1])}  # fmt: skip
LOKR = {"lokr_w1": tensor([2, 2], [1, 2, 3, 4]), "lokr_w2": tensor([1, 2], [1, -1])}
FACTORED = {"lokr_w1_a": tensor([2, 1], [1, 2]), "lokr_w1_b": tensor([1, 2], [1, -1]),
            "lokr_w2_a": tensor([2, 1], [1, 3]), "lokr_w2_b": tensor([1, 2], [2, 0.5])}  # fmt: skip
TUCKER = {"lokr_w1": tensor([2, 1], [1, 2]), "lokr_t2": tensor([1, 1, 2], [1, 3]),
          "lokr_w2_a": tensor([1, 1], [2]), "lokr_w2_b": tensor([1, 2], [1, -1])}  # fmt: skip
GLORA = {"a1.weight": tensor([3, 1], [1, 0, 2]), "a2.weight": tensor([1, 3], [1, -1, 0.5]),
         "b1.weight": tensor([2, 1], [1, 3]), "b2.weight": tensor([1, 3], [1, 0.5, -2])}  # fmt: skip
GLORA_CONV = {"a1.weight": tensor([2, 1, 1], [1, -1]), "a2.weight": tensor([1, 2, 1], [2, 1]),
              "b1.weight": tensor([2, 1, 1], [1, 0]), "b2.weight": tensor([1, 2, 2], [1, 1, 0, 2])}  # fmt: skip
OFT = {"oft_blocks": tensor([1, 2, 2], [0, 1, 0.5, 0])}
ROTATED = {"oft_blocks": tensor([2, 2, 2], [0, 1, 0, 0, 0, -2, 3, 0]), "rescale": tensor([4, 1], [1, 2, 0.5, -1])}
OUTPUT = {"weight": tensor([2], [0.5, -1]), "on_input": tensor([], [0], "I64")}
INPUT = {"weight": tensor([3], [0.5, -1, 2]), "on_input": tensor([1], [1], "F16")}
FULL = {"diff": tensor([2, 2, 1], [1, -1, 0.5, 2]), "diff_b": tensor([2], [3, -4])}
NORM = {"w_norm": tensor([3], [1, -1, 0.25])}
SCALED = {**LINEAR, "dora_scale": tensor([2, 1], [0.5, 4])}
BY_INPUT = {**LOHA, "dora_scale": tensor([1, 3], [1, 2, -3])}
ROWS = {"token_adapter.trainable_tokens_delta": tensor([2, 2], [7, 8, 9, 10])}
ONE = {"rank": 1, "scaling": 1}


def plain(scaling: float = 2, rank: int = 1, **numbers: Any) -> dict[str, Any]:
    return {"blk.q": {"rank": rank, "scaling": scaling, **numbers}}


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
    "locon/core": (["T-24", "T-25"], new(kind("locon", LOCON)), plain(
        delta_weight=[[[[4, 0]], [[-8, 0]]], [[[-1, 2]], [[2, -4]]]])),
    "loha/matrices": (["T-26", "T-27"], new(kind("loha", LOHA)), plain(delta_weight=[[4, 0, -6], [0, 0, -24]])),
    "loha/cores": (["T-26", "T-27"], new(kind("loha", CORES)), plain(
        delta_weight=[[[2, -8], [-4, 16]], [[6, -24], [-12, 48]]])),
    "lokr/whole": (["T-29", "M-28"], new(kind("lokr", LOKR, scaling=1)), plain(
        1, delta_weight=[[1, -1, 2, -2], [3, -3, 4, -4]])),
    "lokr/factored": (["T-28", "T-29"], new(kind("lokr", FACTORED)), plain(
        delta_weight=[[4, 1, -4, -1], [12, 3, -12, -3], [8, 2, -8, -2], [24, 6, -24, -6]])),
    "lokr/core": (["T-28", "T-29"], new(kind("lokr", TUCKER)), plain(
        delta_weight=[[[4, 12], [-4, -12]], [[8, 24], [-8, -24]]])),
    "glora/linear": (["T-30", "T-31"], on(W, "glora", GLORA), plain(changed=[[11.5, -9, 2.5], [50, -36.75, 16]])),
    "glora/conv": (["T-30", "T-31"], on(CUBE, "glora", GLORA_CONV, scaling=0.5), plain(
        0.5, changed=[[[-0.5, 0.5], [2, 4]], [[3, 4], [6, 7]]])),
    "oft/one-block": (["T-32", "T-33"], on(W, "oft", OFT, rank=2, scaling=1, layout={"constraint": 4}), plain(
        1, 2, changed=[[-2.9, -0.8, -5.2], [2.8, -0.65, 6.4]])),
    "oft/constrained-and-rescaled": (
        ["T-33", "M-27"],
        on(tensor([4, 2], [1, 2, 3, 4, 5, 6, 7, 8]), "oft", ROTATED, rank=2, scaling=1, layout={"constraint": 0.25}),
        plain(1, 2, changed=[
            [0.14591291995491162, 0.8360599939706035], [6.317819060337272, 8.786581516490216],
            [4.154397264855568, 4.7979753529585905], [2.2279886586431106, 2.8138461311179697]])),
    "ia3/by-output": (["T-34", "T-35"], on(W, "ia3", OUTPUT, scaling=1), plain(1, changed=[[0.75, -1.5, 3], [0, 0, 0]])),
    "ia3/by-input": (["T-35"], on(W, "ia3", INPUT, scaling=1), plain(1, changed=[[0.75, 0, 6], [6, 0, 24]])),
    "ia3/by-input-of-a-convolution": (
        ["T-35"], on(CUBE, "ia3", {**INPUT, "weight": OUTPUT["weight"]}, scaling=1),
        plain(1, changed=[[[1.5, 3], [0, 0]], [[7.5, 9], [0, 0]]])),
    "full/with-bias": (["T-36", "T-37"], new(kind("full", FULL, scaling=1)), plain(
        1, delta_weight=[[[1], [-1]], [[0.5], [2]]], bias=[3, -4])),
    "norm/weight": (["T-38", "T-39"], new(kind("norm", NORM, scaling=1)), plain(1, delta_weight=[1, -1, 0.25])),
    "wdora/lora-by-output": (["T-40", "T-41"], on(W, "wdora", SCALED), plain(
        delta_weight=PLAIN["delta_weight"], magnitude=[0.5, 4],
        changed=[[0.3904344047215152, 0, -0.31234752377721214], [32 / 9, 1.1555555555555554, -1.4222222222222223]])),
    "wdora/loha-by-input": (["T-41"], on(W, "wdora", BY_INPUT), plain(
        delta_weight=[[4, 0, -6], [0, 0, -24]], magnitude=[1, 2, -3],
        changed=[[0.7474093186836597, -1.9402850002906638, 0.7276068751089989],
                 [0.6643638388299198, 0.48507125007266594, 2.9104275004359956]])),
    "tokens/two": (
        ["T-42", "T-43", "L-16"],
        both(on(tensor([3, 2], [1, 2, 3, 4, 5, 6]), "tokens", ROWS, scaling=1, targets=[], layout={"rows": [2, 0]}), tokens),
        plain(1, changed=[[9, 10], [3, 4], [7, 8]])),
    "experts/of-two-dimensions": (["T-10"], new(kind(
        "experts", LINEAR, targets=[], layout={"experts": 1, "parameter": "weight", "transposed": False})), plain(
        delta_weight=[PLAIN["delta_weight"]])),
    "folder/not-for-peft": (["L-14"], both(new(kind("loha", LOHA)), foreign), plain(delta_weight=[[4, 0, -6], [0, 0, -24]])),
    "integrity/meaning": (["I-11", "I-12"], new(covered), {"blk.q": PLAIN, "head.bias": {"replacement": [1, 2, 3]}}),
    "integrity/model-type": (["M-26", "I-13"], both(new(typed), with_config), {"blk.q": PLAIN}),
    "extensions/layer-replication": (
        ["X-06", "L-15"], both(new(repeated), lambda case: folder(case, layer_replication=LAYERS)), {"layers.1.q": PLAIN}),
    "limits/fields-are-not-paths": (
        ["S-09"],
        put("modules", "blk.q", "tensor", "../../../../etc/passwd"),
        {"blk.q": PLAIN},
    ),
}

__all__ = ["BASE", "CONFIG", "FILE", "VALID"]
