"""An adapter of an image model under diffusers' module names, or under the original implementation's.

Modules of no known family keep their names, and so do those of which several families could be right that lead to
different names; a dialect without a name for them lists them as losses.
"""

from __future__ import annotations

import re
from dataclasses import replace

from loratools.adapter.fusing import products
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image import one_file, readings
from loratools.adapter.naming.image.components import component
from loratools.adapter.naming.image.groups import ORIGINAL, Reader, component_of, groups, module_of
from loratools.adapter.naming.image.translate import Fusing, translated

_CLIP = re.compile(r"^(text_encoder(?:_[23])?)\.encoder\.layers\.")


def spelled_out(adapter: Adapter) -> Adapter:
    """Return the adapter with the component before every module, and `text_model` in CLIP's names.

    `save_lora_adapter` of diffusers, and PEFT, leave the component out. The families that fit tell it, unless they have
    several. transformers 5 took `text_model` out; checkpoints and kohya keep it. Names of a checkpoint in one file
    (`model.diffusion_model.`) become those that adapters have.
    """
    adapter = one_file.renamed(adapter)
    bare = {m for m in adapter.updates if not component(m) and not m.startswith((f"{ORIGINAL}.", "text_encoders."))}
    fits = readings.fitting(map(module_of, bare)) if bare else []
    found = {component_of(reading, map(module_of, bare)) for reading in fits}
    prefix = f"{found.pop()}." if len(found) == 1 else ""
    updates = {prefix + module if module in bare else module: update for module, update in adapter.updates.items()}
    updates = {_CLIP.sub(r"\1.text_model.encoder.layers.", module): update for module, update in updates.items()}
    return replace(adapter, updates=updates) if len(updates) == len(adapter.updates) else adapter


def to_diffusers(adapter: Adapter, *, by: Fusing = products) -> Adapter:
    """Return the adapter with `unet.` and `transformer.` names; `by` takes projections apart and fuses them."""
    return _renamed(one_file.renamed(adapter), "diffusers", by)


def to_original(adapter: Adapter, *, reader: Reader = "comfy", by: Fusing = products) -> Adapter:
    """Return the adapter under the names that a reader of the original's wants: ComfyUI, or kohya's trainers.

    Most families have `diffusion_model.` names there; some are read under diffusers'. `by` takes projections apart and
    fuses them.
    """
    return _renamed(spelled_out(adapter), reader, by)


def undecided(adapter: Adapter, reader: Reader) -> dict[str, str]:
    """Return module -> a sentence, for each whose names several families have that this reader knows by others."""
    return {
        group.prefix + name: f"its name is one of {readings.summaries(group.readings)}, which differ from there on; "
        "a base model (--base) tells"
        for group in groups(adapter)
        if len(group.decided(reader)) > 1
        for name in group.updates
    }


def _renamed(adapter: Adapter, reader: Reader, by: Fusing) -> Adapter:
    renamed: list[dict[str, Update]] = []
    of_group: dict[str, int] = {}
    for group in groups(adapter):
        decided = group.decided(reader)
        if len(decided) == 1:
            reading, to, prefix = decided[0]
            updates = translated(group, reading, to, prefix, by, lambda _: None)
            own = {group.prefix + name for name in group.updates}
            if not updates.keys() & (adapter.updates.keys() - own).union(*renamed):  # two modules would become one
                of_group |= dict.fromkeys(own, len(renamed))
                renamed.append(updates)
    updates, emitted = {}, set[int]()
    for module, update in adapter.updates.items():
        number = of_group.get(module)
        if number is None:
            updates[module] = update
        elif number not in emitted:
            updates |= renamed[number]
            emitted.add(number)
    return replace(adapter, updates=updates)
