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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loratools.adapter.fusing import rows
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image import families, readings, rename
from loratools.adapter.naming.image.components import COMPONENTS
from loratools.adapter.naming.image.families import Naming
from loratools.adapter.naming.image.groups import ORIGINAL, Group, groups, home
from loratools.adapter.naming.image.models import MODELS, ROOTS, inside
from loratools.adapter.naming.image.readings import Lead, Reading
from loratools.adapter.naming.image.translate import together, translated
from loratools.adapter.naming.wrappers import Names
from loratools.errors import IncompatibleAdapter, counted
from loratools.storage.checkpoint import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]

# Where one file keeps each text encoder: that of the original repositories, that of ComfyUI, or the encoder alone.
_ENCODERS: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("text_encoder.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.",
                     "text_encoders.clip_l.transformer.", "text_encoders.qwen3_06b.transformer.model.", ""),
    "text_encoder_2": ("text_encoder_2.", "text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer.", ""),
    "text_encoder_3": ("text_encoder_3.", "text_encoders.t5xxl.transformer.", ""),
}  # fmt: skip
_OPEN_CLIP: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("cond_stage_model.model.",),
    "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
}
_COMFY_ENCODER = re.compile(r"text_encoders\.\w+\.transformer\.(.+)")
_LANGUAGE = ("model.", "model.language_model.", "language_model.model.", "language_model.", "")
"""What a language model, which may be a text encoder, has before its layers; trainers name them with and without."""

_LAYER = re.compile(r"(?:text_model\.)?encoder\.layers\.(\d+)\.(.+?)(\.bias)?")
_OPEN_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}  # fmt: skip
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def for_base(adapter: Adapter, shapes: Shapes) -> Adapter:
    """Return the adapter under the names of a base, whose tensors have these shapes.

    Modules without a known name in the base keep theirs, and the resolver reports them. Raises `IncompatibleAdapter`
    where names lead to this base in several ways, by the families that have them.
    """
    whole = rename.spelled_out(adapter)
    updates = dict(whole.updates)
    for group in groups(whole):
        modules = [group.prefix + name for name in group.updates]
        if group.fits and any(_spelled(module, shapes) is None for module in modules):
            for module in modules:
                del updates[module]
            updates |= _translated(group, shapes)
    replacements = {  # where only the root differs
        next((spelling for spelling in _spellings(path) if spelling in shapes), path): lazy
        for path, lazy in adapter.replacements.items()
    }
    named = _named(replace(whole, updates=updates), shapes)
    return replace(adapter, updates=_open_clip(named, shapes), replacements=replacements)


@dataclass(frozen=True, slots=True)
class _Way:
    """A way for a group's names to lead into a base: their reading, the naming there, and what stands before it."""

    reading: Reading
    to: Naming
    root: str
    places: Mapping[str, tuple[Lead, tuple[str | None, ...]]]

    @classmethod
    def of(cls, group: Group, reading: Reading, to: Naming, shapes: Shapes) -> _Way:
        """Look up every name that the group's lead to; None for one that the base lacks."""
        own = home(group.prefix, reading.family)
        root = f"{ORIGINAL}." if to == "original" else own
        return cls(reading, to, root, {
            module: (lead, tuple(_spelled(root + name, shapes) for name in lead.names))
            for module, lead in group.leads(reading, to).items()
        })  # fmt: skip

    @property
    def held(self) -> int:
        """How many modules the base has."""
        return sum(None not in names for _, names in self.places.values())

    @property
    def outcome(self) -> list[object]:
        """Where each module lands in the base, without what families may differ in and the base does not."""
        return [
            (names, lead.part, lead.swapped, lead.swapped_if) if None not in names else None
            for lead, names in self.places.values()
        ]


def _translated(group: Group, shapes: Shapes) -> dict[str, Update]:
    """Return a group's updates by the way on which the base has the most of them.

    Where a base has the original's names of another family that diffusers' names lead to as well (ComfyUI repacks some
    models), the way is by those.
    """
    ways = _best(group, shapes)
    if not ways or ways[0].held < len(group.updates):
        for reading in group.fits if group.prefix == f"{ORIGINAL}." else ():
            ours = translated(group, reading, "diffusers", home(group.prefix, reading.family), rows, lambda _: None)
            if len(parts := groups(Adapter(ours))) == 1 and parts[0].prefix != group.prefix:
                through = _best(parts[0], shapes)
                if through and through[0].held == len(parts[0].updates):
                    group, ways = parts[0], through
                    break
    if not ways:
        return {group.prefix + name: update for name, update in group.updates.items()}
    if len(_outcomes(ways)) > 1:
        names = readings.summaries(way.reading for way in ways)
        raise IncompatibleAdapter(
            f"the names of {len(group.updates)} modules, such as {group.prefix}{next(iter(group.updates))}, lead to "
            f"this base in several ways: they are those of {names}",
            hint="Convert the adapter to the naming of the base first, where its family is known.",
        )

    def width(module: str) -> int | None:
        spelling = _spelled(module, shapes)
        return None if spelling is None else shapes.get(f"{spelling}.weight", (0,))[0] or None

    return translated(group, ways[0].reading, ways[0].to, ways[0].root, rows, width)


