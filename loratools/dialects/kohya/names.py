"""kohya's flattened names and back: `lora_unet_` + a module's path with every `.` made `_`.

The way back is a look-up: in the names that the file itself carries, in the base model's, or in those of the families
of image models (`adapter/naming/image/families/`), one of which must have all names of a file.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from loratools.adapter.naming.image import readings
from loratools.adapter.naming.image.components import component
from loratools.adapter.naming.image.groups import component_of, stated
from loratools.adapter.naming.image.patterns import form_of
from loratools.adapter.naming.image.readings import ENCODER, Reading
from loratools.dialects._frame.build import some

NAMES_KEY = "loratools_names"
"""Header entry with flat -> dotted, as JSON, for the modules that no family has."""

_HEAD = re.compile(
    r"(lora_unet_|oft_unet_|lora_te[123]?_|lora_transformer_|lora_prior_unet_|lora_prior_te_|lycoris_)_?(.+?)_?"
)

# prefix -> the components whose families may explain its names; None: those of all image models
_COMPONENTS: Mapping[str, tuple[str, ...] | None] = {
    "lora_unet_": None,
    "lora_transformer_": ("transformer",),
    "oft_unet_": ("unet",),
    "lycoris_": None,
    "lora_prior_unet_": ("prior",),
    **dict.fromkeys(("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_prior_te_"), (ENCODER,)),
}
_IMAGES = ("lora_unet_", "oft_unet_", "lora_transformer_", "lora_prior_unet_", "lycoris_")
_ENCODERS = {"lora_te_": "", "lora_te1_": "", "lora_te2_": "_2", "lora_te3_": "_3"}
_ROOTS = (
    "unet.", "transformer.", "model.diffusion_model.", "diffusion_model.", "text_encoder.", "text_encoder_2.",
    "text_encoder_3.", "net.", "model.model.", "",
)  # fmt: skip


@lru_cache(maxsize=1 << 16)  # the next adapter has the same names
def head_of(name: str) -> tuple[str, str, str] | None:
    """Return (prefix, flat, suffix) of a tensor's name, or None where it is no flattened one.

    >>> head_of("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight")
    ('lora_te1_', 'text_model_encoder_layers_0_mlp_fc1', 'lora_up.weight')
    """
    head, _, suffix = name.partition(".")
    match = _HEAD.fullmatch(head)
    return (match[1], match[2], suffix) if match and suffix else None


def dotted(
    heads: Iterable[tuple[str, str]],
    metadata: Mapping[str, str],
    base: Iterable[str] | None,
    shapes: Mapping[tuple[str, str], tuple[int, ...]] | None = None,
) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Return (prefix, flat) -> module, and a sentence for each name that no family has, or that has several readings.

    `heads` are the (prefix, flat) of a file, `metadata` its header's entries, `base` the tensor names of the base
    model, or None without one, and `shapes` those of the ΔW where they are known.
    """
    by_prefix: dict[str, set[str]] = defaultdict(set)
    for prefix, flat in heads:
        by_prefix[prefix].add(flat)
    stated_names = _stated(metadata)
    modules = {(prefix, flat): stated_names[prefix + flat] for prefix, flats in by_prefix.items() for flat in flats
               if prefix + flat in stated_names}  # fmt: skip
    faults: list[str] = []
    alone = len(by_prefix.keys() & _ENCODERS.keys()) == 1
    of_base = _of_base(base) if base is not None else {}
    main: list[Reading] = []
    parts = [(prefix, part) for prefix, flats in by_prefix.items()
             for part in sorted({_part(prefix, flat) for flat in flats})]  # fmt: skip
    for prefix, part in sorted(parts, key=lambda one: (one[0] not in _IMAGES, one)):
        left = {f for f in by_prefix[prefix] if (prefix, f) not in modules and _part(prefix, f) == part}
        if not left:
            continue
        known = {flat: {module for module in of_base.get(flat, ()) if _fits(prefix, module, alone=alone)}
                 for flat in left}  # fmt: skip
        if all(len(candidates) == 1 for candidates in known.values()):
            modules |= {(prefix, flat): next(iter(candidates)) for flat, candidates in known.items()}
            continue
        fits = readings.fitting(left, flat=True, components=_COMPONENTS[prefix])
        fits = [reading for reading in fits if "kohya" in reading.family.prefixes] or fits
        outcomes = _outcomes(prefix, left, fits, main)
        if len(outcomes) > 1 and base is not None:
            outcomes = _in_base(outcomes, {module for several in of_base.values() for module in several})
        if len(outcomes) > 1:
            sizes = {flat: (shapes or {}).get((prefix, flat), ()) for flat in left}
            told = readings.told(fits, sizes, stated(metadata), flat=True)
            outcomes = [each for each in outcomes if set(each[1]) & set(told)] or outcomes
        if len(outcomes) == 1:
            modules |= {(prefix, flat): module for flat, module in outcomes[0][0].items()}
            main += outcomes[0][1] if prefix in _IMAGES else []
            continue
        several = [f"{prefix}{flat}: could be any of {', '.join(sorted(candidates))} of the base"
                   for flat, candidates in sorted(known.items()) if len(candidates) > 1]  # fmt: skip
        modules |= {(prefix, flat): next(iter(c)) for flat, c in known.items() if len(c) == 1}
        strange = {flat for flat, candidates in known.items() if not candidates}
        faults += several
        if strange and not several:
            faults.append(
                _ambiguous(prefix, outcomes) if outcomes else _unknown(prefix, strange, len(by_prefix[prefix]))
            )
    return modules, faults


