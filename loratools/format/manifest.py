"""The manifest: JSON in a safetensors header that says what the tensors of an adapter mean (`spec/v1/3-manifest.md`).

Pure functions between an `Adapter` and a JSON object, and the canonical text of it (RFC 8785). No tensor is touched.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.adapter.naming.compact import suffixes
from loratools.format import keys
from loratools.storage import digest
from loratools.storage.lazy import LazyTensor

VERSION = "1.0"
METADATA_KEY = "loratools"
NO_DIGEST = f"{digest.DEFAULT}:{'0' * 64}"
"""Stands for the digest while the data are still being written: it has the same length."""

ORIGIN = "loratools"
"""Key of `Adapter.settings` under which the reader keeps the manifest as it was found, for a faithful rewrite."""

# What the manifest states in fields of its own, so that a copy in `settings` could only contradict it.
_STATED = frozenset(
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", ORIGIN}
)
_FIELDS = frozenset(
    {"format_version", "rank", "alpha", "target_modules", "modules", "replacements", "base_model", "digest"}
    | {"provenance", "settings"}
)
_MODULE = frozenset({"kind", "tensor", "rank", "alpha", "scaling", "layout"})
_REPLACEMENT = frozenset({"tensor"})
_BASE = frozenset({"id", "revision", "hash"})
_HASH = frozenset({"schema", "tensors", "root"})
_STEP = frozenset({"operation", "tool", "parameters", "inputs", "seed"})


def of(adapter: Adapter, tensors: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the manifest of an adapter, its `digest` still `NO_DIGEST`.

    `tensors` maps a module path or a replaced parameter's path to the name of the base tensor that it changes; what is
    not in it is taken from the manifest that the adapter was read from. That manifest's unknown fields, and its
    extensions, are kept (clauses V-04 and X-05).
    """
    origin: Mapping[str, Any] = adapter.settings.get(ORIGIN, {})
    base_names = base_tensors(adapter) | dict(tensors or {})
    old = origin.get("modules", {})
    modules = {}
    for path, update in sorted(adapter.updates.items()):
        entry: dict[str, Any] = {
            "kind": update.kind, "rank": update.rank, "alpha": update.alpha, "scaling": update.scaling,
        }  # fmt: skip
        layout = update.layout or old.get(path, {}).get("layout")
        entry |= {"layout": dict(layout)} if layout else {}
        entry |= {"tensor": base_names[path]} if path in base_names else {}
        modules[path] = _unknown(old.get(path, {}), _MODULE) | entry
    document: dict[str, Any] = _unknown(origin, _FIELDS) | {
        "format_version": origin.get("format_version", VERSION),
        "rank": usual(update.rank for update in adapter.updates.values()),
        "alpha": usual(update.alpha for update in adapter.updates.values()),
        "target_modules": target_modules(modules, adapter.settings, origin),
        "modules": modules,
        "digest": NO_DIGEST,
    }
    if adapter.replacements:
        old = origin.get("replacements", {})
        document["replacements"] = {
            path: _unknown(old.get(path, {}), _REPLACEMENT)
            | ({"tensor": base_names[path]} if path in base_names else {})
            for path in sorted(adapter.replacements)
        }
    if adapter.base:
        document["base_model"] = _base(adapter.base, origin.get("base_model", {}))
    if adapter.provenance:
        document["provenance"] = _provenance(adapter.provenance, origin.get("provenance", []))
    if settings := {key: value for key, value in adapter.settings.items() if key not in _STATED}:
        document["settings"] = settings
    return document


def target_modules(
    modules: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], origin: Mapping[str, Any]
) -> list[str]:
    """Return a sorted `target_modules` list that fits the modules: the one they came with if it does, else their paths.

    Full paths are exact, where a short name may match modules of the base that this adapter does not touch.
    """
    ours = [path for path, entry in modules.items() if entry["kind"] != "experts"]
    for wanted in (origin.get("target_modules"), settings.get("target_modules")):
        exact = not any(settings.get(key) for key in ("exclude_modules", "layers_to_transform"))
        if exact and isinstance(wanted, list | tuple | set | frozenset) and all(isinstance(t, str) for t in wanted):
            names = sorted(set(wanted))
            if not unmatched(ours, names) and not unused(ours, names):
                return names
    return sorted(ours)


def usual(values: Iterable[float], default: float = 0) -> float:
    """Return the value that most modules have, the smallest of several such; `default` where there is none."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value), default=default)


def unmatched(modules: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Return the modules that no target names."""
    known = set(targets)
    return [module for module in modules if known.isdisjoint(suffixes(module))]


