"""ComfyUI and trainers that keep the original implementation's names: ai-toolkit, musubi-tuner, BFL, XLabs.

    diffusion_model.double_blocks.0.img_attn.qkv . lora_A.weight (or lora_down.weight), lora_B.weight, alpha
    text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1 . lora_A.weight
    diffusion_model.blocks.0.self_attn.q . diff_b      added to the bias; of norms diff (Wan, extractions)
    diffusion_model.blocks.0 . diff_m        added to the modulation; set_weight, reshape_weight: kohya/beside.py
    double_blocks.0.processor.qkv_lora1.down.weight            XLabs: lora1 the image's stream, lora2 the text's
    double_blocks.0.img_attn.qkv.lora_B.bias, ….query_norm.scale        BFL's control adapters, without a component
    blocks.0.attn.qkv_x.lora_A, ….lora_B               Genmo's of Mochi; alphas in the header's `kwargs`

s = alpha/r; without a tensor for it alpha is the header's, and s = 1 where that is missing too. ComfyUI itself maps the
names by the base that it has loaded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools.adapter import factors
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter, BaseIdentity, Loss
from loratools.adapter.naming.image import groups, readings, rename
from loratools.adapter.naming.image.components import with_component
from loratools.adapter.parts import BIAS, MAGNITUDE, A, B
from loratools.dialects._frame import alphas
from loratools.dialects._frame.build import Draft, some
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import IDENTITY, common_losses, left
from loratools.dialects._frame.metadata import ALPHAS, carried, metadata_of, settings_with
from loratools.dialects._frame.numbers import read_number
from loratools.dialects.kohya import files as kohya
from loratools.dialects.kohya.beside import SET_PART, SHAPE_PART, shapes_of
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.format import keys
from loratools.storage import save
from loratools.storage.lazy import LazyTensor

SUMMARY = "ComfyUI, ai-toolkit, musubi-tuner, BFL, XLabs: the original implementation's names (diffusion_model.…)"
EXTRA = None
FILES = (".safetensors",)
CANNOT = (
    *IDENTITY, "tensors trained whole outside of the image model", "models whose original names are not known here",
)  # fmt: skip

_FILE = "lora.safetensors"
_SUFFIX = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_(?:A|B|down|up)(?:\.default)?(?:\.weight)?|lora_B\.bias|lora_mid\.weight|alpha"
    r"|dora_scale|lora_magnitude_vector(?:\.weight)?|(?:hada|lokr)_\w+|diff|diff_b|diff_m|w_norm|b_norm|set_weight"
    r"|reshape_weight|[ab][12]\.weight|oft_R\.\w+|b?oft_\w+|rescale|magnitude)"
)
_KINDS = frozenset({"lora", "dora", "conv", "locon", "loha", "lokr", "glora", "full", "norm", "oft", "boft_output"})
_PARTS = {"lora_A.weight": A, "lora_B.weight": B, "lora_down.weight": A, "lora_up.weight": B,
          "lora_magnitude_vector.weight": MAGNITUDE, "magnitude": MAGNITUDE,
          "lora_A": A, "lora_B": B}  # fmt: skip
_XLABS = re.compile(
    r"(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight"
)
_XLABS_NAMES = {
    "qkv1": "img_attn.qkv", "qkv2": "txt_attn.qkv", "proj1": "img_attn.proj", "proj2": "txt_attn.proj",
    "qkv": "linear1", "proj": "linear2",
}  # fmt: skip
_DIFFSYNTH, _CHECKPOINT = re.compile(r"^(?:pipe\.)?dit\."), re.compile(r"^model\.(?=diffusion_model\.)")
_STACKED, _HEAD = re.compile(r"(?:diffusion_model\.)?(?:token_refiner\.)?blocks\.\d+\.attn\.qkv_proj"), 128
"""MiniMax-H3's weights of q, k and v, and the width of its heads."""
_PACKED = re.compile(r".+\.(?:mlp(?:_context)?_fc[12]|(?:qkv|out)_proj(?:_context)?)\.lora_(?:down|up)")
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
_LANGUAGE = ("layers.", "embed_tokens", "norm")
"""What a language model begins with, around which ComfyUI has `model.`."""
_GENMO = re.compile(r"(?:diffusion_model\.)?blocks\.\d+\.attn\.(qkv|proj)_[xy]")
_GENMO_ALPHAS = {"qkv": "qkv_proj_lora_alpha", "proj": "out_proj_lora_alpha"}
_TOP = "text_embedding_projection."
"""What LTX-2's files have beside `diffusion_model.`, and adapters of it too."""

