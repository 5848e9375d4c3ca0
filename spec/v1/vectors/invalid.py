"""The invalid cases: name -> (clause, whether the JSON Schema refuses it too, comment, the one fault)."""

from __future__ import annotations

import json
from typing import Any

from make import (
    CONFIG, ZERO, Case, Change, P, add, both, drop, folder, kind, lose, module, new, put, raw, raw_bytes, tensor, text,
)  # fmt: skip
from valid import (
    BASE, BY_INPUT, CONV, CORES, DORA, EMBEDDING, FACTORED, FULL, GLORA, LINEAR, LOCON, LOHA, LOKR, NORM, OFT, OUTPUT, ROWS,
    SCALED, TUCKER, A, B, experts, foreign, repeated, replaced, sealed, tokens, typed, with_config,
)  # fmt: skip

Entry = tuple[str, bool, str, Change]
Q = f"{P}blk.q."


def config(**changes: Any) -> Change:
    return lambda case: folder(case, **changes)


def without_config(case: Case) -> None:
    case["files"] = {"adapter/README.md": b"no config here\n"}


def wrong_base(case: Case) -> None:
    sealed(case)
    content = bytearray(case["files"]["base/blk.q.weight.safetensors"])
    content[-1] ^= 1
    case["files"]["base/blk.q.weight.safetensors"] = bytes(content)


def shape(parts: dict[str, Any], name: str, part: str, value: tuple[str, list[int], bytes], **entry: Any) -> Change:
    return kind(name, {**parts, part: value}, **entry)


def offsets(name: str, move: int) -> Change:
    def change(header: dict[str, Any]) -> None:
        header[name]["data_offsets"] = [one + move for one in header[name]["data_offsets"]]

    return raw(change)


def field(name: str, value: Any) -> Change:
    return raw(lambda header: header[f"{Q}{A}"].update({name: value}))


def duplicate(content: bytes) -> bytes:
    # Spend the padding on nothing: the same name twice, by renaming lora_B to lora_A in the header.
    return content.replace(b"blk.q.lora_B.weight", b"blk.q.lora_A.weight")


def nest(case: Case) -> None:
    value: Any = 1
    for _ in range(32):
        value = [value]
    case["manifest"]["settings"] = {"a": value}


def bent(name: str, parts: dict[str, Any], part: str, shape_: list[int], **entry: Any) -> Change:
    """Make an adapter of a kind of 1.1 where one part has another shape."""
    count = 1
    for side in shape_:
        count *= side
    return new(kind(name, {**parts, part: tensor(shape_, [1.0] * count, parts[part][0])}, **entry))


def two_rows(**layout: Any) -> Change:
    return new(kind("tokens", ROWS, scaling=1, targets=[], layout=layout))


HASHED = ("base_model", "hash")
LAYOUT = {"experts": 2, "parameter": "down", "transposed": False}


def long_path(case: Case) -> None:
    path = "b" * 513
    case["tensors"] = {f"{P}{path}.{part}": value for part, value in LINEAR.items()}
    case["manifest"] |= {"modules": {path: module()}, "target_modules": [path]}


