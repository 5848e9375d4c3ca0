"""Write every test vector of version 1: `python make.py [FOLDER]`. The bytes never change; a test asserts it.

A case starts from a sound adapter of a few numbers; an invalid one then gets exactly one fault, after which it is named.
"""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from container import HASHES, canonical, meaning, tiers  # noqa: E402

P = "base_model.model."
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CODES = {"F16": "e", "F32": "f", "F64": "d", "I32": "i", "I64": "q", "U8": "B"}
ZERO, ONES = "blake3:" + "0" * 64, "blake3:" + "1" * 64
Case = dict[str, Any]
Change = Callable[[Case], object]


def data(dtype: str, values: list[float]) -> bytes:
    if dtype == "BF16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    kinds = [int(value) for value in values] if dtype in ("I32", "I64", "U8") else values
    return struct.pack(f"<{len(values)}{CODES[dtype]}", *kinds)


def tensor(shape: list[int], values: list[float], dtype: str = "F32") -> tuple[str, list[int], bytes]:
    return dtype, shape, data(dtype, values)


def module(rank: int = 1, alpha: float = 2, scaling: float = 2, kind: str = "lora", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "rank": rank, "alpha": alpha, "scaling": scaling, **more}


def sound() -> Case:
    """Return a sound adapter of one linear layer: A (1, 3), B (2, 1), s = 2."""
    tensors = {f"{P}blk.q.lora_A.weight": tensor([1, 3], [1, 0.5, -2]), f"{P}blk.q.lora_B.weight": tensor([2, 1], [1, 3])}
    manifest = {"format_version": "1.0", "rank": 1, "alpha": 2, "target_modules": ["q"], "modules": {"blk.q": module()}}
    return {"tensors": tensors, "manifest": manifest, "files": {}}


def folder(case: Case, **changes: Any) -> None:
    """Make a case a folder with PEFT's config."""
    m = case["manifest"]
    case["config"] = {
        "base_model_name_or_path": "org/base", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": m["alpha"], "peft_type": "LORA", "r": m["rank"],
        "target_modules": m["target_modules"], "task_type": None, **changes,
    }  # fmt: skip


def kind(name: str, parts: dict[str, tuple[str, list[int], bytes]], **entry: Any) -> Change:
    """Replace the one module by one of another kind."""
    targets = entry.pop("targets", ["q"])

    def change(case: Case) -> None:
        case["manifest"]["target_modules"] = targets
        case["tensors"] = {f"{P}blk.q.{part}": value for part, value in parts.items()}
        case["manifest"]["modules"]["blk.q"] = module(kind=name, **entry)
        case["manifest"]["rank"] = entry.get("rank", 1)

    return change


def put(*path: Any) -> Change:
    """Set a field of the manifest: `put("modules", "blk.q", "rank", 0)`."""

    def change(case: Case) -> None:
        target = case["manifest"]
        for name in path[:-2]:
            target = target.setdefault(name, {}) if isinstance(target, dict) else target[name]
        target[path[-2]] = path[-1]

    return change


def drop(*path: Any) -> Change:
    """Remove a field of the manifest."""

    def change(case: Case) -> None:
        target = case["manifest"]
        for name in path[:-1]:
            target = target[name]
        del target[path[-1]]

    return change


def add(name: str, value: tuple[str, list[int], bytes]) -> Change:
    return lambda case: case["tensors"].update({name: value})


def lose(name: str) -> Change:
    return lambda case: case["tensors"].pop(P + name)


def both(*changes: Change) -> Change:
    return lambda case: [change(case) for change in changes]


def new(*changes: Change) -> Change:
    """Mark a case as one of version 1.1, with the meaning of what these changes make; what follows may break it."""

    def change(case: Case) -> None:
        both(*changes)(case)
        m = case["manifest"]
        m["format_version"] = "1.1"
        parts = {path: [n.removeprefix(f"{P}{path}.") for n in case["tensors"] if n.startswith(f"{P}{path}.")] for path in m["modules"]}
        outer = [f"{path}.{part}" for path, names in parts.items() for part in names]
        inner = {path: [n for n in names if outer.count(f"{path}.{n}") == 1 and not n.startswith("base_layer.")] for path, names in parts.items()}
        m["meaning"] = meaning(m, inner, "blake3")

    return change


def raw(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header as JSON, after everything else."""
    return lambda case: case.update(header=change)


def raw_bytes(change: Callable[[bytes], bytes]) -> Change:
    """Change the bytes of the file, last of all."""
    return lambda case: case.update(bytes=change)


def text(change: Callable[[str], str]) -> Change:
    """Change the manifest as text."""
    return lambda case: case.update(text=change)


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str], case: Case) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    body = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    case.get("header", lambda _: None)(header)
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    whole: bytes = case.get("bytes", lambda all_: all_)(len(encoded).to_bytes(8, "little") + encoded + body)
    return whole


def write(case: Case, target: Path) -> None:
    """Write the adapter of a case under `target`: `adapter.safetensors`, or the folder `adapter`."""
    algorithm = case.get("algorithm", "blake3")
    case["manifest"].setdefault("digest", tiers(case["tensors"], algorithm)["root"])
    manifest = case.get("text", lambda same: same)(canonical(case["manifest"]))
    content = safetensors(case["tensors"], case.get("metadata", {"format": "pt", "loratools": manifest}), case)
    if "config" in case:
        config = case["config"] if isinstance(case["config"], str) else json.dumps(case["config"], indent=1, sort_keys=True)
        put_file(target / "adapter" / CONFIG, config.encode() + b"\n")
    inside = "config" in case or case["files"]
    put_file(target / "adapter" / case.get("name", FILE) if inside else target / "adapter.safetensors", content)
    for name, extra in case["files"].items():
        put_file(target / name, extra)


def put_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def put_json(path: Path, value: Any) -> None:
    put_file(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def main(target: Path) -> None:
    from hashes import HASH_CASES  # beside this file, as are the lists of cases
    from invalid import INVALID
    from valid import VALID

    for area in ("valid", "invalid", "hash"):
        shutil.rmtree(target / area, ignore_errors=True)
    for name, (clauses, change, expected) in VALID.items():
        case = sound()
        change(case)
        write(case, target / "valid" / name)
        put_json(target / "valid" / name / "expected.json", {"clauses": clauses, "modules": expected, "tolerance": 1e-6})
    for name, (clause, schema, comment, change) in INVALID.items():
        case = deepcopy(sound())
        change(case)
        write(case, target / "invalid" / name)
        put_json(target / "invalid" / name / "why.json", {"clause": clause, "comment": comment, "schema": schema})
    for name, (files, whole) in HASH_CASES.items():
        for file, content in files.items():
            put_file(target / "hash" / name / "checkpoint" / file, safetensors(content, {}, {}))
        shown = ["I-03", "I-04", "I-05"] + (["I-09"] if len(files) > 1 else [])
        put_json(target / "hash" / name / "expected.json", {one: tiers(whole, one) for one in HASHES} | {"clauses": shown})


if __name__ == "__main__":
    sys.modules["make"] = sys.modules["__main__"]
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