def flattened(
    modules: Iterable[str], prefixes: Mapping[str, str] | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return module -> flattened name with its prefix, and flat -> module for the names that need `NAMES_KEY`.

    `prefixes` are kohya's by component; default: the usual ones. Of modules that share a flattened name, only the first
    is among them.
    """
    modules = list(modules)
    components = {module.partition(".")[0] for module in modules}
    if components <= {"unet", "text_encoder"}:
        prefixes = {"text_encoder": "lora_te_", **(prefixes or {})}
    owners: dict[str, str] = {}
    for module in modules:
        owners.setdefault("".join(_flat(module, prefixes or {})), module)
    flat = {module: name for name, module in owners.items()}
    split = {module: _flat(module, prefixes or {}) for module in flat}
    back, _ = dotted(split.values(), {}, None)
    return flat, {flat[module]: module for module in flat if back.get(split[module]) != module}


def _part(prefix: str, flat: str) -> str:
    """Return the family beside the image model whose module this is, or ""."""
    return readings.beside(flat, flat=True) if prefix in _IMAGES else ""


def _flat(module: str, prefixes: Mapping[str, str]) -> tuple[str, str]:
    component, _, rest = module.partition(".")
    t5 = ".block." in rest
    usual = {
        "unet": "lora_unet_",
        "diffusion_model": "lora_unet_",
        "transformer": "lora_transformer_",
        "prior": "lora_prior_unet_",
        "text_encoder": "lora_te1_",
        "text_encoder_2": "lora_te3_" if t5 else "lora_te2_",  # Flux keeps its T5 there, and sd-scripts calls it te3
        "text_encoder_3": "lora_te3_",
    }
    prefix = prefixes.get(component, usual.get(component))
    language = component == "transformer" and component not in prefixes and rest.startswith(("h.", "layers.0.self"))
    if prefix is None or not rest or language:
        return "lycoris_", module.replace(".", "_")
    return prefix, rest.replace(".", "_")


def _outcomes(
    prefix: str, flats: Iterable[str], fits: Sequence[Reading], main: Sequence[Reading]
) -> list[tuple[dict[str, str], list[Reading]]]:
    """Return each way to read flattened names, flat -> module, with the readings that are so."""
    wanted, outcomes = sorted(flats), list[tuple[dict[str, str], list[Reading]]]()
    for reading in fits:
        found = {flat: reading.find(flat, flat=True) for flat in wanted}
        bare = {flat: pattern[0].format(*pattern[1]) for flat, pattern in found.items() if pattern}
        first = _encoder(prefix, main) if prefix in _ENCODERS else component_of(reading, bare.values())
        outcome = {flat: f"{first}.{module}" for flat, module in bare.items()}
        same = next((readings for known, readings in outcomes if known == outcome), None)
        if same is None:
            outcomes.append((outcome, [reading]))
        else:
            same.append(reading)
    return outcomes


def _in_base(
    outcomes: list[tuple[dict[str, str], list[Reading]]], base: set[str]
) -> list[tuple[dict[str, str], list[Reading]]]:
    """Return the ways to read names of which the base has the most, under one naming or the other."""
    stored = {root_less for module in base for root in _ROOTS if module.startswith(root)
              for root_less in (module.removeprefix(root),)}  # fmt: skip
    counts = [
        max(
            sum(stored.issuperset(lead.names) for lead in readings.leads(reading, bare, to).values())
            for reading in several
            for to in readings.NAMINGS
        )
        for outcome, several in outcomes
        for bare in ([module.partition(".")[2] for module in outcome.values()],)
    ]
    return [outcome for outcome, count in zip(outcomes, counts, strict=True) if count == max(counts)]


def _encoder(prefix: str, main: Sequence[Reading]) -> str:
    """Return the component of a text encoder that a prefix stands for, in the families of the image model's names."""
    stated = {name for reading in main for name, (kohya, _) in reading.family.encoders.items() if kohya == prefix}
    return stated.pop() if len(stated) == 1 else f"text_encoder{_ENCODERS[prefix]}"


def _stated(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return flat -> module as the file itself states it, where the one is the other flattened."""
    try:
        stated = json.loads(metadata.get(NAMES_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(stated, dict):
        return {}
    return {
        flat: module
        for flat, module in stated.items()
        if isinstance(module, str) and flat.endswith(module.partition(".")[2].replace(".", "_")) and module
    }


def _of_base(tensors: Iterable[str]) -> dict[str, set[str]]:
    """Return flat -> the base's modules of that name; kohya's names leave out roots such as `unet.`."""
    by_flat: dict[str, set[str]] = defaultdict(set)
    for module in (tensor.removesuffix(".weight") for tensor in tensors):
        # Other dialects call model.diffusion_model diffusion_model.
        name = module.removeprefix("model.") if module.startswith("model.diffusion_model.") else module
        for root in _ROOTS:
            if module.startswith(root):
                by_flat[module.removeprefix(root).replace(".", "_")].add(name)
    return by_flat


def _fits(prefix: str, module: str, *, alone: bool) -> bool:
    """Tell whether a prefix can stand for this module.

    An encoder's prefix stands for that encoder, or for T5, which tools number as they like. The only such prefix in a
    file (`alone`) also stands for a base that is nothing but the encoder.
    """
    encoder = module.startswith("text_encoder")
    if prefix in _ENCODERS:
        own = module.startswith(f"text_encoder{_ENCODERS[prefix]}.")
        return own or (".block." in module if encoder else alone and not component(module))
    return prefix == "lycoris_" or not encoder


def _ambiguous(prefix: str, outcomes: Sequence[tuple[dict[str, str], list[Reading]]]) -> str:
    flat = next(flat for flat in sorted(outcomes[0][0]) if len({outcome[flat] for outcome, _ in outcomes}) > 1)
    ways = (f"{outcome[flat]} ({readings.summaries(several)})" for outcome, several in outcomes)
    return f"{prefix}{flat}: could be {', '.join(ways)}"


def _unknown(prefix: str, flats: set[str], names: int) -> str:
    """Say which of a prefix's names, so many in all, the family that knows most of them lacks."""
    forms = set(map(form_of, flats))  # a few, where names are thousands
    likely = (reading for reading in readings.every(_COMPONENTS[prefix]) if reading.has_any(forms, flat=True))
    counts = {reading: {flat for flat in flats if reading.find(flat, flat=True)} for reading in likely}
    best = max(counts, key=lambda reading: len(counts[reading]), default=None)
    strange = sorted(flats - counts[best] if best else flats)
    near = f", most of them of {best.family.summary}" if best and len(strange) < len(flats) else ""
    verb = "is" if len(strange) == 1 < names else "are"
    few = some([prefix + flat for flat in strange])
    return f"{len(strange)} of {names} names under {prefix} {verb} of no known family{near}: {few}"