INVALID: dict[str, Entry] = {
    # 2 Layout
    "layout/folder-without-the-file": (
        "L-01", False, "the tensors have another name", both(folder, lambda c: c.update(name="adapter.safetensors"))),
    "layout/format-missing": (
        "L-02", False, "metadata without format", raw(lambda h: h["__metadata__"].pop("format"))),
    "layout/manifest-missing": (
        "L-03", False, "a plain PEFT file: not sealed", raw(lambda h: h["__metadata__"].pop("loratools"))),
    "layout/config-missing": ("L-04", False, "a folder without the config", without_config),
    "layout/config-not-json": ("L-05", False, "the config is cut off", lambda c: c.update(config='{"peft_type":')),
    "layout/config-patterns-a-list": ("L-05", False, "rank_pattern is a list", config(rank_pattern=["q"])),
    "layout/config-of-another-method": ("L-05", False, "peft_type LOHA", config(peft_type="LOHA")),
    "layout/config-name-twice": (
        "L-05", False, "a duplicate name", lambda c: c.update(config='{"peft_type":"LORA","r":1,"r":1}')),
    "layout/config-other-rank": ("L-06", False, "r 2 where the manifest says 1", config(r=2, lora_alpha=4)),
    "layout/config-rank-pattern": ("L-06", False, "a pattern gives rank 3", config(rank_pattern={"^blk\\.q": 3})),
    "layout/config-other-scaling": ("L-07", False, "lora_alpha 3 gives scaling 3, not 2", config(lora_alpha=3)),
    "layout/config-rslora": (
        "L-07", False, "use_rslora makes it 2/sqrt(2)",
        both(kind("lora", {A: tensor([2, 1], [1, 2]), B: tensor([1, 2], [3, 4])}, rank=2, alpha=2, scaling=1),
             config(use_rslora=True))),
    "layout/config-other-targets": ("L-08", False, "target_modules differ", config(target_modules=["v"])),
    "layout/config-regex-targets": ("L-08", False, "a regular expression", config(target_modules=".*q")),
    "layout/config-replacement-not-saved": (
        "L-09", False, "modules_to_save is missing", both(replaced("head.bias", f"{P}head.bias"), folder)),
    "layout/config-dora-not-said": ("L-10", False, "use_dora is missing", both(kind("dora", LINEAR | DORA), folder)),
    "layout/config-bias-said": ("L-10", False, "lora_bias without a bias", config(lora_bias=True)),
    "layout/config-pissa": ("L-11", False, "PEFT would change the base", config(init_lora_weights="pissa")),
    "layout/config-qalora": ("L-11", False, "another meaning of A", config(use_qalora=True)),
    "layout/config-experts-not-targeted": (
        "L-12", False, "target_parameters is empty",
        both(experts(False, False), lambda c: c["config"].update(target_parameters=[]))),
    # 3 Manifest
    "manifest/not-json": ("M-01", False, "cut off", text(lambda t: t[:-1])),
    "manifest/not-an-object": ("M-01", True, "a list", text(lambda t: f"[{t}]")),
    "manifest/name-twice": ("M-01", False, "rank twice", text(lambda t: t.replace('"rank":1', '"rank":1,"rank":1', 1))),
    "manifest/not-a-number": ("M-01", False, "NaN", text(lambda t: t.replace('"alpha":2', '"alpha":NaN', 1))),
    "manifest/spaces": ("M-02", False, "a space after a colon", text(lambda t: t.replace(":", ": ", 1))),
    "manifest/not-sorted": (
        "M-02", False, "names in another order", text(lambda t: json.dumps(dict(reversed(json.loads(t).items())), separators=(",", ":")))),
    "manifest/float-written-long": ("M-02", False, "2.0 for 2", text(lambda t: t.replace('"alpha":2', '"alpha":2.0', 1))),
    "manifest/escaped-text": (
        "M-02", False, "an escape for é", both(put("settings", {"a": "é"}), text(lambda t: t.replace("é", "\\u00e9")))),
    "manifest/integer-too-large": (
        "M-02", False, "2^53", both(put("settings", {"a": 5}), text(lambda t: t.replace('"a":5', f'"a":{2**53}')))),
    "manifest/integer-beyond-every-digit": (
        "M-02", False, "1e21 in digits", both(put("settings", {"a": 5}), text(lambda t: t.replace('"a":5', f'"a":{10**21}')))),
    "manifest/version-missing": ("M-03", True, "no format_version", drop("format_version")),
    "manifest/version-not-two-numbers": ("M-03", True, "1", put("format_version", "1")),
    "manifest/version-a-number": ("M-03", True, "1.5, not a string", put("format_version", 1.5)),
    "manifest/rank-missing": ("M-04", True, "no rank", drop("rank")),
    "manifest/rank-of-no-module": ("M-04", False, "2 where all modules have 1", put("rank", 2)),
    "manifest/alpha-missing": ("M-05", True, "no alpha", drop("alpha")),
    "manifest/alpha-a-string": ("M-05", True, '"2"', put("alpha", "2")),
    "manifest/targets-a-string": ("M-06", True, "a regular expression", put("target_modules", "q")),
    "manifest/targets-twice": ("M-06", True, "q twice", put("target_modules", ["q", "q"])),
    "manifest/targets-not-sorted": ("M-06", False, "q before blk.q", put("target_modules", ["q", "blk.q"])),
    "manifest/target-unused": ("M-07", False, "v names no module", put("target_modules", ["q", "v"])),
    "manifest/module-without-target": ("M-08", False, "no target names blk.q", put("target_modules", [])),
    "manifest/target-is-part-of-a-segment": (
        "M-08", False, "PEFT matches whole segments",
        both(put("modules", "blk.xq", module()), lambda c: c["tensors"].update(
            {f"{P}blk.xq.{part}": value for part, value in LINEAR.items()}))),
    "manifest/modules-missing": ("M-09", True, "no modules", both(
        drop("modules"), put("target_modules", []), lambda c: c["tensors"].clear(), replaced("head.bias", f"{P}head.bias"))),
    "manifest/modules-empty": ("M-09", True, "nothing changes", both(
        put("modules", {}), put("target_modules", []), lambda c: c["tensors"].clear(), replaced("head.bias", f"{P}head.bias"))),
    "manifest/path-with-control-character": ("M-10", True, "a tab", replaced("head.b\tias", f"{P}head.b\tias")),
    "manifest/kind-missing": ("M-11", True, "no kind", drop("modules", "blk.q", "kind")),
    "manifest/kind-unknown": ("M-11", True, "a kind of tomorrow", put("modules", "blk.q", "kind", "loha")),
    "manifest/module-rank-zero": ("M-12", True, "0", put("modules", "blk.q", "rank", 0)),
    "manifest/module-rank-true": ("M-12", True, "true is not 1", put("modules", "blk.q", "rank", True)),
    "manifest/module-alpha-missing": ("M-13", True, "no alpha", drop("modules", "blk.q", "alpha")),
    "manifest/scaling-missing": ("M-14", True, "alpha / rank is not taken instead", drop("modules", "blk.q", "scaling")),
    "manifest/scaling-a-string": ("M-14", True, '"2"', put("modules", "blk.q", "scaling", "2")),
    "manifest/tensor-empty": ("M-15", True, "an empty name", put("modules", "blk.q", "tensor", "")),
    "manifest/replacement-tensor-null": ("M-15", True, "null", both(
        replaced("head.bias", f"{P}head.bias"), put("replacements", "head.bias", "tensor", None))),
    "manifest/base-a-string": ("M-16", True, "an id without an object", put("base_model", "org/base")),
    "manifest/revision-null": ("M-16", True, "null", put("base_model", "revision", None)),
    "manifest/base-id-a-path": ("M-17", True, "a folder of somebody's machine", put("base_model", "id", "/home/me/base")),
    "manifest/layout-missing": ("M-18", True, "experts need a layout", both(
        experts(False, False), drop("modules", "blk.q", "layout"))),
    "manifest/layout-without-experts": ("M-18", True, "no number of experts", both(
        experts(False, False), drop("modules", "blk.q", "layout", "experts"))),
    "manifest/layout-transposed-one": ("M-18", True, "1 is not true", put("modules", "blk.q", "layout", {"transposed": 1})),
    "manifest/layout-experts-of-a-linear-layer": (
        "M-18", True, "-1 of kind lora", put("modules", "blk.q", "layout", {"experts": -1})),
    "manifest/layout-parameter-of-a-linear-layer": (
        "M-18", True, "an empty string of kind lora", put("modules", "blk.q", "layout", {"parameter": ""})),
    "manifest/replacements-a-list": ("M-19", True, "a list", put("replacements", ["head.bias"])),
    "manifest/provenance-an-object": ("M-20", True, "not a list", put("provenance", {})),
    "manifest/step-without-tool": ("M-20", True, "no tool", put("provenance", [{"operation": "train"}])),
    "manifest/input-digest-short": ("M-21", True, "8 digits", put(
        "provenance", [{"operation": "combine", "tool": "t", "inputs": [{"digest": "blake3:00000000"}]}])),
    "manifest/input-weight-a-string": ("M-21", True, '"0.5"', put(
        "provenance", [{"operation": "combine", "tool": "t", "inputs": [{"weight": "0.5"}]}])),
    "manifest/seed-negative": ("M-22", True, "-1", put("provenance", [{"operation": "resize", "tool": "t", "seed": -1}])),
    "manifest/settings-a-list": ("M-23", True, "a list", put("settings", [])),
    # 4 Tensors
    "tensors/name-without-prefix": ("T-01", False, "a diffusers name", both(
        lose(f"blk.q.{B}"), add(f"blk.q.{B}", LINEAR[B]), drop("modules", "blk.q"),
        lambda c: c["manifest"]["modules"].update({"blk.v": module()}), put("target_modules", ["v"]),
        lambda c: c["tensors"].pop(f"{Q}{A}"), add(f"{P}blk.v.{A}", LINEAR[A]), add(f"{P}blk.v.{B}", LINEAR[B]))),
    "tensors/B-missing": ("T-02", False, "A alone", lose(f"blk.q.{B}")),
    "tensors/part-of-another-kind": ("T-02", False, "a magnitude vector on kind lora", add(
        f"{Q}lora_magnitude_vector", tensor([2], [1, 1]))),
    "tensors/adapter-name-left-in": ("T-02", False, "lora_A.default.weight", add(
        f"{Q}lora_A.default.weight", LINEAR[A])),
    "tensors/module-not-in-manifest": ("T-03", False, "blk.v has tensors", both(
        add(f"{P}blk.v.{A}", LINEAR[A]), add(f"{P}blk.v.{B}", LINEAR[B]))),
    "tensors/replacement-not-in-manifest": ("T-03", False, "head.bias", add(f"{P}head.bias", tensor([1], [1]))),
    "tensors/replacement-missing": ("T-04", False, "promised, not there", put("replacements", "head.bias", {})),
    "tensors/replacement-without-base-layer": ("T-04", False, "blk.q is a module with an update", both(
        put("replacements", "blk.q.bias", {}))),
    "tensors/integers": ("T-05", False, "A as I32", add(f"{Q}{A}", tensor([1, 3], [1, 2, 3], "I32"))),
    "tensors/rank-of-A": ("T-06", False, "A has rank 2, B and the manifest 1", add(f"{Q}{A}", tensor([2, 1], [1, 2]))),
    "tensors/rank-of-B": ("T-06", False, "B has rank 2", add(f"{Q}{B}", tensor([1, 2], [1, 2]))),
    "tensors/A-of-one-dimension": ("T-06", False, "a flattened A", add(f"{Q}{A}", tensor([3], [1, 2, 3]))),
    "tensors/A-turned": ("T-06", False, "(in, r), as MLX has it", add(f"{Q}{A}", tensor([3, 1], [1, 2, 3]))),
    "tensors/embedding-turned": ("T-07", False, "(V, r)", shape(
        EMBEDDING, "embedding", "lora_embedding_A", tensor([3, 1], [1, 2, 3]))),
    "tensors/conv-kernel-in-B": ("T-08", False, "B must be 1 by 1", shape(
        CONV, "conv", B, tensor([2, 1, 1, 2], [1, 2, 3, 4]))),
    "tensors/conv-of-two-dimensions": ("T-08", False, "that is kind lora", kind("conv", LINEAR)),
    "tensors/magnitude-for-inputs": ("T-09", False, "one for each input, as LyCORIS may have it", shape(
        LINEAR, "dora", "lora_magnitude_vector", tensor([3], [1, 1, 1]))),
    "tensors/experts-rank": ("T-10", False, "3 rows for 2 experts", shape(
        LINEAR, "experts", A, tensor([3, 1], [1, 2, 3]), layout=LAYOUT, targets=[])),
    "tensors/bias-for-inputs": ("T-11", False, "3 numbers for 2 outputs", add(f"{Q}lora_B.bias", tensor([3], [1, 2, 3]))),
    "tensors/empty": ("T-12", False, "an ungathered save", both(
        put("replacements", "head.bias", {}), add(f"{P}head.bias", tensor([0], [])))),
    # 5 Integrity
    "integrity/digest-missing": ("I-01", True, "no digest", lambda c: c.update(
        text=lambda t: json.dumps({k: v for k, v in json.loads(t).items() if k != "digest"}, separators=(",", ":")))),
    "integrity/digest-of-unknown-algorithm": ("I-01", True, "md5", put("digest", "md5:" + "0" * 32)),
    "integrity/digest-upper-case": ("I-01", True, "upper-case hex", put("digest", "blake3:" + "A" * 64)),
    "integrity/digest-of-other-tensors": ("I-02", False, "zeros", put("digest", ZERO)),
    "integrity/one-bit-flipped": ("I-02", False, "the last byte", raw_bytes(lambda b: b[:-1] + bytes([b[-1] ^ 1]))),
    "integrity/base-hash-a-string": ("I-06", True, "a digest alone", put(*HASHED, ZERO)),
    "integrity/base-root-malformed": ("I-06", True, "too short", put(*HASHED, "root", "blake3:12")),
    "integrity/base-tensor-malformed": ("I-06", True, "no algorithm", put(*HASHED, "tensors", {"w": "0" * 64})),
    "integrity/logical-malformed": ("I-14", True, "too short", put(*HASHED, "logical", "blake3:12")),
    "integrity/weights-a-string": ("I-14", True, "a digest alone", put(*HASHED, "weights", ZERO)),
    "integrity/weight-malformed": ("I-14", True, "no algorithm", put(*HASHED, "weights", {"w": "0" * 64})),
    "integrity/algorithms-mixed": ("I-07", False, "blake3 and sha256", put(
        *HASHED, {"root": ZERO, "schema": "sha256:" + "0" * 64})),
    "integrity/touched-tensor-without-digest": ("I-08", False, "tensors has another name", both(
        put("modules", "blk.q", "tensor", "blk.q.weight"), put(*HASHED, "tensors", {"blk.v.weight": ZERO}))),
    "integrity/wrong-base": ("I-10", False, "one bit of the touched tensor differs", wrong_base),
    # 6 Extensions
    "extensions/an-object": ("X-01", True, "not a list", put("extensions", {})),
    "extensions/name-missing": ("X-01", True, "no name", put("extensions", [{"must_understand": False}])),
    "extensions/must-understand-a-string": ("X-01", True, '"no"', put(
        "extensions", [{"name": "a", "must_understand": "no"}])),
    "extensions/name-malformed": ("X-02", True, "a space", put("extensions", [{"name": "a b", "must_understand": False}])),
    "extensions/twice": ("X-03", False, "the same name twice", put(
        "extensions", [{"name": "a", "must_understand": False}] * 2)),
    "extensions/must-be-understood": ("X-04", False, "unknown", put("extensions", [{"name": "a", "must_understand": True}])),
    "extensions/must-be-understood-by-default": ("X-04", False, "the default is true", put("extensions", [{"name": "a"}])),
    # 7 Security
    "security/header-longer-than-file": ("S-01", False, "a length of 2^63", raw_bytes(
        lambda b: (2**63).to_bytes(8, "little") + b[8:])),
    "security/header-longer-than-limit": ("S-01", False, "100 000 001", raw_bytes(
        lambda b: (100_000_001).to_bytes(8, "little") + b[8:])),
    "security/seven-bytes": ("S-01", False, "not even a length", raw_bytes(lambda b: b[:7])),
    "security/git-lfs-pointer": ("S-01", False, "a pointer, not the file", raw_bytes(
        lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 900\n")),
    "security/header-not-json": ("S-02", False, "no brace", raw_bytes(lambda b: b[:8] + b"x" + b[9:])),
    "security/header-not-utf-8": ("S-02", False, "a stray byte", raw_bytes(lambda b: b.replace(b"blk", b"b\xffk"))),
    "security/tensor-twice": ("S-02", False, "the library keeps the last", raw_bytes(duplicate)),
    "security/entry-with-another-field": ("S-03", False, "a stride", field("stride", 1)),
    "security/dtype-unknown": ("S-03", False, "F128", field("dtype", "F128")),
    "security/shape-negative": ("S-03", False, "-1", field("shape", [-1, -3])),
    "security/shape-a-float": ("S-03", False, "3.0", field("shape", [1, 3.0])),
    "security/hole": ("S-04", False, "four bytes before B", both(
        offsets(f"{Q}{B}", 4), raw_bytes(lambda b: b + b"\0\0\0\0"))),
    "security/overlap": ("S-04", False, "B begins inside A", offsets(f"{Q}{B}", -4)),
    "security/trailing-bytes": ("S-04", False, "one byte more", raw_bytes(lambda b: b + b"\0")),
    "security/truncated": ("S-04", False, "one byte less", raw_bytes(lambda b: b[:-1])),
    "security/shape-larger-than-data": ("S-05", False, "2 by 3 in 12 bytes", field("shape", [2, 3])),
    "security/metadata-a-number": ("S-06", False, "1", raw(lambda h: h["__metadata__"].update(format=1))),
    "security/name-of-513-bytes": ("S-07", True, "too long", long_path),
    "security/nested-too-deeply": ("S-08", False, "34 levels", nest),
    # What came with 1.1
    "layout/config-for-peft-of-a-kind-it-lacks": ("L-14", False, "PEFT would load nothing of it", both(
        new(kind("loha", LOHA)), folder)),
    "layout/config-without-repeated-layers": ("L-15", False, "PEFT would not repeat them", both(new(repeated), folder)),
    "layout/config-with-repeated-layers": ("L-15", False, "PEFT would repeat them", both(
        new(lambda case: None), config(layer_replication=[[0, 1]]))),
    "layout/config-without-rows": ("L-16", False, "PEFT would not replace them", both(two_rows(rows=[2, 0]), folder)),
    "layout/config-of-other-rows": ("L-16", False, "0 and 2, not 2 and 0", both(
        two_rows(rows=[2, 0]), config(trainable_token_indices={"blk.q": [0, 2]}))),
    "manifest/kind-of-a-later-version": ("M-11", True, "locon in a file of 1.0", kind("locon", LOCON)),
    "manifest/model-type-a-number": ("M-26", True, "2", new(put("base_model", "model_type", 2))),
    "manifest/tokens-without-rows": ("M-27", True, "nothing says which", two_rows()),
    "manifest/tokens-row-twice": ("M-27", True, "2 and 2", two_rows(rows=[2, 2])),
    "manifest/oft-without-constraint": ("M-27", True, "no constraint", new(kind("oft", OFT, rank=2, scaling=1))),
    "manifest/scaling-of-a-difference": ("M-28", True, "nothing is scaled", new(kind("norm", NORM, scaling=2))),
    "manifest/scaling-of-a-rotation": ("M-28", True, "nothing is scaled", new(
        kind("oft", OFT, rank=2, scaling=2, layout={"constraint": 4}))),
    "manifest/scaling-of-whole-lokr": ("M-28", False, "neither is factored", new(kind("lokr", LOKR, scaling=2))),
    "tensors/part-of-its-own-name-beside-another-kind": ("T-03", False, "diff beside lora", both(
        new(lambda case: None), add(f"{Q}diff", FULL["diff"]))),
    "tensors/loha-with-one-core": ("T-02", False, "hada_t2 is missing", new(
        kind("loha", {part: value for part, value in CORES.items() if part != "hada_t2"}))),
    "tensors/locon-core": ("T-24", False, "the core has another rank", bent("locon", LOCON, "lora_mid.weight", [2, 3, 1, 2])),
    "tensors/loha-rank": ("T-26", False, "the manifest says rank 2", new(kind("loha", LOHA, rank=2))),
    "tensors/loha-sides": ("T-26", False, "w1 and w2 differ", bent("loha", LOHA, "hada_w2_b", [2, 4])),
    "tensors/loha-cores": ("T-26", False, "other kernels", bent("loha", CORES, "hada_t2", [1, 1, 3])),
    "tensors/lokr-factors": ("T-28", False, "no common rank", bent("lokr", FACTORED, "lokr_w1_b", [2, 2])),
    "tensors/lokr-core": ("T-28", False, "the core has another rank", bent("lokr", TUCKER, "lokr_t2", [2, 1, 2])),
    "tensors/glora-inputs": ("T-30", False, "a1 for two inputs", bent("glora", GLORA, "a1.weight", [2, 1])),
    "tensors/oft-not-square": ("T-32", False, "a block of 2 by 3", bent(
        "oft", OFT, "oft_blocks", [1, 2, 3], rank=2, scaling=1, layout={"constraint": 4})),
    "tensors/ia3-two-flags": ("T-34", False, "two numbers for on_input", bent("ia3", OUTPUT, "on_input", [2], scaling=1)),
    "tensors/full-bias": ("T-36", False, "three numbers for two features", bent("full", FULL, "diff_b", [3], scaling=1)),
    "tensors/norm-bias": ("T-38", False, "two numbers for three features", new(
        kind("norm", {**NORM, "b_norm": tensor([2], [1, 2])}, scaling=1))),
    "tensors/wdora-features": ("T-40", False, "three magnitudes for two features", bent("wdora", SCALED, "dora_scale", [3, 1])),
    "tensors/wdora-inputs": ("T-40", False, "two magnitudes for three inputs", bent("wdora", BY_INPUT, "dora_scale", [1, 2])),
    "tensors/tokens-rows": ("T-42", False, "three indices for two rows", two_rows(rows=[2, 0, 1])),
    "integrity/meaning-taken-away": ("I-11", True, "the version promises it", both(
        new(lambda case: None), drop("meaning"), put("modules", "blk.q", "scaling", 1))),
    "integrity/meaning-malformed": ("I-11", True, "no algorithm", both(new(lambda case: None), put("meaning", "0" * 64))),
    "integrity/scaling-edited": ("I-12", False, "1 where 2 was sealed", both(
        new(lambda case: None), put("modules", "blk.q", "scaling", 1))),
    "integrity/alpha-edited": ("I-12", False, "1 where 2 was sealed", both(
        new(lambda case: None), put("modules", "blk.q", "alpha", 1), put("alpha", 1))),
    "integrity/orientation-edited": ("I-12", False, "(out, in) where (in, out) was sealed", both(
        new(typed), put("modules", "blk.q", "layout", "transposed", False))),
    "integrity/target-edited": ("I-12", False, "another base tensor", both(
        new(put("modules", "blk.q", "tensor", "blk.q.weight")), put("modules", "blk.q", "tensor", "blk.k.weight"))),
    "integrity/layers-edited": ("I-12", False, "another order of layers", both(
        new(repeated), put("extensions", 0, "configuration", "layers", [[0, 1], [0, 1], [0, 1]]))),
    "integrity/base-of-another-type": ("I-13", False, "config.json was edited", both(
        new(typed), lambda case: with_config(case, "llama"))),
    "extensions/layers-without-an-end": ("X-06", True, "one number", both(
        lambda case: repeated(case), put("extensions", 0, "configuration", "layers", [[0]]), new(lambda case: None))),
    "extensions/layers-optional": ("X-06", True, "a reader could go on without them", both(
        lambda case: repeated(case), put("extensions", 0, "must_understand", False), new(lambda case: None))),
    # 8 Versioning
    "versioning/higher-major": ("V-01", True, "2.0", put("format_version", "2.0")),
}  # fmt: skip

__all__ = ["BASE", "CONFIG", "INVALID"]
