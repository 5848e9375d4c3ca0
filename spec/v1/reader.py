"""A complete reader of format 1.x, standard library only: the specification, executable.

    python reader.py ADAPTER                 print {module: {rank, scaling, delta_weight}} as canonical JSON, exit 0
    python reader.py ADAPTER --base BASE     also compare BASE with the base hash (clause I-10)
    python reader.py --hash CHECKPOINT       print the three tiers of a base hash, with each algorithm

What breaks a clause prints `[clause] reason` and exits 1. It shares no code with the loratools package: where the two
disagree, one of them is wrong. Beside it, `container.py` holds safetensors, canonical JSON and BLAKE3, `kinds.py` the
kinds with their shapes, and `updates.py` their formulas.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from container import (
    HASHES,
    Refused,
    Tensors,
    canonical,
    checkpoint,
    depth,
    digest,
    load,
    meaning,
    natural,
    need,
    number,
    parse,
    text,
    tiers,
)  # fmt: skip
from kinds import BIAS, FLAG, KINDS, MAGNITUDE, ON_WEIGHT, PEFT, SCALE, UNTARGETED, fits, ones
from updates import Parts, changed, delta_weight, numbers

PREFIX = "base_model.model."
ZERO = f"blake3:{'0' * 64}"

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,), "arrow_config": (None,), "exclude_modules": (None, [], ""),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga"), "kasa_config": (None,),
    "layers_to_transform": (None, []), "use_bdlora": (None, False), "use_qalora": (None, False),
}  # fmt: skip


# ---- the manifest: chapters 3, 5, 6, 8 ----------------------------------------------------------------------------


def check_manifest(source: str) -> dict[str, Any]:
    try:
        m = parse(source)
        need(isinstance(m, dict), "M-01", "the manifest is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise Refused(f"[M-01] {error}") from None
    need(depth(m) <= 32, "S-08", "the manifest is nested too deeply")
    version = m.get("format_version")
    formed = isinstance(version, str) and re.fullmatch(r"[1-9][0-9]{0,8}\.(0|[1-9][0-9]{0,8})", version)
    need(formed, "M-03", "format_version is not MAJOR.MINOR")
    need(str(version).startswith("1."), "V-01", f"this reader knows version 1.x, not {version}")
    check_extensions(m.get("extensions", []))
    since = tuple(map(int, str(version).split(".")))
    modules, replaced, targets = m.get("modules"), m.get("replacements", {}), m.get("target_modules")
    need(objects(modules) and modules, "M-09", "modules is not an object of objects, or empty")
    need(objects(replaced), "M-19", "replacements is not an object of objects")
    assert isinstance(modules, dict)
    for path, entry in [*modules.items(), *replaced.items()]:
        need(re.fullmatch(r"[^.\x00-\x1f\x7f]+(\.[^.\x00-\x1f\x7f]+)*", path), "M-10", f"{path!r} is not a path")
        need(text(entry.get("tensor", path)), "M-15", f"{path}: tensor")
        need(len(path.encode()) <= 512 and len(entry.get("tensor", "").encode()) <= 512, "S-07", "a name is too long")
    for path, entry in modules.items():
        check_module(path, entry, since)
    for name, good, clause in (("rank", natural(m.get("rank"), 1), "M-04"), ("alpha", number(m.get("alpha")), "M-05")):
        counts = Counter(entry[name] for entry in modules.values())
        usual = min(counts, key=lambda value: (-counts[value], value))
        need(good and m[name] == usual, clause, f"{name} is not that of most modules")
    good = isinstance(targets, list) and all(map(text, targets)) and targets == sorted(set(targets))
    need(good, "M-06", "target_modules is not a sorted list of different names")
    ours = [f".{path}" for path, entry in modules.items() if entry["kind"] not in UNTARGETED]
    need(all(any(p.endswith(f".{t}") for p in ours) for t in targets or []), "M-07", "a target matches no module")
    need(all(any(p.endswith(f".{t}") for t in targets or []) for p in ours), "M-08", "a module has no target")
    check_base(m.get("base_model", {}), [e["tensor"] for e in [*modules.values(), *replaced.values()] if "tensor" in e])
    check_provenance(m.get("provenance", []))
    need(isinstance(m.get("settings", {}), dict), "M-23", "settings is not an object")
    need(digest(m.get("digest")), "I-01", "digest is not a digest")
    need(digest(m.get("meaning", "" if version == "1.1" else ZERO)), "I-11", "meaning is not a digest, or missing")
    need(canonical(m) == source, "M-02", "the manifest is not in canonical form")
    return dict(m)


def check_module(path: str, entry: dict[str, Any], version: tuple[int, ...]) -> None:
    kind, layout = entry.get("kind"), entry.get("layout", {})
    since = KINDS[kind][3] if text(kind) and kind in KINDS else "9.0"
    need(tuple(map(int, since.split("."))) <= version, "M-11", f"{path}: kind {kind!r} is not registered")
    need(natural(entry.get("rank"), 1), "M-12", f"{path}: rank {entry.get('rank')!r}")
    need(number(entry.get("alpha")), "M-13", f"{path}: alpha {entry.get('alpha')!r}")
    need(number(entry.get("scaling")), "M-14", f"{path}: scaling {entry.get('scaling')!r}")
    need(isinstance(layout, dict), "M-18", f"{path}: layout is not an object")
    stacked = kind == "experts"
    need(isinstance(layout.get("transposed", None if stacked else False), bool), "M-18", f"{path}: layout.transposed")
    need(natural(layout.get("experts", 0 if stacked else 1), 1), "M-18", f"{path}: layout.experts")
    need(text(layout.get("parameter", "" if stacked else path)), "M-18", f"{path}: layout.parameter")
    rows = layout.get("rows")
    listed = isinstance(rows, list) and all(map(natural, rows)) and len(rows) == len(set(rows)) > 0
    need(kind != "tokens" or listed, "M-27", f"{path}: layout.rows")
    need(kind != "oft" or number(layout.get("constraint")), "M-27", f"{path}: layout.constraint")


def objects(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(entry, dict) for entry in value.values())


def check_base(base: Any, touched: list[str]) -> None:
    need(isinstance(base, dict) and all(text(base.get(name, "-")) for name in ("id", "revision")), "M-16", "base_model")
    need(not re.match(r"[./\\~]|[A-Za-z]:[/\\]|file:", base.get("id", "")), "M-17", "base_model.id is a path")
    need(text(base.get("model_type", "-")), "M-26", "base_model.model_type")
    tier = base.get("hash", {})
    need(isinstance(tier, dict) and isinstance(tier.get("tensors", {}), dict), "I-06", "base_model.hash")
    stated = [*tier.get("tensors", {}).values(), *(tier[name] for name in ("schema", "root") if name in tier)]
    need(all(map(digest, stated)), "I-06", "a tier of base_model.hash is not a digest")
    need(isinstance(tier.get("weights", {}), dict), "I-14", "base_model.hash.weights")
    numbers = [*tier.get("weights", {}).values(), *(tier[name] for name in ("logical",) if name in tier)]
    need(all(map(digest, numbers)), "I-14", "base_model.hash.logical or weights is not a digest")
    stated += numbers
    need(len({one.partition(":")[0] for one in stated}) <= 1, "I-07", "base_model.hash mixes algorithms")
    need("tensors" not in tier or set(touched) <= tier["tensors"].keys(), "I-08", "a touched tensor has no digest")


def check_provenance(steps: Any) -> None:
    need(isinstance(steps, list), "M-20", "provenance is not a list")
    for step in steps:
        formed = isinstance(step, dict) and text(step.get("operation")) and text(step.get("tool"))
        need(formed and isinstance(step.get("parameters", {}), dict), "M-20", "a step lacks its operation or tool")
        inputs = step.get("inputs", [])
        for one in inputs if isinstance(inputs, list) else [None]:
            formed = isinstance(one, dict) and number(one.get("weight", 1)) and digest(one.get("digest", ZERO))
            need(formed, "M-21", "inputs is not a list of objects with digest and weight")
        need("seed" not in step or natural(step["seed"]), "M-22", "seed")


def check_extensions(found: Any) -> None:
    need(isinstance(found, list), "X-01", "extensions is not a list")
    for one in found:
        need(isinstance(one, dict) and isinstance(one.get("name"), str), "X-01", "an extension has no name")
        formed = isinstance(one.get("must_understand", True), bool) and isinstance(one.get("configuration", {}), dict)
        need(formed, "X-01", f"extension {one['name']}")
        need(len(one["name"]) <= 64 and re.fullmatch(r"[a-z0-9]+([._-][a-z0-9]+)*", one["name"]), "X-02", "a bad name")
        need([other["name"] for other in found].count(one["name"]) == 1, "X-03", f"{one['name']} occurs twice")
        if one["name"] == "layer_replication":
            layers, must = one.get("configuration", {}).get("layers"), one.get("must_understand", True)
            pairs = layers if isinstance(layers, list) and all(isinstance(part, list) for part in layers) else []
            good = all(len(part) == 2 and all(map(natural, part)) and part[0] < part[1] for part in pairs)
            need(pairs and good and must, "X-06", f"layer_replication: {layers!r}")
            continue
        need(not one.get("must_understand", True), "X-04", f"extension {one['name']} must be understood, and is not")


# ---- tensors: chapter 4 -------------------------------------------------------------------------------------------


def check_tensors(m: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Parts], dict[str, str]]:
    """Return the parts of each module, and the tensor name of each replacement; every tensor is one or the other."""
    names = {}
    for path in m.get("replacements", {}):
        module, _, parameter = path.rpartition(".")
        names[path] = PREFIX + (f"{module}.base_layer.{parameter}" if module in m["modules"] else path)
        need(names[path] in tensors, "T-04", f"there is no tensor {names[path]}")
    parts: dict[str, Parts] = {path: {} for path in m["modules"]}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.([^.]+(?:\.[^.]+)*?)(?:\.((?:lora_|token_adapter\.).+))?", name)
        need(match and ".." not in name and not name.endswith("."), "T-01", f"{name!r} is not a name of this format")
        need(len(name.encode()) <= 512, "S-07", "a tensor's name is too long")
        need(0 not in tensor[1], "T-12", f"{name} is empty")
        if name in names.values():
            continue
        assert match
        module, part = (match[1], match[2]) if match[2] else longer(name.removeprefix(PREFIX), m["modules"])
        need(part and module in parts, "T-03", f"the manifest does not account for {name}")
        parts[module][part] = tensor
        need(part == FLAG or tensor[0] in ("BF16", "F16", "F32", "F64"), "T-05", f"{name} is {tensor[0]}")
    for path, entry in m["modules"].items():
        clause, required, optional, _ = KINDS[entry["kind"]]
        have = parts[path].keys()
        good = any(one <= have <= one | optional for one in required)
        need(good, "T-02", f"{path} has {', '.join(have) or 'no parts'}")
        shapes = {part: tensor[1] for part, tensor in parts[path].items()}
        for field in ones(entry["kind"], shapes):
            need(entry[field] == 1, "M-28", f"{path}: {field} of kind {entry['kind']} is 1")
        need(fits(entry, shapes), clause, f"{path}: shapes {shapes} do not fit rank {entry['rank']}")
        need(BIAS not in shapes or shapes[BIAS] == shapes["lora_B.weight"][:1], "T-11", f"{path}: {BIAS}")
    check_meaning(m, parts)
    return parts, names


def longer(name: str, modules: dict[str, Any]) -> tuple[str, str]:
    """Return (module, part) of a name whose part is one of the module's kind, and does not begin as PEFT's do."""
    segments = name.split(".")
    for count in (2, 1):
        module, part = ".".join(segments[:-count]), ".".join(segments[-count:])
        _, required, optional, _ = KINDS[modules[module]["kind"]] if module in modules else ("", [], set(), "")
        if part in set().union(optional, *required):
            return module, part
    return name, ""


def check_meaning(m: dict[str, Any], parts: dict[str, Parts]) -> None:
    if "meaning" in m:
        computed = meaning(m, parts, m["meaning"].partition(":")[0])
        need(m["meaning"] == computed, "I-12", "modules or replacements are not those that were sealed")


# ---- the folder: chapter 2 ----------------------------------------------------------------------------------------


def check_config(path: Path, m: dict[str, Any], parts: dict[str, Parts]) -> None:
    need(path.is_file(), "L-04", f"there is no {path.name}")
    try:
        config = parse(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Refused(f"[L-05] {error}") from None
    if any(entry["kind"] not in PEFT for entry in m["modules"].values()):
        known = isinstance(config, dict) and config.get("peft_type") == "LORATOOLS"
        need(known, "L-14", "the config of kinds that PEFT does not have")
        return
    need(isinstance(config, dict) and config.get("peft_type") == "LORA", "L-05", "not the config of a LoRA")
    check_types(config)
    targets = config.get("target_modules")
    same = isinstance(targets, list) and sorted(map(str, targets)) == m["target_modules"]
    need(same, "L-08", "target_modules differ")
    lora = {path: entry for path, entry in m["modules"].items() if entry["kind"] != "tokens"}
    for path_, entry in lora.items():
        stem, name = re.sub(r"(\.base_layer)+$", "", path_), path_
        if entry["kind"] == "experts":
            name = f"{stem}.{entry['layout']['parameter']}"
            listed = config.get("target_parameters") or []
            need(any(f".{name}".endswith(f".{one}") for one in listed), "L-12", f"target_parameters lacks {name}")
        rank, alpha = pattern(config, "rank", name, "r"), pattern(config, "alpha", name, "lora_alpha")
        need(rank == entry["rank"], "L-06", f"{path_}: rank {rank}, the manifest says {entry['rank']}")
        scaling = math.nan
        if number(alpha) and abs(alpha) < 2**1000:
            scaling = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        close = math.isclose(scaling, entry["scaling"], rel_tol=1e-6)
        need(close, "L-07", f"{path_}: scaling {scaling}, the manifest says {entry['scaling']}")
    saved, biases = config.get("modules_to_save") or [], config.get("bias", "none") != "none"
    for parameter in m.get("replacements", {}):
        module = parameter.rpartition(".")[0]
        covered = module in parts or (biases and parameter.endswith(".bias"))
        need(covered or any(f".{one}." in f".{module}." for one in saved), "L-09", f"modules_to_save lacks {module}")
    for field, part in (("use_dora", MAGNITUDE), ("lora_bias", BIAS)):
        need(bool(config.get(field)) == any(part in have for have in parts.values()), "L-10", field)
    if "meaning" in m:
        layers = [e["configuration"]["layers"] for e in m.get("extensions", []) if e["name"] == "layer_replication"]
        need([config.get("layer_replication") or None] == (layers or [None]), "L-15", "layer_replication")
        rows = {path: entry["layout"]["rows"] for path, entry in m["modules"].items() if entry["kind"] == "tokens"}
        need((config.get("trainable_token_indices") or {}) == rows, "L-16", "trainable_token_indices")
    for field, allowed in NEUTRAL.items():
        value = config.get(field, allowed[0])
        need(any(type(value) is type(one) and value == one for one in allowed), "L-11", f"{field}: {value!r}")


def check_types(config: dict[str, Any]) -> None:
    need(natural(config.get("r", 8), 1) and number(config.get("lora_alpha", 8)), "L-05", "r or lora_alpha")
    need(isinstance(config.get("bias", "none"), str), "L-05", "bias is not a string")
    for name in ("rank_pattern", "alpha_pattern"):
        need(config.get(name) is None or isinstance(config[name], dict), "L-05", f"{name} is not an object")
    for name in ("modules_to_save", "target_parameters"):
        found = config.get(name)
        need(found is None or (isinstance(found, list) and all(isinstance(one, str) for one in found)), "L-05", name)
    for name in ("use_rslora", "use_dora", "lora_bias"):
        need(config.get(name) is None or isinstance(config[name], bool), "L-05", f"{name} is not a boolean")


def pattern(config: dict[str, Any], which: str, name: str, default: str) -> Any:
    for key, value in (config.get(f"{which}_pattern") or {}).items():
        if key == f"^{re.escape(name)}" or f".{name}".endswith(f".{key}"):
            return value
    return config.get(default, 8)


# ---- the whole ----------------------------------------------------------------------------------------------------


def read(path: Path, base: Path | None = None) -> dict[str, Any]:
    """Return {module: {rank, scaling, delta_weight}}, and {parameter: {replacement}}; raise `Refused`."""
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    need(file.is_file(), "L-01", f"there is no {file}")
    tensors, metadata = load(file)
    need("loratools" in metadata, "L-03", "no loratools manifest")
    need(metadata.get("format") == "pt", "L-02", "the metadata do not say format: pt")
    m = check_manifest(metadata["loratools"])
    parts, names = check_tensors(m, tensors)
    if path.is_dir():
        check_config(path / "adapter_config.json", m, parts)
    own = tiers(tensors, m["digest"].partition(":")[0])["root"]
    need(own == m["digest"], "I-02", f"the tensors have the digest {own}, the manifest says {m['digest']}")
    stated = m.get("base_model", {}).get("hash", {})
    if base and stated:
        algorithm = next(name for name in HASHES if name in str(stated))
        found = tiers(checkpoint(base), algorithm)
        for name, value in stated.get("tensors", {}).items():
            need(found["tensors"].get(name) == value, "I-10", f"the base's {name} is not what the adapter was made for")
        for tier in ("schema", "root"):
            need(stated.get(tier, found[tier]) == found[tier], "I-10", f"the base has another {tier}")
    stored = checkpoint(base) if base else {}
    if base and base.is_dir() and (base / "config.json").is_file():
        theirs, ours = parse((base / "config.json").read_bytes()).get("model_type"), m.get("base_model", {})
        need(ours.get("model_type", theirs) == theirs, "I-13", f"the base has the model_type {theirs}")
    result: dict[str, Any] = {path: {"replacement": numbers(tensors[name])} for path, name in names.items()}
    for module, entry in m["modules"].items():
        have = parts[module]
        delta = delta_weight(entry, have)
        result[module] = {"rank": entry["rank"], "scaling": entry["scaling"]}
        result[module] |= {"delta_weight": delta} if delta is not None else {}
        result[module] |= {"bias": [entry["scaling"] * b for b in numbers(have[BIAS])]} if BIAS in have else {}
        for name in have.keys() & {MAGNITUDE, SCALE}:
            result[module]["magnitude"] = numbers(have[name])
        for name in have.keys() & {"diff_b", "b_norm"}:
            result[module]["bias"] = numbers(have[name])
        if entry["kind"] in ON_WEIGHT and entry.get("tensor") in stored:
            result[module]["changed"] = changed(entry, have, stored[entry["tensor"]])
    return result


def main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["--hash"]:
            print(canonical({name: tiers(checkpoint(Path(arguments[1])), name) for name in HASHES}))
        else:
            base = Path(arguments[2]) if arguments[1:2] == ["--base"] else None
            print(canonical(read(Path(arguments[0]), base), 1e21))
    except Refused as refused:
        print(refused)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
