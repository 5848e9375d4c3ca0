"""Chapter 2: the files of an adapter, and the `adapter_config.json` that says to PEFT what the manifest says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loratools.adapter.naming.compact import suffixes
from loratools.adapter.parts import BIAS, MAGNITUDE
from loratools.format import keys
from loratools.format.clauses import COUNT, FLAG, Chapter, Fault, Form, Subject, number, shown
from loratools.format.clauses.manifest import layout_faults
from loratools.format.manifest import LAYERS, layers_of, unmatched
from loratools.format.peft_config import FOREIGN

CHAPTER = Chapter()
TOLERANCE = 1e-6
"""Relative: a config is written in decimal by tools that compute the scaling once more."""

# Fields that make PEFT compute something else from the same tensors, unless they have one of these values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "kasa_config"), (None,)),
    **dict.fromkeys(("use_bdlora", "use_qalora"), (None, False)),
    "exclude_modules": (None, [], ""),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga"),
    "layers_to_transform": (None, []),
}


def _or_none(form: Form) -> Form:
    return (lambda value: value is None or form[0](value)), form[1]


_OBJECT: Form = (lambda value: isinstance(value, dict), "an object")
_NAMES: Form = (lambda value: isinstance(value, list) and len(_strings(value)) == len(value), "a list of strings")
_TYPES: Mapping[str, Form] = {
    "peft_type": (lambda value: value == "LORA", "LORA"),
    "r": COUNT,
    "lora_alpha": (number, "a number"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _or_none(_OBJECT)),
    **dict.fromkeys(("modules_to_save", "target_parameters"), _or_none(_NAMES)),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), _or_none(FLAG)),
    "bias": (lambda value: isinstance(value, str), "a string"),
}


def _strings(value: Any) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _lora(subject: Subject) -> Mapping[str, Any] | None:
    """Return the config if it is to say what the manifest says; None where there is none, or L-14 binds it."""
    return None if subject.foreign else subject.config


@CHAPTER.clause("L-14")
def not_for_peft(subject: Subject) -> Iterator[Fault]:
    """Check that PEFT refuses an adapter that it would load only in part."""
    if subject.config is not None and subject.foreign and subject.config.get("peft_type") != FOREIGN:
        found = f"expected {FOREIGN}, for PEFT has no updates such as that of {subject.foreign[0]}"
        yield "adapter_config.json", f"peft_type: {found}; found {shown(subject.config.get('peft_type'))}"


@CHAPTER.clause("L-15")
def layers(subject: Subject) -> Iterator[Fault]:
    """Compare the layers that PEFT would repeat with those of the manifest."""
    yield from _equal(subject, LAYERS, _layers(subject))


@CHAPTER.clause("L-16")
def rows(subject: Subject) -> Iterator[Fault]:
    """Compare the rows that PEFT would replace with those of the modules of kind `tokens`."""
    tokens = [module for module in subject.modules() if module[2].name == "tokens"]
    indices = {path: entry["layout"]["rows"] for path, entry, kind in tokens if not any(layout_faults(kind, entry))}
    yield from _equal(subject, "trainable_token_indices", indices)


def _equal(subject: Subject, field: str, wanted: Any) -> Iterator[Fault]:
    config = _lora(subject)
    if config is not None and "meaning" in subject.manifest and (config.get(field) or None) != (wanted or None):
        yield "adapter_config.json", f"{field}: the manifest says {shown(wanted)}, found {shown(config.get(field))}"


def _layers(subject: Subject) -> Any:
    try:
        return layers_of(subject.manifest)
    except (AttributeError, KeyError, TypeError):  # no sound extensions, which X-01 says
        return (subject.config or {}).get(LAYERS)


@CHAPTER.clause("L-05")
def peft_lora(subject: Subject) -> Iterator[Fault]:
    """Check that the config is that of a LoRA, and the types of its fields."""
    config = _lora(subject)
    if config is None:
        return
    for field, (formed, expected) in _TYPES.items():
        if (field in config or field == "peft_type") and not formed(config.get(field)):
            yield "adapter_config.json", f"{field}: expected {expected}, found {shown(config.get(field))}"


@CHAPTER.clause("L-06")
def ranks(subject: Subject) -> Iterator[Fault]:
    """Compare the rank that PEFT would give each module with the manifest's."""
    for path, entry, rank, _ in _configured(subject):
        if rank != entry["rank"]:
            yield path, f"the manifest says rank {entry['rank']}, adapter_config.json {shown(rank)}"


@CHAPTER.clause("L-07")
def scalings(subject: Subject) -> Iterator[Fault]:
    """Compare the scaling that PEFT would give each module with the manifest's."""
    rooted = bool((subject.config or {}).get("use_rslora"))
    before = None
    for path, entry, rank, alpha in _configured(subject):
        stated: Any = entry.get("scaling")
        if rank != entry["rank"] or not number(stated) or (rank, alpha, stated) == before:
            continue
        scaling = _quotient(alpha, math.sqrt(rank) if rooted else rank)
        if scaling == stated or math.isclose(scaling, stated, rel_tol=TOLERANCE):
            before = rank, alpha, stated  # most modules have those of the last one
        else:
            yield path, f"the manifest says scaling {stated:g}, adapter_config.json {scaling:g}"