def _best(group: Group, shapes: Shapes) -> list[_Way]:
    """Return the ways on which a base has the most modules of a group; by its other modules where those differ."""
    ways = [_Way.of(group, reading, to, shapes) for reading in group.fits for to in readings.NAMINGS]
    best = max((way.held for way in ways), default=0)
    ways = [way for way in ways if way.held == best]
    if not best:
        return []
    if len(_outcomes(ways)) > 1:
        stored = inside(shapes, group.prefix)
        there = {id(way): Reading(way.reading.name, way.to) for way in ways}
        known = {id(way): sum(there[id(way)].find(module) is not None for module in stored) for way in ways}
        ways = [way for way in ways if known[id(way)] == max(known.values())]
        told = readings.told([there[id(way)] for way in ways], stored)
        ways = [way for way in ways if there[id(way)] in told]
    return ways


def _outcomes(ways: Sequence[_Way]) -> list[list[object]]:
    """Return what the ways lead to, each outcome once."""
    outcomes: list[list[object]] = []
    for way in ways:
        outcomes += [way.outcome] if way.outcome not in outcomes else []
    return outcomes


def _spelled(module: str, shapes: Shapes) -> str | None:
    """Return the base's name of a module, None where it has none."""
    return next((name for name in (module, *_spellings(module)) if _held(name, shapes)), None)


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
    """Tell whether a base has the weight of a module, or is what a parameter that changes alone is called."""
    return f"{module}.weight" in shapes or module in shapes or f"{module}.in_proj_weight" in shapes


def _spellings(module: str) -> Iterator[str]:
    """Yield what a base may call a module, the likeliest first."""
    component, _, rest = module.partition(".")
    if component in _ENCODERS:
        # transformers 5 took the level `text_model` out of CLIP, in memory and on disk.
        bare = rest.removeprefix("text_model.")
        for root in _ENCODERS[component]:
            yield from (f"{root}{rest}", f"{root}{bare}", f"{root}text_model.{bare}")
            yield from _in_language_model(root, rest)
    elif match := _COMFY_ENCODER.fullmatch(module):  # of a family that its file does not tell
        for root in ("", *(f"{encoder}." for encoder in _ENCODERS)):
            yield f"{root}{match[1]}"
            yield from _in_language_model(root, match[1])
    elif component == ORIGINAL:
        yield from (f"{root}{rest}" for root in (*ROOTS, *MODELS))
    elif component in COMPONENTS:
        yield from (rest, *(f"{root}{rest}" for root in ROOTS if root))


def _in_language_model(root: str, rest: str) -> Iterator[str]:
    """Yield what a language model behind a root may call a module of its layers."""
    level = next((level for level in _LANGUAGE if rest.startswith(f"{level}layers.")), None)
    if level is not None:
        yield from (f"{root}{other}{rest.removeprefix(level)}" for other in _LANGUAGE)


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
            name = f"{layer}attn.in_proj_bias" if match[3] else f"{layer}attn"
            fused[name][_PROJECTIONS.index(match[2])] = module, update
        else:
            inside = _OPEN_CLIP_LAYER.get(match[2])
            renamed[f"{layer}{inside}{match[3] or ''}" if inside else module] = update
    for name, parts in fused.items():
        width = shapes[f"{name.removesuffix('.in_proj_bias')}.in_proj_weight"][0] // 3
        renamed |= together(name, parts, (width,) * 3, rows)
    return renamed


def named_for(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter of an image model under the module names of a base: a pipeline's, a component's, or a file's.

    Takes fused projections apart, or fuses them, where the base stores them so. Adapters of other models, and modules
    without a known name in the base, keep their names. Raises `IncompatibleAdapter` where names lead to a base in
    several ways, or to rows that may lie in another order.
    """
    names = Names(base.specs, base.config)
    known = sum(bool(names.find(module)) for module in adapter.updates)
    named = adapter
    if known < len(adapter.updates):  # else, as for most adapters: what follows takes time to import
        shapes = {name: spec.shape for name, spec in base.specs.items()}
        renamed = for_base(adapter, shapes)
        # Language models have names that families of image models have too (`layers.0.self_attn.q_proj`).
        if sum(_held(m, shapes) for m in renamed.updates) > known or renamed.replacements != adapter.replacements:
            named = renamed
    if len(base.shards) > 1 and names.loaded is None:
        _refuse_by_heads(named, base)
    return named


def _refuse_by_heads(adapter: Adapter, base: Checkpoint) -> None:
    """Raise `IncompatibleAdapter` for fused rows that lie by heads in shards: adapters have them stacked."""
    bare = {m: next(m.removeprefix(root) for root in ROOTS if m.startswith(root)) for m in adapter.updates}
    for name, family in families.every():
        marks = [f"{pattern}.weight" for pattern in family.renames if "{}" not in pattern]
        if not family.by_heads or not any(all(root + mark in base.specs for mark in marks) for root in ROOTS):
            continue
        found = {module: Reading(name, "original").find(own) for module, own in bare.items()}
        hit = [module for module, way in found.items() if way is not None and way[0] in family.by_heads]
        if hit:
            raise IncompatibleAdapter(
                f"{base.path}: {counted(len(hit), 'module')}, such as {hit[0]}: q, k and v of each head in turn in "
                f"shards of {family.summary}, and an adapter has all q, all k, all v; no shape tells which these are",
                hint="Merge into the model as diffusers has it, or into one file.",
            )
