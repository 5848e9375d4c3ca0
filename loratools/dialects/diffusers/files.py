"""Files of diffusers: read into an `Adapter`, and written from one."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from loratools.adapter.model import Adapter, Loss
from loratools.adapter.naming.image import groups, readings, rename
from loratools.adapter.naming.image.components import MODEL_LEVEL, component, inside, with_component
from loratools.adapter.parts import BIAS, MAGNITUDE, A, B
from loratools.decisions import warned
from loratools.dialects._frame import alphas
from loratools.dialects._frame.build import Draft, some
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import common_losses, left, update_losses, without
from loratools.dialects._frame.metadata import carried, settings_with
from loratools.dialects._frame.numbers import read_number
from loratools.dialects.peft.config import PeftConfig
from loratools.errors import BadFile, counted
from loratools.format import keys
from loratools.format.peft_config import derive_config
from loratools.storage import save
from loratools.storage.strict_json import parse_json_object

_STEM = "pytorch_lora_weights"
_KEY = "lora_adapter_metadata"
_ALPHA_PART = "alpha"
_TRANSFORMER = "transformer"

_DOWN_UP = {"down": "lora_A.weight", "up": "lora_B.weight"}
# Attention processors of 2023 had the projection in the parameter's name, and CLIP's projections had the UNet's names.
_OUT = {"to_out": "to_out.0"}
_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

_CURRENT = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.(?P<what>weight|bias)")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.(?:lora_magnitude_vector(?:\.weight)?(?:\.default(?:\.weight)?)?|magnitude)")
_OLD = re.compile(r"(?P<module>.+?)(?:\.lora\.|\.lora_linear_layer\.|\.lora_)(?P<side>down|up)\.weight")
_PROCESSOR = re.compile(
    r"(?P<at>.+)\.(?P<name>to_[qkv]|to_out|add_[kqv]_proj|to_add_out)_lora\.(?P<side>down|up)\.weight"
)
_PEFT = re.compile(r"^(unet|transformer|text_encoder(?:_[23])?)\.base_model\.model\.")  # of PEFT's own early scripts
_ALPHA = re.compile(r"(?P<module>.+?)(?:\.lora|\.lora_linear_layer)?\.alpha")


def evidence(listing: Listing) -> Evidence | None:
    """Look for the metadata, for components in front of the names, and for the names of diffusers' models."""
    name = _file(listing)
    header = listing.header(name) if name else None
    if name is None or header is None:
        return Evidence(60, f"the file is called {name}") if name == f"{_STEM}.bin" else None
    splits = [at for tensor in header.tensors if (at := _split(tensor)) and "." in at[0] and at[1] != _ALPHA_PART]
    with_component = sum(1 for module, _ in splits if component(module))
    if _KEY in header.metadata and splits:
        return Evidence(95, f"the header of {name} has {_KEY}, and {len(splits)} tensors have names of diffusers")
    if with_component:
        return Evidence(70, f"{with_component} of the tensors in {name} begin with a component, such as {splits[0][0]}")
    if any(module.startswith(keys.PREFIX) for module, _ in splits):  # PEFT's: the families' tables stay unread
        return None
    known = sum(1 for module, _ in splits if module.partition(".")[0] in MODEL_LEVEL)
    if known or any(each.naming == "diffusers" for each in readings.fitting({module for module, _ in splits})):
        known = known or len(splits)
        return Evidence(55, f"{known} of the tensors in {name} have names of diffusers' models, such as {splits[0][0]}")
    return None