_ENCODER = re.compile(r"text_encoders\.(\w+)\.transformer\.(.+)")


def detect(listing: Listing) -> Evidence | None:
    """Look for `diffusion_model.`, for XLabs' processors, and for the names of BFL's blocks."""
    name = listing.only(*FILES)
    header = listing.header(name) if name else None
    if name is None or header is None:
        return None
    packed = [t for t in header.tensors if t.endswith((".lora_down", ".lora_up")) and _PACKED.fullmatch(t)]
    if packed and not any(tensor.endswith(".qweight") for tensor in header.tensors):  # which SVDQuant has beside them
        return Evidence(85, f"{len(packed)} of the tensors in {name} are packed for Nunchaku, such as {packed[0]}")
    suffixed = {tensor: match for tensor in header.tensors if (match := _SUFFIX.fullmatch(tensor))}
    names = [tensor for tensor in header.tensors if tensor in suffixed or _XLABS.fullmatch(tensor)]
    for score, what, mark in (
        (80, "are of XLabs' processors", _XLABS.fullmatch),
        (80, "begin with diffusion_model.", re.compile(r"diffusion_model\.").match),
        (80, "begin with text_encoders.", _ENCODER.match),
        (80, "begin with dit., as DiffSynth's do", _DIFFSYNTH.match),
        (80, "begin with model.diffusion_model.", _CHECKPOINT.match),
    ):
        if marked := [tensor for tensor in names if mark(tensor)]:
            return Evidence(score, f"{len(marked)} of the tensors in {name} {what}, such as {marked[0]}")
    modules = {match["module"] for match in suffixed.values()}
    if any(module.startswith(keys.PREFIX) for module in modules):  # PEFT's: no original's; the families stay unread
        return None
    count, family = _bare(modules)
    what = f"{count} of the modules in {name} have the original's names of {family}, such as {min(modules, default='')}"
    return Evidence(65, what) if count else None


def read(listing: Listing) -> Adapter:
    """Read an adapter; modules keep the original's names, behind `diffusion_model.`.

    Raises `BadFile` with all names that this dialect does not have, `UnsupportedAdapter` for parts of no known kind
    and for factors that are packed for Nunchaku.
    """
    name = listing.only(*FILES)
    if name is None:
        raise BadFile(f"{listing.path}: expected one safetensors file in this folder")
    tensors = {_called(tensor): lazy for tensor, lazy in listing.tensors(name).items()}
    if packed := [tensor for tensor in tensors if _PACKED.fullmatch(tensor)]:
        what = "its factors are packed for the 4-bit kernels of Nunchaku (SVDQuant), in an order of tensor cores"
        hint = "Give the LoRA that it was made of: Nunchaku packs others as it loads them."
        raise UnsupportedAdapter(f"{listing.path}: {what}", [some(packed)], hint=hint)
    spelling = _Spelling.of(tensors)
    draft = Draft(listing.path, alpha=listing.alpha)
    whole: dict[str, LazyTensor] = {}
    short = set()
    for tensor, lazy in tensors.items():
        if match := _XLABS.fullmatch(tensor):
            kind, number, what, stream, side = match.groups()
            module = f"{groups.ORIGINAL}.{kind}_blocks.{number}.{_XLABS_NAMES[what + stream]}"
            draft.add(module, A if side == "down" else B, lazy, tensor)
            short |= {module} if kind == "single" and what == "qkv" else set()
        elif match := _SUFFIX.fullmatch(tensor):
            module, part = spelling.module(match["module"]), match["part"].replace(".default", "")
            if part == "alpha":
                draft.alphas[module] = read_number(lazy, f"{listing.folder / name}: {tensor}")
            else:
                draft.add(module, _PARTS.get(part, part), lazy, tensor)
        elif tensor.endswith("_norm.scale"):
            whole[spelling.module(tensor)] = lazy
        else:
            draft.faults.append(f"{tensor}: no name that this dialect gives to a part of an adapter")
    header = listing.header(name)
    metadata = header.metadata if header else {}
    if any(tensor.endswith((".lora_A", ".lora_B")) for tensor in tensors):
        draft.alphas = _of_genmo(draft.groups, metadata) | draft.alphas
    draft.check()
    if any(".lora_B.default." in tensor for tensor in tensors):
        draft.groups |= {m: _by_head(parts) for m, parts in draft.groups.items() if _STACKED.fullmatch(m)}
    for module in short:
        draft.groups[module] = _into_linear1(draft.groups[module])
    others = kohya.finish(draft, metadata)
    base = BaseIdentity.of_name(metadata.get("ss_base_model"))
    settings = settings_with(metadata, lambda key: key != "format") | others.settings
    return Adapter(draft.build(), {**whole, **others.replacements}, base, dialect="comfy", settings=settings)


