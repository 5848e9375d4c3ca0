"""Files of kohya-ss sd-scripts and LyCORIS: read into an `Adapter`, and written from one."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from struct import pack

from loratools.adapter import factors, kinds
from loratools.adapter.kinds import Update
from loratools.adapter.kinds.full import BIAS_PART, WEIGHT_PART
from loratools.adapter.kinds.locon import MID_PART
from loratools.adapter.model import Adapter, BaseIdentity, Loss
from loratools.adapter.naming.image import groups, rename
from loratools.adapter.naming.image.readings import summaries
from loratools.adapter.parts import BIAS, MAGNITUDE, A, B
from loratools.decisions import warned
from loratools.dialects._frame import alphas, pickles
from loratools.dialects._frame.build import Draft, some
from loratools.dialects._frame.listing import Evidence, Listing, by_convert
from loratools.dialects._frame.losses import common_losses, left
from loratools.dialects._frame.metadata import OF_BYTES, carried, metadata_of, settings_with
from loratools.dialects._frame.numbers import is_float, read_number
from loratools.dialects.kohya import network, rotations
from loratools.dialects.kohya.beside import MODULATION, MODULATION_PART, Beside, take_apart
from loratools.dialects.kohya.names import NAMES_KEY, dotted, flattened, head_of
from loratools.errors import BadFile, counted
from loratools.format import keys
from loratools.storage import save
from loratools.storage.lazy import LazyTensor
from loratools.storage.sources import remember, remembered

_FILE = "lora.safetensors"
_SUFFIXES = {A: "lora_down.weight", B: "lora_up.weight"}
_PARTS = {suffix: part for part, suffix in _SUFFIXES.items()} | {
    "lora_up.bias": BIAS, "lora_magnitude_vector.weight": MAGNITUDE, "magnitude": MAGNITUDE,
}  # fmt: skip
_ALPHA, _DORA = "alpha", "dora_scale"
_IMAGE_MODELS = (groups.ORIGINAL, "transformer", "transformer_2")
_SHORT = ("F16", "BF16")
_BIASED = frozenset({A, B, MAGNITUDE, _DORA})  # beside what a bias of B can be


def evidence(listing: Listing) -> Evidence | None:
    """Look for kohya's prefixes in the names, and for `ss_network_module` in the header."""
    name = listing.only(".safetensors")
    header = listing.header(name) if name else None
    if name is None or header is None:
        return pickles.evidence(listing, 75, head_of)
    flattened_names = [tensor for tensor in header.tensors if head_of(tensor)]
    if not flattened_names:
        return None
    module = header.metadata.get("ss_network_module")
    trainer = f"the header of {name} names {module}, and " if module else ""
    flat = f"{len(flattened_names)} tensors have flattened names, such as {flattened_names[0]}"
    return Evidence(90 if module else 75, trainer + flat)


def read(listing: Listing) -> Adapter:
    """Read an adapter, and look up each flattened name: in the file, the base, or the families of image models.

    Raises `BadFile` with all names that kohya does not write, that no list has, or that have two readings, and
    `UnsupportedAdapter` for parts of no known kind.
    """
    name = listing.only(".safetensors") or pickles.file_of(listing)
    if name is None:
        raise BadFile(f"{listing.path}: expected one safetensors file, or one file of torch.save, in this folder")
    header = listing.header(name)
    metadata = dict(header.metadata) if header else {}
    flat: dict[tuple[str, str], dict[str, LazyTensor]] = {}
    strangers = []
    for tensor, lazy in listing.tensors(name).items():
        if (head := head_of(tensor)) and head[2] == MODULATION_PART:
            flat.setdefault((head[0], f"{head[1]}_{MODULATION}"), {})[WEIGHT_PART] = lazy
        elif head:
            flat.setdefault(head[:2], {})[head[2]] = lazy
        else:
            strangers.append(tensor)
    shapes = {head: shape for head, parts in flat.items() if (shape := _shape(parts))}
    modules, faults = dotted(flat, metadata, list(listing.base.specs) if listing.base else None, shapes)
    if strangers:
        faults.append(f"{counted(len(strangers), 'name is', 'names are')} none of kohya's: {some(strangers)}")
    if faults:
        asked = by_convert(listing, "--base BASE", "Give the base model that it was trained on, whose names decide")
        hint = None if listing.base else asked
        raise BadFile(f"{listing.path}: its names cannot be turned back into modules", faults, hint=hint)
    draft = Draft(listing.path, alpha=listing.alpha)
    for (prefix, path), parts in flat.items():
        module = modules[prefix, path]
        if _ALPHA in parts:
            draft.alphas[module] = read_number(parts.pop(_ALPHA), f"{listing.folder / name}: {prefix}{path}.alpha")
        for suffix, lazy in parts.items():
            draft.add(module, _PARTS.get(suffix, suffix), lazy, f"{prefix}{path}.{suffix}")
    others = finish(draft, metadata)
    for note in network.notes(metadata, draft.groups):
        warned("%s: %s", listing.folder / name, note)
    settings = settings_with(metadata, lambda key: key != NAMES_KEY) | others.settings
    base = BaseIdentity.of_name(metadata.get("ss_sd_model_name"))
    return Adapter(draft.build(), others.replacements, base, dialect="kohya", settings=settings)


