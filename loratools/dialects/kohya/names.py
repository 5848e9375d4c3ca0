"""kohya's flattened names and back: `lora_unet_` + a module's path with every `.` made `_`.

The way back is a look-up: in the names that the file itself carries, in the base model's, or in the lists of known
architectures (`adapter/naming/image/architectures.py`).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from loratools.adapter.naming.image import architectures
from loratools.adapter.naming.image.components import component
from loratools.dialects._frame.build import some

NAMES_KEY = "loratools_names"
"""Header entry with flat -> dotted, as JSON, for the modules that no list of a known architecture has."""

_HEAD = re.compile(r"(lora_unet_|lora_te[123]?_|lora_transformer_|lora_prior_unet_|lora_prior_te_|lycoris_)_?(.+)")

# prefix -> the components whose lists may explain its names
_COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "lora_unet_": ("unet", "transformer", "diffusion_model"),
    "lora_transformer_": ("transformer",),
    "lycoris_": ("unet", "transformer", "diffusion_model"),
    **dict.fromkeys(("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_"), ("text_encoder",)),
}
_ENCODERS = {"lora_te_": "", "lora_te1_": "", "lora_te2_": "_2", "lora_te3_": "_3"}
_ROOTS = (
    "unet.", "transformer.", "model.diffusion_model.", "diffusion_model.", "text_encoder.", "text_encoder_2.",
    "text_encoder_3.", "",
)  # fmt: skip


def head_of(name: str) -> tuple[str, str, str] | None:
    """Return (prefix, flat, suffix) of a tensor's name, or None where it is no flattened one.

    >>> head_of("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight")
    ('lora_te1_', 'text_model_encoder_layers_0_mlp_fc1', 'lora_up.weight')
    """
    head, _, suffix = name.partition(".")
    match = _HEAD.fullmatch(head)
    return (match[1], match[2], suffix) if match and suffix else None


def dotted(
    heads: Iterable[tuple[str, str]], metadata: Mapping[str, str], base: Iterable[str] | None
) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Return (prefix, flat) -> module, and a sentence for each name that no list has, or that has several readings.

    `heads` are the (prefix, flat) of a file, `metadata` its header's entries, `base` the tensor names of the base
    model, or None without one.
    """
    by_prefix: dict[str, set[str]] = defaultdict(set)
    for prefix, flat in heads:
        by_prefix[prefix].add(flat)
    stated = _stated(metadata)
    modules = {(prefix, flat): stated[prefix + flat] for prefix, flats in by_prefix.items() for flat in flats
             if prefix + flat in stated}  # fmt: skip
    faults: list[str] = []
    alone = len(by_prefix.keys() & _ENCODERS.keys()) == 1
    of_base = _of_base(base) if base is not None else {}
    main = ""
    for prefix in sorted(by_prefix, key=lambda prefix: (prefix not in ("lora_unet_", "lora_transformer_"), prefix)):
        left = {flat for flat in by_prefix[prefix] if (prefix, flat) not in modules}
        for flat in sorted(left):
            candidates = {module for module in of_base.get(flat, ()) if _fits(prefix, module, alone=alone)}
            if len(candidates) == 1:
                modules[prefix, flat] = next(iter(candidates))
            elif candidates:
                faults.append(f"{prefix}{flat}: could be any of {', '.join(sorted(candidates))} of the base")
        left = {flat for flat in left if (prefix, flat) not in modules}
        if not left or (base is not None and faults):
            continue
        readings = architectures.explain(left, _COMPONENTS.get(prefix, ()))
        if len(readings) > 1:
            faults.append(_ambiguous(prefix, readings))
        elif readings:
            architecture, reading = readings[0]
            main = architecture.name if prefix == "lora_unet_" else main
            component = _component(prefix, architecture, main)
            modules |= {(prefix, flat): f"{component}.{module}" for flat, module in reading.items()}
        else:
            faults.append(_unknown(prefix, left))
    return modules, faults


def flattened(modules: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return module -> flattened name with its prefix, and flat -> module for the names that need `NAMES_KEY`.

    Of modules that share a flattened name, only the first is among them.
    """
    modules = list(modules)
    components = {module.partition(".")[0] for module in modules}
    alone = components <= {"unet", "text_encoder"}
    owners: dict[str, str] = {}
    for module in modules:
        owners.setdefault("".join(_flat(module, alone)), module)
    flat = {module: name for name, module in owners.items()}
    split = {module: _flat(module, alone) for module in flat}
    back, _ = dotted(split.values(), {}, None)
    return flat, {flat[module]: module for module in flat if back.get(split[module]) != module}


def _flat(module: str, alone: bool) -> tuple[str, str]:
    component, _, rest = module.partition(".")
    t5 = ".block." in rest
    prefix = {
        "unet": "lora_unet_",
        "diffusion_model": "lora_unet_",
        "transformer": "lora_transformer_",
        "text_encoder": "lora_te_" if alone else "lora_te1_",
        "text_encoder_2": "lora_te3_" if t5 else "lora_te2_",  # Flux keeps its T5 there, and sd-scripts calls it te3
        "text_encoder_3": "lora_te3_",
    }.get(component)
    if prefix is None or not rest or (component == "transformer" and rest.startswith(("h.", "layers.0.self"))):
        return "lycoris_", module.replace(".", "_")
    return prefix, rest.replace(".", "_")


def _component(prefix: str, architecture: architectures.Architecture, main: str) -> str:
    if prefix not in _ENCODERS:
        return architecture.component
    if prefix == "lora_te3_" and main.startswith("flux"):
        return "text_encoder_2"
    return f"text_encoder{_ENCODERS[prefix]}"


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


def _ambiguous(prefix: str, readings: list[tuple[architectures.Architecture, dict[str, str]]]) -> str:
    for flat in sorted(readings[0][1]):
        names = [(f"{architecture.component}.{reading[flat]}", architecture.name) for architecture, reading in readings]
        if len({module for module, _ in names}) > 1:
            return f"{prefix}{flat}: could be {', '.join(f'{module} ({name})' for module, name in names)}"
    raise AssertionError("readings that are the same")


def _unknown(prefix: str, flats: set[str]) -> str:
    """Say which names the list that knows most of them lacks."""
    allowed = _COMPONENTS.get(prefix, ())
    lists = [each for each in map(architectures.get, architectures.names()) if each.component in allowed]
    best = max(lists, key=lambda architecture: len(flats & architecture.by_flat.keys()), default=None)
    strange = sorted(flats - best.by_flat.keys() if best else flats)
    near = f", most of them of {best.name}" if best and len(strange) < len(flats) else ""
    return (
        f"{len(strange)} of {len(flats)} names under {prefix} are of no known architecture{near}: "
        f"{some([prefix + flat for flat in strange])}"
    )