def losses(adapter: Adapter) -> list[Loss]:
    """List modules without a known name in an original implementation, and parts that ComfyUI does not read."""
    adapter = rename.to_original(adapter)
    lost, undecided, encoders = [], rename.undecided(adapter, "comfy"), groups.encoders(adapter)
    for module, update in adapter.updates.items():
        foreign = sorted(part for part in update.parts if part in keys.PARTS and part not in (A, B, BIAS, MAGNITUDE))
        unread = None if update.kind in {*_KINDS, "wdora"} else f"updates of kind {update.kind}"
        if module in undecided:
            lost.append(Loss(module, undecided[module]))
        elif _name(kohya.home_of(module, update), encoders) is None:
            lost.append(Loss(module, "its name in the original implementation is not known"))
        elif foreign or unread:
            lost.append(Loss(module, f"ComfyUI has no {', '.join(foreign) or unread}"))
    return lost + [loss for loss in common_losses(adapter, "ComfyUI") if loss.where not in _set(adapter)]


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write `lora_A` and `lora_B` under the original's names, with an alpha wherever the scaling is not 1.

    Every alpha is written where the header states one, which readers take for those that are missing.
    """
    adapter = left(rename.to_original(adapter), losses(adapter), target)
    stated = not metadata_of(adapter).keys().isdisjoint(ALPHAS)
    tensors: dict[str, LazyTensor] = {}
    encoders = groups.encoders(adapter)
    for module, update in adapter.updates.items():
        home = kohya.home_of(module, update)
        parts = _of_peft(update, stated) if home == module else kohya.alone(module, update)
        tensors |= {f"{_name(home, encoders)}.{suffix}": lazy for suffix, lazy in parts.items()}
    tensors |= {name: adapter.replacements[path] for path, name in _set(adapter).items()}
    tensors |= {f"{_name(module, encoders)}.{SHAPE_PART}": lazy for module, lazy in shapes_of(adapter).items()}
    metadata = {"format": "pt", **carried(adapter, tensors, "format")}
    if adapter.base and adapter.base.id:
        metadata["ss_base_model"] = adapter.base.id
    save.save(target, _FILE, tensors, metadata, force=force)
    return adapter


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How a file names modules: whether the original's names are bare, and which components its encoders are."""

    bare: frozenset[str]
    encoders: Mapping[str, str]

    @classmethod
    def of(cls, tensors: Iterable[str]) -> _Spelling:
        """Look at all of a file's names."""
        modules = {match["module"] for tensor in tensors if (match := _SUFFIX.fullmatch(tensor))}
        inside = {module.removeprefix("diffusion_model.") for module in modules if not _ENCODER.fullmatch(module)}
        _, best = readings.most(inside)
        called: dict[str, set[str]] = defaultdict(set)
        for reading in best if inside else ():
            for component, (_, name) in reading.family.encoders.items():
                called[name].add(component)
        encoders = {name: several.pop() for name, several in called.items() if len(several) == 1}
        return cls(frozenset(inside & modules) if _bare(modules)[0] else frozenset(), _ENCODERS | encoders)

    def module(self, name: str) -> str:
        """Return the module's name in an `Adapter`: diffusers' for text encoders, else the one in the file."""
        if match := _ENCODER.fullmatch(name):
            encoder = self.encoders.get(match[1])
            rest = match[2] if match[1] in _ENCODERS else match[2].removeprefix("model.")
            return f"{encoder}.{rest}" if encoder else name
        bare = (self.bare or name.startswith(_TOP)) and not name.startswith("diffusion_model.")
        return f"diffusion_model.{name}" if bare else name