def losses(adapter: Adapter) -> list[Loss]:
    """List what kohya has no words for, and modules whose names become one when they are flattened; once in a task."""
    key = "losses of kohya", id(adapter)
    if (known := remembered().get(key)) is None:
        known = adapter, _losses(adapter)
        remember(key, known)  # with the adapter, whose id is then nobody else's
    return list(known[1])


def _losses(adapter: Adapter) -> list[Loss]:
    adapter = rename.to_original(adapter, reader="kohya")
    known = frozenset({A, B, BIAS, MAGNITUDE})
    lost = []
    homes = {module: home_of(module, update) for module, update in adapter.updates.items()}
    names, _ = flattened(dict.fromkeys(homes.values()), groups.prefixes(adapter, "kohya"))
    open_names = rename.undecided(adapter, "kohya")
    second = len({first for module in homes.values() if (first := module.partition(".")[0]) in _IMAGE_MODELS}) > 1
    for module, update in adapter.updates.items():
        foreign = sorted(part for part in update.parts if part in keys.PARTS and part not in known)
        if second and module.startswith(f"{_IMAGE_MODELS[-1]}."):
            lost.append(Loss(module, "a file of kohya's has one image model, and this is of the second"))
        elif module in open_names:
            lost.append(Loss(module, open_names[module]))
        elif foreign or update.kind == "experts":
            lost.append(Loss(module, f"kohya has no {', '.join(foreign) or 'stacked experts'}"))
        elif homes[module] not in names:
            lost.append(Loss(module, "its flattened name is that of another module too"))
    return lost + common_losses(adapter, "kohya")


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write one safetensors file with its hashes; alphas are in the factors' dtype, or a wider one that has them."""
    from loratools.dialects._frame.hashes import MODELSPEC, SHS, hashes  # `inspect` need not wait for it

    for group in groups.groups(adapter) if adapter.dialect != "kohya" else ():
        if group.stays and group.prefix != f"{groups.ORIGINAL}.":
            few = some([group.prefix + name for name in group.updates])
            warned(
                "%s: names that %s share and kohya's trainers write in two ways; they stay diffusers', as those of "
                "Stable Diffusion 1 and 2 are: convert with --base BASE where it is another model",
                few, summaries(group.readings),
            )  # fmt: skip
    adapter = left(rename.to_original(adapter, reader="kohya"), losses(adapter), target)
    homes = {module: home_of(module, update) for module, update in adapter.updates.items()}
    names, unknown = flattened(dict.fromkeys(homes.values()), groups.prefixes(adapter, "kohya"))
    tensors: dict[str, LazyTensor] = {}
    for module, update in adapter.updates.items():
        parts = of_peft(update) if homes[module] == module else alone(module, update)
        tensors |= {f"{names[homes[module]]}.{suffix}": lazy for suffix, lazy in parts.items()}
    metadata = _metadata(adapter)
    if unknown:
        metadata[NAMES_KEY] = json.dumps(unknown, sort_keys=True)
    metadata |= hashes(tensors, metadata, [*SHS, *(name for name in metadata_of(adapter) if name == MODELSPEC)])
    save.save(target, _FILE, tensors, metadata, force=force)
    return adapter


def _shape(parts: Mapping[str, LazyTensor]) -> tuple[int, ...]:
    """Return the shape of a module's ΔW where two factors of a linear layer tell it, else ()."""
    down, up = parts.get("lora_down.weight"), parts.get("lora_up.weight")
    return (up.shape[0], down.shape[1]) if down and up and len(down.shape) == len(up.shape) == 2 else ()


def finish(draft: Draft, header: Mapping[str, str]) -> Beside:
    """Give a draft of kohya's parts PEFT's, the alphas that only the header has, and its biases; return what is beside.

    A difference of a bias, b' = b + diff_b, becomes that of B beside two factors, c = diff_b/s, and an update of the
    bias itself beside anything else. The difference of a whole weight has its bias with it.
    """
    others = take_apart(draft)
    biases = {
        module: parts.pop(BIAS_PART)
        for module, parts in draft.groups.items()
        if BIAS_PART in parts and WEIGHT_PART not in parts
    }
    draft.convert(lambda module, parts: {module: to_peft(parts)} if parts else {})
    alphas.fill(draft, header)
    draft.layout = rotations.layouts(draft, header)
    for module, bias in biases.items():
        parts = draft.groups.get(module, {})
        if BIAS in parts:
            draft.faults.append(f"{module}: a bias of B ({BIAS}) and one of its own ({BIAS_PART})")
            continue
        scaling = draft.usual(module, parts[A].shape[0])[0] if {A, B} <= parts.keys() <= _BIASED else 0.0
        if scaling and 0 not in parts[A].shape:
            parts[BIAS] = factors.scaled(bias, 1 / scaling)
        else:
            draft.add(f"{module}.bias", WEIGHT_PART, bias, f"{module}.{BIAS_PART}")
    return others