def read(listing: Listing) -> Adapter:
    """Read an adapter; the scaling is that of the header's config, else alpha/r of alpha tensors or the header, else 1.

    Raises `BadFile` for names of no known spelling and for what contradicts the header's config, `UnsupportedAdapter`
    for parts of no known kind.
    """
    name = _file(listing)
    if name is None:
        raise BadFile(f"{listing.path}: no {_STEM}.safetensors or {_STEM}.bin in this folder")
    draft = Draft(listing.path, alpha=listing.alpha)
    for tensor, lazy in listing.tensors(name).items():
        module_and_part = _split(tensor)
        if module_and_part is None:
            draft.faults.append(f"{tensor}: no name that diffusers gives to a part of an adapter")
        elif module_and_part[1] == _ALPHA_PART:
            draft.alphas[module_and_part[0]] = read_number(lazy, f"{listing.folder / name}: {tensor}")
        else:
            draft.add(*module_and_part, lazy, tensor)
    draft.check()
    configs = _configs(listing, name, {component(module) for module in draft.groups})
    header = listing.header(name)
    configured = frozenset(module for module in draft.groups if component(module) in configs)
    _usual(draft, configured)
    alphas.fill(draft, header.metadata if header else {}, apart=configured)

    def rule(module: str, rank: int) -> tuple[float, float]:
        if module not in configured:
            return draft.usual(module, rank)
        scaling, alpha = configs[component(module)].rule(inside(module), rank)
        if draft.alpha is None and draft.alphas.get(module, alpha) != alpha:
            raise ValueError(f"its tensor of alpha holds {draft.alphas[module]:g}, the header's config says {alpha:g}")
        return scaling, alpha

    updates = draft.build(rule)
    settings = settings_with(header.metadata if header else {}, lambda key: key not in (_KEY, "format"))
    base = next((config.base for config in configs.values() if config.base), None)
    return Adapter(updates, base=base, dialect="diffusers", settings=settings)


def _usual(draft: Draft, configured: frozenset[str]) -> None:
    """Give a transformer's modules without alpha the one that most of its others have, as diffusers does; say so.

    Of a UNet or a text encoder diffusers reads no alphas: it refuses the file, or applies 1. Those are told.
    """
    found = {module: alpha for module, alpha in draft.alphas.items() if module not in configured}
    if draft.alpha is not None or not found:
        return
    unread = sorted(module for module in found if component(module) not in ("", _TRANSFORMER))
    if unread:
        warned(
            "%s: the scale of %s is that of its tensors of alpha; diffusers applies 1 or refuses the file, for it "
            "reads no alphas of a %s under these names", draft.path, some(unread), component(unread[0]),
        )  # fmt: skip
    known = [alpha for module, alpha in found.items() if component(module) == _TRANSFORMER]
    missing = sorted(
        module for module in draft.groups.keys() - draft.alphas.keys() - configured if component(module) == _TRANSFORMER
    )
    if known and missing:
        alpha = Counter(known).most_common()[0][0]
        draft.alphas |= dict.fromkeys(missing, alpha)
        warned(
            "%s: no tensor holds the alpha of %s; %g is taken, that of most others, as diffusers does",
            draft.path, some(missing), alpha,
        )  # fmt: skip


def losses(adapter: Adapter) -> list[Loss]:
    """List what diffusers has no words for; it has patterns in the header for ranks and scalings that differ."""
    adapter = _renamed(adapter)
    lost = update_losses(adapter, "diffusers", ("lora", "dora", "conv"), (A, B, BIAS, MAGNITUDE))
    sayable = without(adapter, lost).updates
    with_component = any(component(module) for module in sayable)
    for part, what in ((MAGNITUDE, "no magnitude, and use_dora"), (BIAS, "no bias of B, and lora_bias")):
        having = {component(module) for module, update in sayable.items() if part in update.parts}
        lost += [
            Loss(module, f"it has {what} is one switch for all modules of a component")
            for module, update in sorted(sayable.items())
            if component(module) in having and part not in update.parts
        ]
    original = [module for module in sorted(sayable) if module.startswith((f"{groups.ORIGINAL}.", "text_encoders."))]
    undecided = rename.undecided(adapter, "diffusers")
    lost += [Loss(module, undecided.get(module, "diffusers' name of it is not known")) for module in original]
    sayable = {module: update for module, update in sayable.items() if not module.startswith(f"{groups.ORIGINAL}.")}
    if with_component:
        lost += [Loss(module, "it begins with no component") for module in sorted(sayable) if not component(module)]
    return lost + common_losses(adapter, "diffusers")


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write the current spelling, with each component's LoraConfig in the header so that no scale is lost."""
    adapter = left(_renamed(adapter), losses(adapter), target)
    tensors = {
        f"{module}.{part}": lazy for module, update in adapter.updates.items() for part, lazy in update.parts.items()
    }
    metadata = carried(adapter, tensors, _KEY, "format")
    configs: dict[str, Any] = {}
    for name in sorted({component(module) for module in adapter.updates}):
        prefix = f"{name}." if name else ""
        configs |= {prefix + field: value for field, value in _config(adapter, name).items()}
    metadata |= {"format": "pt", _KEY: json.dumps(configs, indent=2, sort_keys=True)}
    scaled = sorted(module for module, update in adapter.updates.items() if update.scaling != 1)
    if scaled:  # tensors of alpha beside the header's config are refused by diffusers
        warned(
            "%s: the scale of %s (%g, %s) stands in the header's %s alone, where diffusers 0.34 and later read it; "
            "ComfyUI and older diffusers take it for 1: --to comfy or --to kohya writes what they read",
            target, counted(len(scaled), "module"), adapter.updates[scaled[0]].scaling, scaled[0], _KEY,
        )  # fmt: skip
    save.save(target, f"{_STEM}.safetensors", tensors, metadata, force=force)
    return adapter