def _called(tensor: str) -> str:
    """Return a tensor's name behind `diffusion_model.` or a component, where it has DiffSynth's or another prefix."""
    return with_component(_CHECKPOINT.sub("", _DIFFSYNTH.sub(f"{groups.ORIGINAL}.", tensor)))


def _by_head(parts: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return a change of q, k and v with its output features stacked."""
    whole = {part: lazy for part, lazy in parts.items() if part in (B, BIAS, MAGNITUDE)}
    odd = any(lazy.shape[0] % (3 * _HEAD) for lazy in whole.values())
    return dict(parts) if odd else {**parts, **{part: _stacked(lazy) for part, lazy in whole.items()}}


def _stacked(lazy: LazyTensor) -> LazyTensor:
    """Return rows q, k, v of each head in turn, as DiffSynth trains MiniMax-H3, as all q, all k, all v."""
    heads = range(lazy.shape[0] // (3 * _HEAD))
    return factors.selected(
        lazy, 0, [(3 * head + part) * _HEAD + row for part in range(3) for head in heads for row in range(_HEAD)]
    )


def _bare(modules: Collection[str]) -> tuple[int, str]:
    """Return how many modules have an original's names without anything before them, and of which families.

    None where less than half of them have, or where those are diffusers' names too, or all are a language model's.
    """
    count, best = (0, []) if readings.Reading("language_model", "original").fits(modules) else readings.most(modules)
    original = count * 2 > len(modules) and all(
        groups.component_of(reading, filter(reading.find, modules)) == groups.ORIGINAL for reading in best
    )
    return (count, readings.summaries(best)) if original else (0, "")


def _name(module: str, encoders: Mapping[str, str]) -> str | None:
    """Return ComfyUI's name of a module, or None where it has none."""
    component, _, rest = module.partition(".")
    if component == groups.ORIGINAL or _ENCODER.fullmatch(module):
        return rest if rest.startswith(_TOP) else module
    t5 = rest.startswith(("encoder.block.", "shared"))
    usual = "t5xxl" if t5 else {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}.get(component)
    encoder = encoders.get(component, usual)
    if rest.startswith(_LANGUAGE):
        encoder, rest = (None if encoder in _ENCODERS else encoder), f"model.{rest}"
    return f"text_encoders.{encoder}.transformer.{rest}" if encoder and component.startswith("text_encoder") else None


def _set(adapter: Adapter) -> dict[str, str]:
    """Return path -> ComfyUI's name of a tensor that takes the place of one of the original model."""
    ours = (path for path in adapter.replacements if path.startswith(f"{groups.ORIGINAL}."))
    return {path: f"{path.rpartition('.')[0]}.{SET_PART}" for path in ours if path.endswith((".weight", ".scale"))}


def _of_peft(update: Update, alpha: bool) -> dict[str, LazyTensor]:
    """Return an update's tensors by this dialect's suffixes, with its `alpha` even where the scaling is 1."""
    tensors = kohya.of_peft(update)
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    needed = alpha or kohya.alpha_of(update) != update.rank
    return {names.get(s, s): lazy for s, lazy in tensors.items() if s != "alpha" or needed}


def _of_genmo(modules: Iterable[str], metadata: Mapping[str, str]) -> dict[str, float]:
    """Return the alphas of Genmo's adapters of Mochi, which the header has as JSON among its model's arguments."""
    stated = alphas.json_object(metadata.get("kwargs", "{}"))
    known = {kind: alphas.number(stated.get(key)) for kind, key in _GENMO_ALPHAS.items()}
    found = {module: known[match[1]] for module in modules if (match := _GENMO.fullmatch(module))}
    return {module: alpha for module, alpha in found.items() if alpha is not None}


def _into_linear1(parts: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return XLabs' q, k, v of a single block as an update of linear1, with zeros for the rows of the MLP in it."""
    b = parts.get(B)
    if b is None or b.shape[0] % 3:
        return dict(parts)
    return {**parts, B: factors.padded(b, 0, b.shape[0] // 3 * 7)}
