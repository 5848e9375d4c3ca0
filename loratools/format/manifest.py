"""The manifest: JSON in a safetensors header that says what the tensors of an adapter mean (`spec/v1/3-manifest.md`).

Pure functions between an `Adapter` and a JSON object. No tensor is touched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from loratools.adapter.model import HEADER, Adapter, BaseIdentity, Step
from loratools.adapter.naming.compact import suffixes
from loratools.errors import InvalidFormat, counted
from loratools.format import keys
from loratools.format.canonical import canonical as canonical
from loratools.format.canonical import canonical_parts, said, unsaid
from loratools.storage import digest
from loratools.storage.lazy import LazyTensor

VERSION = "1.1"
METADATA_KEY = "loratools"
_DIGITS = 10**21  # from here on RFC 8785 writes an exponent
NO_DIGEST = f"{digest.DEFAULT}:{'0' * 64}"
"""Stands for the digest while the data are still being written: it has the same length."""

ORIGIN = "loratools"
"""Key of `Adapter.settings` under which the reader keeps the manifest as it was found, for a faithful rewrite."""

LAYERS, LAYERS_FIELD = "layer_replication", "layers"
"""Name of the extension, and of the setting, that repeats layers of the base; and the field that says which."""

# What the manifest states in fields of its own, so that a copy in `settings` could only contradict it.
_STATED = frozenset(
    {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters"}
    | {LAYERS, ORIGIN}
)
_FIELDS = frozenset(
    {"format_version", "rank", "alpha", "target_modules", "modules", "replacements", "base_model", "digest", "meaning"}
    | {"provenance", "settings", "extensions"}
)
_MODULE = frozenset({"kind", "tensor", "rank", "alpha", "scaling", "layout"})
_REPLACEMENT = frozenset({"tensor"})
_BASE = frozenset({"id", "revision", "hash", "model_type"})
_HASH = frozenset({"schema", "tensors", "root", "logical", "weights"})
_STEP = frozenset({"operation", "tool", "parameters", "inputs", "seed"})


def of(adapter: Adapter, tensors: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the manifest of an adapter, its `digest` still `NO_DIGEST`.

    `tensors` maps a module path or a replaced parameter's path to the name of the base tensor that it changes; what is
    not in it is taken from the manifest that the adapter was read from. That manifest's unknown fields, and its
    extensions, are kept (clauses V-04 and X-05). Raises `InvalidFormat` for numbers that a manifest cannot hold (M-02).
    """
    origin: Mapping[str, Any] = adapter.settings.get(ORIGIN, {})
    base_names = base_tensors(adapter) | dict(tensors or {})
    old = origin.get("modules", {})
    modules = {}
    for path, update in sorted(adapter.updates.items()):
        entry: dict[str, Any] = {
            "kind": update.kind, "rank": max(update.rank, 1), "alpha": as_read(update.alpha),
            "scaling": as_read(update.scaling),
        }  # fmt: skip
        known = {name: value for name, value in update.layout.items() if value is not None}
        turned = {"transposed": adapter.orientation[path]} if path in adapter.orientation else {}
        layout = {**old.get(path, {}).get("layout", {}), **known, **turned}
        entry |= {"layout": layout} if layout else {}
        entry |= {"tensor": base_names[path]} if path in base_names else {}
        modules[path] = _unknown(old.get(path, {}), _MODULE) | entry
    document: dict[str, Any] = _unknown(origin, _FIELDS) | {
        "format_version": origin.get("format_version", VERSION),
        "rank": usual(entry["rank"] for entry in modules.values()),
        "alpha": usual(entry["alpha"] for entry in modules.values()),
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
        if isinstance(entries := settings.get(HEADER), Mapping):
            from loratools.storage.beside.paths import public_entries  # not needed to read

            settings[HEADER] = public_entries(entries)  # M-24
        document["settings"] = settings
    if extensions := _extensions(adapter, origin.get("extensions", [])):
        document["extensions"] = extensions
    if "format_version" not in origin or "meaning" in origin or extensions != origin.get("extensions", []):
        # What came without it is rewritten without it (V-04); all else is marked with the version that has it.
        from loratools.format import meaning  # not needed to read

        document["format_version"] = _later(document["format_version"], VERSION)
        parts = {path: update.parts for path, update in adapter.updates.items()}
        try:
            document["meaning"] = meaning.of(document, parts)
        except ValueError:
            raise unwritable(document) from None
    return document


def unwritable(document: Mapping[str, Any]) -> InvalidFormat:
    """Return the error that says what of a manifest, or of a config, has no canonical text (M-02)."""
    problems = list(unsaid(document))
    return InvalidFormat(
        f"the adapter's manifest cannot be written: canonical JSON has no form for {counted(len(problems), 'value')}",
        problems,
        hint="Of numbers it has none for whole ones from 2^53 to 1e21. Where that is an alpha or a scaling, "
        "`loratools resize` writes the same change with a scaling of 1.",
    )  # fmt: skip


def text(document: Mapping[str, Any]) -> str:
    """Return the canonical text of a manifest that `of` made; raise `ValueError` as `canonical` does.

    What has an entry for each module is made sooner: its names are paths and fields. Other names come from settings.
    """
    return canonical_parts(document, ("modules", "replacements", "target_modules"))


def as_read(value: float) -> float:
    """Return a number in the type in which its canonical text is read back: a whole one below 1e21 is an integer."""
    if isinstance(value, int):
        return float(value) if abs(value) >= _DIGITS else value
    return int(value) if value.is_integer() and abs(value) < _DIGITS else value


def _extensions(adapter: Adapter, origin: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the extensions as they were, with the layers that the adapter says are repeated."""
    layers = [list(part) for part in adapter.settings.get(LAYERS) or ()]
    kept = [dict(each) for each in origin]
    for each in kept:
        if each["name"] == LAYERS:
            each["configuration"] = {**each.get("configuration", {}), LAYERS_FIELD: layers}
    if layers and not any(each["name"] == LAYERS for each in kept):
        kept.append({"name": LAYERS, "must_understand": True, "configuration": {LAYERS_FIELD: layers}})
    return [each for each in kept if layers or each["name"] != LAYERS]


def layers_of(document: Mapping[str, Any]) -> list[list[int]]:
    """Return the layers of the base that a sound manifest repeats, as [start, stop] each; [] where it repeats none."""
    named = {each["name"]: each.get("configuration", {}) for each in document.get("extensions", [])}
    layers: list[list[int]] = named.get(LAYERS, {}).get(LAYERS_FIELD, [])
    return layers


def _later(one: str, other: str) -> str:
    return max(one, other, key=lambda version: tuple(map(int, version.split("."))))


def target_modules(
    modules: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], origin: Mapping[str, Any]
) -> list[str]:
    """Return a sorted `target_modules` list that fits the modules: the one they came with if it does, else their paths.

    Full paths are exact, where a short name may match modules of the base that this adapter does not touch.
    """
    from loratools.format.registry import KINDS  # not needed to read

    ours = [path for path, entry in modules.items() if entry["kind"] not in KINDS or KINDS[entry["kind"]].targeted]
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
        base.get("id"), base.get("revision"), tiers.get("schema"), tiers.get("tensors", {}), tiers.get("root"),
        base.get("model_type"), tiers.get("logical"), tiers.get("weights", {}),
    )  # fmt: skip


def steps_of(document: Mapping[str, Any]) -> tuple[Step, ...]:
    """Return the provenance that a sound manifest states."""
    return tuple(_step(entry) for entry in document.get("provenance", []))


def _unknown(origin: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in origin.items() if name not in known}


def _base(base: BaseIdentity, origin: Mapping[str, Any]) -> dict[str, Any]:
    tiers: dict[str, Any] = {"schema": base.schema, "tensors": dict(base.tensors) or None, "root": base.root}
    tiers |= {"logical": base.logical if base.of_codes else None, "weights": dict(base.weights) or None}
    tiers = _present(tiers)
    tiers = _unknown(origin.get("hash", {}), _HASH) | tiers if tiers else {}
    stated = {"id": base.id and public(base.id), "revision": base.revision, "hash": tiers or None}
    return _unknown(origin, _BASE) | _present(stated | {"model_type": base.model_type})


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def public(identifier: str) -> str:
    """Return a base model's id as files state it: of a path its last part.

    A folder of the machine at work means nothing elsewhere, and tells who worked there (clause M-16).
    """
    return re.split(r"[/\\]", identifier.rstrip("/\\"))[-1] if is_path(identifier) else identifier


def is_path(identifier: str) -> bool:
    """Tell whether a base model's id is a path of some machine and not a name."""
    return re.match(r"[./\\~]|[A-Za-z]:[/\\]|file:", identifier) is not None


def _provenance(steps: tuple[Step, ...], origin: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    entries = []
    for i, step in enumerate(steps):
        entry: dict[str, Any] = {"operation": step.operation, "tool": step.tool}
        entry |= {"parameters": said(step.parameters)} if step.parameters else {}
        entry |= {"inputs": [dict(item) for item in step.inputs]} if step.inputs else {}
        entry |= {"seed": step.seed} if step.seed is not None else {}
        same = i < len(origin) and _step(origin[i]) == step
        entries.append(_unknown(origin[i], _STEP) | entry if same else entry)
    return entries


def _step(entry: Mapping[str, Any]) -> Step:
    parameters, inputs = entry.get("parameters", {}), tuple(entry.get("inputs", ()))
    return Step(entry["operation"], entry["tool"], parameters, inputs, entry.get("seed"))