def home_of(module: str, update: Update) -> str:
    """Return the module in whose name a parameter's update stands in a file: that of the bias, and the weight's own."""
    alone = update.kind == "full" and BIAS_PART not in update.parts
    last = ".bias" if len(update.shape) == 1 else ".weight"
    return module.removesuffix(last) if alone else module


def alone(module: str, update: Update) -> dict[str, LazyTensor]:
    """Return the tensor of a parameter's update by its suffix: that of a bias, or of the weight."""
    return {BIAS_PART if module.endswith(".bias") else WEIGHT_PART: update.parts[WEIGHT_PART]}


def to_peft(parts: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the parts with DoRA's magnitude in PEFT's shape, if it has one number for each output feature.

    The factors around a Tucker core are convolutions.
    """
    converted = dict(parts)
    core = parts.get(MID_PART)
    if core is not None:  # ComfyUI takes the pointwise convolutions around a core as matrices too
        pointwise = (1,) * (len(core.shape) - 2)
        converted |= {name: parts[name].reshaped((*parts[name].shape, *pointwise))
                      for name in (A, B) if name in parts and len(parts[name].shape) == 2}  # fmt: skip
    scale = parts.get(_DORA)
    if scale is not None and converted.keys() - {BIAS} == {A, B, _DORA}:
        out, sides = parts[B].shape[0], len(parts[A].shape)
        if scale.shape == (out, *(1,) * (sides - 1)) and len(scale.shape) == sides:
            del converted[_DORA]
            converted[MAGNITUDE] = scale.reshaped((out,) if sides == 2 else (1, out, *(1,) * (sides - 2)))
    return converted


def of_peft(update: Update) -> dict[str, LazyTensor]:
    """Return an update's tensors by kohya's suffixes; a bias of B is the difference of the module's, s·c."""
    special = (MAGNITUDE, BIAS)
    parts = {_SUFFIXES.get(part, part): lazy for part, lazy in update.parts.items() if part not in special}
    if BIAS in update.parts:
        parts[BIAS_PART] = factors.scaled(update.parts[BIAS], update.scaling)
    if MAGNITUDE in update.parts:
        magnitude = update.parts[MAGNITUDE]
        sides = (magnitude.parameters, *(1,) * (len(update.parts[A].shape) - 1))
        parts[_DORA] = magnitude.reshaped(sides)
    alpha = alpha_of(update)
    if update.rank or alpha != 1:
        parts[_ALPHA] = _number(alpha, {lazy.dtype for lazy in update.parts.values()})
    return parts


def alpha_of(update: Update) -> float:
    """Return the alpha which, divided by the rank, gives exactly this scaling: the update's own where it does.

    In some kinds alpha is no part of a scaling: OFT's is its constraint. So each candidate is tried by building.
    """
    rank, build = update.rank or 1, kinds.get(update.kind).build
    solved = update.scaling * rank
    near = (update.alpha, solved, math.nextafter(solved, -math.inf), math.nextafter(solved, math.inf))
    return float(next((v for v in near if build(update.parts, v / rank, v).scaling == update.scaling), solved))


def _number(value: float, dtypes: Collection[str]) -> LazyTensor:
    """Stand for one number, in the dtype of the factors, as trainers save it, or in a wider one that has it exactly."""
    short = [dtype for dtype in _SHORT if set(dtypes) == {dtype} and is_float(value, dtype)]
    dtype = short[0] if short else "F32" if is_float(value, "F32") else "F64"

    # BF16 is the upper half of F32; the number is one of its dtype, so that nothing is rounded.
    held = pack("<f", value)[2:] if dtype == "BF16" else pack({"F16": "<e", "F32": "<f", "F64": "<d"}[dtype], value)
    return LazyTensor.holding(dtype, (), memoryview(held))


def _metadata(adapter: Adapter) -> dict[str, str]:
    """Return the header entries that a trainer wrote, or else the few that tools look for."""
    entries = carried(adapter, {}, NAMES_KEY, *OF_BYTES)
    base = {"ss_sd_model_name": adapter.base.id} if adapter.base and adapter.base.id else {}
    if any(key.startswith(("ss_", "modelspec.")) for key in entries):
        return entries | base
    dims = Counter(str(update.rank) for update in adapter.updates.values()).most_common(1)
    alphas = Counter(f"{alpha_of(update):g}" for update in adapter.updates.values()).most_common(1)
    metadata = {"ss_network_module": "networks.lora"}
    metadata |= {"ss_network_dim": dims[0][0], "ss_network_alpha": alphas[0][0]} if dims else {}
    return entries | metadata | base