def _renamed(adapter: Adapter) -> Adapter:
    """Return the adapter under diffusers' names; one that diffusers wrote without components stays without them."""
    return rename.to_diffusers(adapter if adapter.dialect == "diffusers" else rename.spelled_out(adapter))


@lru_cache(maxsize=1 << 16)  # the next adapter has the same names
def _split(name: str) -> tuple[str, str] | None:
    """Return (module with its component, PEFT's part or `_ALPHA_PART`), or None for a name of no known spelling.

    >>> _split("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight")
    ('unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0', 'lora_B.weight')
    >>> _split("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight")
    ('text_encoder.text_model.encoder.layers.0.self_attn.q_proj', 'lora_A.weight')
    """
    name = with_component(_PEFT.sub(r"\1.", name))
    if match := _PROCESSOR.fullmatch(name):
        at = match["at"].removesuffix(".processor")
        names = _CLIP if at.endswith(".self_attn") else _OUT
        return f"{at}.{names.get(match['name'], match['name'])}", _DOWN_UP[match["side"]]
    if match := _MAGNITUDE.fullmatch(name):
        return match["module"], "lora_magnitude_vector"
    if match := _CURRENT.fullmatch(name):
        part = f"{match['part']}.{match['what']}"
    elif match := _OLD.fullmatch(name):
        part = _DOWN_UP[match["side"]]
    elif match := _ALPHA.fullmatch(name):
        part = _ALPHA_PART
    return (match["module"].replace(".processor", ""), part) if match else None


def _file(listing: Listing) -> str | None:
    if listing.single:
        return listing.files[0] if listing.weights else None
    called = [name for name in (f"{_STEM}.safetensors", f"{_STEM}.bin") if name in listing.files]
    return called[0] if called else listing.weights[0] if len(listing.weights) == 1 else None


def _configs(listing: Listing, name: str, components: set[str]) -> dict[str, PeftConfig]:
    """Return the LoraConfig of each component that the header has one for.

    A config under a component's name also is that of tensors without one, where there is no other for them. Warns of
    configs without tensors.
    """
    header = listing.header(name)
    text = header.metadata.get(_KEY) if header else None
    if text is None:
        return {}
    path = listing.folder / name
    by_component: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in parse_json_object(text.encode(), path).items():
        by_component[component(key)][key.removeprefix(f"{component(key)}.") if component(key) else key] = value
    if components == {""} and "" not in by_component and len(by_component) == 1:
        by_component = {"": next(iter(by_component.values()))}
    if unused := sorted(by_component.keys() - components):
        shown = ", ".join(name or "a model without a component's name" for name in unused)
        warned("%s: %s has a config of %s, and there are no tensors for it", path, _KEY, shown)
    return {
        name: PeftConfig.parse(by_component[name], path, alpha=listing.alpha)
        for name in sorted(components & by_component.keys())
    }


def _config(adapter: Adapter, name: str) -> dict[str, Any]:
    """Return the LoraConfig of one component."""
    own = {inside(module): update for module, update in adapter.updates.items() if component(module) == name}
    config = derive_config(replace(adapter, updates=own, replacements={}, settings={}))
    if name.startswith("text_encoder"):
        # transformers 5 took the level `text_model` out of CLIP; unanchored and without it a name fits both.
        config["target_modules"] = [module.removeprefix("text_model.") for module in config["target_modules"]]
        for field in ("rank_pattern", "alpha_pattern"):
            bare = {key: key.removeprefix("^").removeprefix(r"text_model\.") for key in config[field]}
            config[field] = {bare[key]: value for key, value in config[field].items()}
    return config
