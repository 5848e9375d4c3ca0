"""An adapter of an image model under diffusers' module names, or under the original implementation's.

Modules that neither table has keep their names; a dialect without a name for them lists them as losses.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from loratools.adapter.fusing import products
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image import architectures, flux, stable_diffusion
from loratools.adapter.naming.image.components import component

ORIGINAL = "diffusion_model"
"""ComfyUI's name for the image model of a checkpoint: the component of all modules with the original's names."""

_LISTED = ("unet", "transformer", ORIGINAL)
_CLIP = re.compile(r"^(text_encoder(?:_[23])?)\.encoder\.layers\.")
_SAME = ("transformer_blocks.", "img_in", "txt_in", "time_text_embed.", "norm_out.", "proj_out")


Parts = Mapping[int, tuple[str, Update]]


class Fusing(Protocol):
    """How to take fused projections apart and to fuse them: the functions of `fusing/products.py`, or of `rows.py`."""

    def apart(self, update: Update, sizes: Sequence[int]) -> list[Update | None]:
        """Return the updates of consecutive blocks of output features."""
        ...

    def together(self, blocks: Sequence[Update | None], sizes: Sequence[int]) -> Update:
        """Return one update of the consecutive blocks."""
        ...

    def swapped(self, update: Update) -> Update:
        """Return the update with the two halves of its output features swapped."""
        ...


def spelled_out(adapter: Adapter) -> Adapter:
    """Return the adapter with the component before every module, and `text_model` in CLIP's names.

    `save_lora_adapter` of diffusers, and PEFT, leave the component out. The lists of known models tell it, unless lists
    of several components have all the names. transformers 5 took `text_model` out; checkpoints and kohya keep it.
    """
    bare = {m for m in adapter.updates if not component(m) and not m.startswith((f"{ORIGINAL}.", "text_encoders."))}
    components = {architecture.component for architecture in architectures.knowing(bare, _LISTED)} if bare else set()
    prefix = f"{components.pop()}." if len(components) == 1 else ""
    updates = {prefix + module if module in bare else module: update for module, update in adapter.updates.items()}
    updates = {_CLIP.sub(r"\1.text_model.encoder.layers.", module): update for module, update in updates.items()}
    return replace(adapter, updates=updates) if len(updates) == len(adapter.updates) else adapter


def to_diffusers(adapter: Adapter, *, by: Fusing = products) -> Adapter:
    """Return the adapter with `unet.` and `transformer.` names; fused projections of Flux become single ones."""
    updates: dict[str, Update] = {}
    original = {module.removeprefix(f"{ORIGINAL}."): update.shape for module, update in adapter.updates.items()
                if module.startswith(f"{ORIGINAL}.")}  # fmt: skip
    is_flux = flux.is_original(original)
    for module, update in adapter.updates.items():
        first, _, name = module.partition(".")
        if first == ORIGINAL and (sd := stable_diffusion.to_diffusers(name)):
            updates[f"unet.{sd}"] = update
        elif first == ORIGINAL and is_flux and (names := flux.to_diffusers(name)):
            updates |= _apart(module, name, update, names, by)
        else:
            updates[module] = update
    return replace(adapter, updates=updates)


def to_original(
    adapter: Adapter, *, unet: bool = True, xl: bool | None = None, is_flux: bool | None = None, by: Fusing = products
) -> Adapter:
    """Return the adapter with `diffusion_model.` names; Flux's single projections become fused ones.

    `unet` renames Stable Diffusion too; kohya's files have it under diffusers' names. `xl` and `is_flux` say whether
    the model is SDXL or Flux.1, if a base tells it; by default the adapter's own names tell. `by` takes projections
    apart and fuses them.
    """
    adapter = spelled_out(adapter)
    xl = stable_diffusion.is_xl(adapter.updates) if xl is None else xl
    qwen = any(".img_mlp." in module or ".txt_mlp." in module for module in adapter.updates)
    transformer = [name for module in adapter.updates if (name := module.removeprefix("transformer.")) != module]
    base = (adapter.base.id if adapter.base else None) or ""
    is_flux = bool(transformer) and flux.is_diffusers(transformer, base) if is_flux is None else is_flux
    updates: dict[str, Update] = {}
    fused: dict[str, dict[int, tuple[str, Update]]] = defaultdict(dict)
    for module, update in adapter.updates.items():
        first, _, name = module.partition(".")
        original = flux.to_original(name) if first == "transformer" and is_flux else None
        if first == "unet" and unet and (sd := stable_diffusion.to_original(name, xl=xl)):
            updates[f"{ORIGINAL}.{sd}"] = update
        elif first == "transformer" and qwen and name.startswith(_SAME) and unet:
            updates[f"{ORIGINAL}.{name}"] = update
        elif original and original[1] is not None:
            fused[original[0]][original[1]] = module, update
        elif original:
            updates |= _renamed(module, f"{ORIGINAL}.{original[0]}", original[0], update, by)
        else:
            updates[module] = update
    for name, parts in fused.items():
        width = next(iter(parts.values()))[1].shape[1]
        updates |= together(f"{ORIGINAL}.{name}", parts, flux.sizes(flux.to_diffusers(name), width), by)
    return replace(adapter, updates=updates)


def _apart(module: str, name: str, update: Update, names: Sequence[str], by: Fusing) -> dict[str, Update]:
    if len(names) == 1:
        return _renamed(module, f"transformer.{names[0]}", name, update, by)
    try:
        blocks = by.apart(update, flux.sizes(names, update.shape[1]))
    except ValueError:
        return {module: update}
    return {f"transformer.{part}": block for part, block in zip(names, blocks, strict=True) if block is not None}


def together(name: str, parts: Parts, sizes: Sequence[int], by: Fusing) -> dict[str, Update]:
    """Return the parts of a fused weight as its one update, or under their own names where that cannot be.

    `parts` are (module, update) by their place in the weight, `sizes` the output features of all places.
    """
    blocks = [parts[i][1] if i in parts else None for i in range(len(sizes))]
    apart = dict(parts.values())
    try:
        fits = all(update.shape[0] == sizes[i] for i, (_, update) in parts.items())
        return {name: by.together(blocks, sizes)} if fits else apart
    except ValueError:
        return apart


def _renamed(old: str, new: str, original: str, update: Update, by: Fusing) -> dict[str, Update]:
    if original not in flux.SWAPPED:
        return {new: update}
    try:
        return {new: by.swapped(update)}
    except ValueError:
        return {old: update}