def unused(modules: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Return the targets that name no module."""
    matching = {suffix for module in modules for suffix in suffixes(module)}
    return [target for target in targets if target not in matching]


def names_of(document: Mapping[str, Any]) -> dict[str, str]:
    """Return replaced parameter's path -> tensor name in the file.

    PEFT moves a parameter of a module that has an update of its own under `base_layer`, and so does the name.
    """
    names = {}
    for path in document.get("replacements", {}):
        module, _, parameter = path.rpartition(".")
        inside = module in document["modules"]
        names[path] = keys.join(f"{module}.base_layer.{parameter}" if inside else path)
    return names


def tensors_of(adapter: Adapter) -> dict[str, LazyTensor]:
    """Return every tensor of an adapter by its name in the file."""
    names = names_of({"modules": adapter.updates, "replacements": adapter.replacements})
    parts = {
        keys.join(module, part): lazy
        for module, update in adapter.updates.items()
        for part, lazy in update.parts.items()
    }
    return parts | {name: adapter.replacements[path] for path, name in names.items()}


def base_tensors(adapter: Adapter) -> dict[str, str]:
    """Return module path or replaced parameter's path -> base tensor name, as far as the adapter's own file said it."""
    origin = adapter.settings.get(ORIGIN, {})
    entries = {**origin.get("modules", {}), **origin.get("replacements", {})}
    return {path: entry["tensor"] for path, entry in entries.items() if "tensor" in entry}


def base_of(document: Mapping[str, Any]) -> BaseIdentity | None:
    """Return the base identity that a sound manifest states."""
    base = document.get("base_model")
    if base is None:
        return None
    tiers = base.get("hash", {})
    return BaseIdentity(
        base.get("id"), base.get("revision"), tiers.get("schema"), tiers.get("tensors", {}), tiers.get("root")
    )


def steps_of(document: Mapping[str, Any]) -> tuple[Step, ...]:
    """Return the provenance that a sound manifest states."""
    return tuple(_step(entry) for entry in document.get("provenance", []))


def canonical(value: Any) -> str:
    """Return the canonical JSON text of a value (RFC 8785): sorted names, no spaces, shortest numbers.

    Raises `ValueError` for what such a text cannot hold: NaN, infinities, integers beyond 2^53 - 1, lone surrogates.
    """
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise ValueError("a JSON object has only strings as names")
        ordered = sorted(value, key=lambda name: name.encode("utf-16-be"))
        return "{" + ",".join(f"{canonical(name)}:{canonical(value[name])}" for name in ordered) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, str):
        value.encode()
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return _number(value)
    raise ValueError(f"{type(value).__name__} is not a JSON type")


def _number(value: int | float) -> str:
    # The shortest digits that read back as the same binary64, laid out as ECMAScript does.
    if isinstance(value, int):
        if abs(value) >= 2**53:
            raise ValueError(f"the integer {value} is beyond 2^53 - 1")
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")
    if value == 0:
        return "0"
    sign, figures, exponent = Decimal(repr(value)).as_tuple()
    digits = "".join(map(str, figures)).rstrip("0")
    point = len(figures) + int(exponent)  # the value is 0.digits * 10^point
    if len(digits) <= point <= 21:
        if abs(value) >= 2**53:  # would be read back as an integer, which is out of bounds
            raise ValueError(f"the number {value:g} is beyond 2^53 - 1")
        text = digits.ljust(point, "0")
    elif 0 < point <= 21:
        text = f"{digits[:point]}.{digits[point:]}"
    elif -6 < point <= 0:
        text = f"0.{'0' * -point}{digits}"
    else:
        text = f"{digits[0]}{'.' if len(digits) > 1 else ''}{digits[1:]}e{point - 1:+d}"
    return f"-{text}" if sign else text


def _unknown(origin: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in origin.items() if name not in known}


def _base(base: BaseIdentity, origin: Mapping[str, Any]) -> dict[str, Any]:
    tiers: dict[str, Any] = {"schema": base.schema, "tensors": dict(base.tensors) or None, "root": base.root}
    tiers = _present(tiers)
    tiers = _unknown(origin.get("hash", {}), _HASH) | tiers if tiers else {}
    stated = {"id": base.id and _public(base.id), "revision": base.revision, "hash": tiers or None}
    return _unknown(origin, _BASE) | _present(stated)


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _public(identifier: str) -> str:
    # A folder of the machine at work means nothing elsewhere and tells who worked there (clause M-16).
    return re.split(r"[/\\]", identifier.rstrip("/\\"))[-1] if is_path(identifier) else identifier


def is_path(identifier: str) -> bool:
    """Tell whether a base model's id is a path of some machine and not a name."""
    return re.match(r"[./\\~]|[A-Za-z]:[/\\]|file:", identifier) is not None


def _provenance(steps: tuple[Step, ...], origin: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    entries = []
    for i, step in enumerate(steps):
        entry: dict[str, Any] = {"operation": step.operation, "tool": step.tool}
        entry |= {"parameters": dict(step.parameters)} if step.parameters else {}
        entry |= {"inputs": [dict(item) for item in step.inputs]} if step.inputs else {}
        entry |= {"seed": step.seed} if step.seed is not None else {}
        same = i < len(origin) and _step(origin[i]) == step
        entries.append(_unknown(origin[i], _STEP) | entry if same else entry)
    return entries


def _step(entry: Mapping[str, Any]) -> Step:
    parameters, inputs = entry.get("parameters", {}), tuple(entry.get("inputs", ()))
    return Step(entry["operation"], entry["tool"], parameters, inputs, entry.get("seed"))