def _quotient(alpha: Any, divisor: float) -> float:
    return float(alpha) / divisor if number(alpha) and abs(alpha) < 2**1000 else math.nan


def _configured(subject: Subject) -> Iterator[tuple[str, Mapping[str, Any], Any, Any]]:
    """Yield (path, entry, rank, alpha) with the rank and alpha that PEFT's rules give each module."""
    if (config := _lora(subject)) is None:
        return
    if not config.get("rank_pattern") and not config.get("alpha_pattern"):
        rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        yield from ((path, entry, rank, alpha) for path, entry, kind in subject.modules() if kind.numbers)
        return
    rank_of, alpha_of = _rule(config, "rank_pattern", "r"), _rule(config, "alpha_pattern", "lora_alpha")
    for path, entry, kind in subject.modules():
        if not kind.numbers:
            continue
        name = _parameter(path, entry) or path
        yield path, entry, rank_of(name), alpha_of(name)


def _rule(config: Mapping[str, Any], field: str, default: str) -> Callable[[str], Any]:
    # PEFT's patterns are regular expressions, the first that matches wins. The format allows names only, so that an
    # untrusted file has no say in how long matching takes: `^` and the escaped path, or the path or a suffix as it is.
    stated = config.get(field)
    patterns = stated if isinstance(stated, Mapping) else {}
    order = {key: i for i, key in enumerate(patterns)}
    if not order:
        return lambda module: config.get(default, 8)

    def value(module: str) -> Any:
        hits = [key for key in (keys.exactly(module), *suffixes(module)) if key in order]
        return patterns[min(hits, key=order.__getitem__)] if hits else config.get(default, 8)

    return value


@CHAPTER.clause("L-08")
def targets(subject: Subject) -> Iterator[Fault]:
    """Compare the two lists of target modules."""
    if (config := _lora(subject)) is not None:
        ours, stated = config.get("target_modules"), subject.manifest.get("target_modules")
        if not isinstance(ours, list) or not isinstance(stated, list) or sorted(map(str, ours)) != stated:
            yield "adapter_config.json", f"target_modules: the manifest says {shown(stated)}, found {shown(ours)}"


@CHAPTER.clause("L-09")
def saved(subject: Subject) -> Iterator[Fault]:
    """Check that PEFT is told of each replacement outside the modules that have updates."""
    if (config := _lora(subject)) is None:
        return
    listed = config.get("modules_to_save")
    names = set(_strings(listed))
    biases = config.get("bias", "none") != "none"
    modules = dict(subject.entries())
    for path, _ in subject.entries("replacements"):
        module = path.rpartition(".")[0]
        covered = module in modules or (biases and path.endswith(".bias"))
        wrapping = (suffix for i, c in enumerate(f"{module}.") if c == "." for suffix in suffixes(module[:i]))
        if not covered and names.isdisjoint(wrapping):
            yield path, f"adapter_config.json: modules_to_save {shown(listed)} does not name {module!r}"


@CHAPTER.clause("L-10")
def switches(subject: Subject) -> Iterator[Fault]:
    """Check the switches that make PEFT create magnitude vectors and biases."""
    if (config := _lora(subject)) is None:
        return
    present = {part for parts in subject.parts.values() for part in parts}
    for field, part in (("use_dora", MAGNITUDE), ("lora_bias", BIAS)):
        if bool(config.get(field)) != (part in present):
            there = "has" if part in present else "has no"
            yield "adapter_config.json", f"{field} is {config.get(field)}, but the file {there} {part}"


@CHAPTER.clause("L-11")
def neutral(subject: Subject) -> Iterator[Fault]:
    """Refuse fields that make PEFT compute another change from the same tensors."""
    config = _lora(subject) or {}
    for field, allowed in _NEUTRAL.items():
        value = config.get(field, allowed[0])
        if value is not allowed[0] and not any(
            type(value) is type(harmless) and value == harmless for harmless in allowed
        ):
            yield "adapter_config.json", f"{field}: {shown(value)} changes what the tensors mean"


@CHAPTER.clause("L-12")
def parameters(subject: Subject) -> Iterator[Fault]:
    """Check that PEFT is told of each parameter of stacked experts."""
    if (config := _lora(subject)) is None:
        return
    listed = config.get("target_parameters")
    for path, entry, _ in subject.modules():
        parameter = _parameter(path, entry)
        if parameter and unmatched([parameter], _strings(listed)):
            yield path, f"adapter_config.json: target_parameters {shown(listed)} does not name {parameter!r}"


def _parameter(path: str, entry: Mapping[str, Any]) -> str | None:
    """Return the base parameter of stacked experts; PEFT nests one `base_layer` for each further parameter."""
    layout = entry.get("layout") if entry.get("kind") == "experts" else None
    if not isinstance(layout, dict) or not isinstance(layout.get("parameter"), str):
        return None
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return f"{path}.{layout['parameter']}"
