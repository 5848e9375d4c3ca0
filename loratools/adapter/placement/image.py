"""An adapter of an image model under the names of a base: a pipeline's, one component's of it, or one whole file's.

    pipeline folder    unet.down_blocks.…   transformer.…   text_encoder.…   text_encoder_2.…
    component folder   down_blocks.…        text_model.encoder.…
    one file           model.diffusion_model.input_blocks.…   cond_stage_model.transformer.…   conditioner.embedders.1.…

The UNet or transformer is renamed as a whole (`naming/image/rename.py`), the text encoders module by module. OpenCLIP,
the text encoder of Stable Diffusion 2 and the second one of SDXL, has names of its own in one file, and q, k, v in one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from loratools.adapter.fusing import rows
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image import architectures, rename
from loratools.adapter.naming.image.components import COMPONENTS
from loratools.adapter.naming.image.flux import is_original
from loratools.adapter.naming.image.rename import ORIGINAL
from loratools.adapter.naming.wrappers import Names
from loratools.storage.checkpoint import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]

_ROOTS = ("model.diffusion_model.", f"{ORIGINAL}.", "")
# Where one file keeps each text encoder: that of the original repositories, that of ComfyUI, or the encoder alone.
_ENCODERS: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("text_encoder.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.",
                     "text_encoders.clip_l.transformer.", ""),
    "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer.", ""),
    "text_encoder_3": ("text_encoder_3.", "text_encoders.t5xxl.transformer.", ""),
}  # fmt: skip
_OPEN_CLIP: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("cond_stage_model.model.",),
    "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
}
_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.(.+)")
_OPEN_CLIP_LAYER = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def for_base(adapter: Adapter, shapes: Shapes) -> Adapter:
    """Return the adapter under the names of a base, whose tensors have these shapes.

    Modules without a known name in the base keep theirs, and the resolver reports them.
    """
    whole = rename.spelled_out(adapter)
    candidates = (_named(naming, shapes) for naming in _namings(whole, shapes))
    best = max(candidates, key=lambda candidate: sum(f"{module}.weight" in shapes for module in candidate))
    replacements = {  # where only the root differs
        next((spelling for spelling in _spellings(path) if spelling in shapes), path): lazy
        for path, lazy in adapter.replacements.items()
    }
    return replace(adapter, updates=_open_clip(best, shapes), replacements=replacements)


def _namings(adapter: Adapter, shapes: Shapes) -> Iterator[Adapter]:
    yield adapter
    yield rename.to_diffusers(adapter, by=rows)
    model = {name.removesuffix(".weight").removeprefix(root): shape for name, shape in shapes.items()
             for root in _ROOTS if name.startswith(root) and name.endswith(".weight")}  # fmt: skip
    xl = any(name.startswith(("output_blocks.0.1.", "label_emb.")) for name in model)
    known = set(architectures.get("flux-original").by_flat.values())
    is_flux = "double_blocks.0.img_mod.lin" in model and is_original(
        {name: shape for name, shape in model.items() if name in known}
    )
    yield rename.to_original(adapter, xl=xl, is_flux=is_flux or None, by=rows)


def _named(adapter: Adapter, shapes: Shapes) -> dict[str, Update]:
    """Return the updates under the base's names of their modules, where it has one; no two get the same name."""
    names = {module: module for module in adapter.updates if _held(module, shapes)}
    taken = set(adapter.updates)
    for module in adapter.updates.keys() - names.keys():
        free = (spelling for spelling in _spellings(module) if _held(spelling, shapes) and spelling not in taken)
        names[module] = next(free, module)
        taken.add(names[module])
    return {names[module]: update for module, update in adapter.updates.items()}


def _held(module: str, shapes: Shapes) -> bool:
    """Tell whether a base has the weight of a module, or is what a bias that changes alone is called."""
    return f"{module}.weight" in shapes or (module.endswith(".bias") and module in shapes)


def _spellings(module: str) -> Iterator[str]:
    """Yield what a base may call a module, the likeliest first."""
    component, _, rest = module.partition(".")
    if component in _ENCODERS:
        # transformers 5 took the level `text_model` out of CLIP, in memory and on disk.
        bare = rest.removeprefix("text_model.")
        for root in _ENCODERS[component]:
            yield from (f"{root}{rest}", f"{root}{bare}", f"{root}text_model.{bare}")
    elif component == ORIGINAL:
        yield from (f"{root}{rest}" for root in (*_ROOTS, "transformer."))
    elif component in COMPONENTS:
        yield rest


def _open_clip(updates: Mapping[str, Update], shapes: Shapes) -> dict[str, Update]:
    """Return the updates with those of text encoders under OpenCLIP's names, where the base has an OpenCLIP."""
    renamed: dict[str, Update] = {}
    fused: dict[str, dict[int, tuple[str, Update]]] = defaultdict(dict)
    for module, update in updates.items():
        component, _, rest = module.partition(".")
        match = _LAYER.fullmatch(rest)
        layers = [f"{root}transformer.resblocks.{match[1]}." for root in _OPEN_CLIP.get(component, ())] if match else []
        layer = next((root for root in layers if f"{root}attn.in_proj_weight" in shapes), None)
        if not match or layer is None or f"{module}.weight" in shapes:
            renamed[module] = update
        elif match[2] in _PROJECTIONS:
            fused[f"{layer}attn"][_PROJECTIONS.index(match[2])] = module, update
        else:
            renamed[layer + _OPEN_CLIP_LAYER[match[2]] if match[2] in _OPEN_CLIP_LAYER else module] = update
    for name, parts in fused.items():
        width = shapes[f"{name}.in_proj_weight"][0] // 3
        renamed |= rename.together(name, parts, (width,) * 3, rows)
    return renamed


def named_for(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter of an image model under the module names of a base: a pipeline's, a component's, or a file's.

    Takes fused projections apart, or fuses them, where the base stores them so. Adapters of other models, and modules
    without a known name in the base, keep their names.
    """
    names = Names(base.specs)
    if all(names.find(module) for module in adapter.updates):  # most adapters; what follows takes time to import
        return adapter
    return for_base(adapter, {name: spec.shape for name, spec in base.specs.items()})
