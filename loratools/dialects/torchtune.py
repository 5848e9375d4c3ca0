"""torchtune: `adapter_model.pt`, names of its own, rows of q and k in Meta's RoPE order.

    layers.0.attn.q_proj.lora_a.weight (r, in)   lora_b.weight (out, r)   magnitude (out,)

The `adapter_config.json` beside it (torchtune 0.6 writes PEFT's, with r and lora_alpha) tells the scaling, alpha/r. The
base's config.json tells whether rows are permuted, and by how many heads.

torchtune also writes PEFT's `adapter_model.safetensors`, and a folder that has one is PEFT's. For Qwen2, and for DoRA's
magnitudes, torchtune 0.6.1 exports other rows there than its model has; then only `adapter_model.pt` is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from loratools.adapter.model import Adapter, Loss
from loratools.adapter.naming.llama_cpp import Layout, Order, permuted
from loratools.adapter.naming.llama_cpp_table import PAIRS
from loratools.adapter.parts import MAGNITUDE, A, B
from loratools.dialects._frame import pickles
from loratools.dialects._frame.build import Draft, check_faults, check_gathered
from loratools.dialects._frame.listing import Evidence, Listing, by_convert
from loratools.dialects._frame.losses import IDENTITY, common_losses, identity_losses, left, update_losses, without
from loratools.dialects._frame.metadata import tell_lost
from loratools.dialects.peft.config import PeftConfig
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage import atomic
from loratools.storage.lazy import LazyTensor

SUMMARY = "torchtune: adapter_model.pt with names of its own (layers.0.attn.q_proj.lora_a.weight)"
EXTRA = None
FILES = ()
CANNOT = (
    *IDENTITY, "tensors trained whole", "embeddings", "convolutions", "DoRA", "biases of B", "unknown models",
)  # fmt: skip

_FILE, _CONFIG = "adapter_model.pt", "adapter_config.json"
_NAME = re.compile(r"(layers\.\d+\.(?:attn|mlp)\.\w+|output)\.(lora_a\.weight|lora_b\.weight|magnitude)")
_PARTS = {"lora_a.weight": A, "lora_b.weight": B, "magnitude": MAGNITUDE}
_TARGETS = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}  # fmt: skip
_BACK = {theirs: ours for ours, theirs in _TARGETS.items()}
# Whether torchtune's own conversion of the base permutes q and k (`models/*/_convert_weights.py`).
_PERMUTED = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False}
_SETTING = "base_config"


def detect(listing: Listing) -> Evidence | None:
    """Look for names that end in `lora_a.weight` in a file of `torch.save`."""
    return pickles.evidence(listing, 85, _NAME.fullmatch)


def read(listing: Listing) -> Adapter:
    """Read an adapter under transformers' names, rows of q and k in transformers' order.

    Raises `UnsupportedAdapter` where the scaling, or the order of rows, cannot be known, `BadFile` for strange names
    and for a config that the tensors contradict.
    """
    name = pickles.file_of(listing)
    if name is None:
        raise BadFile(f"{listing.path}: expected one file of torch.save")
    peft = _config(listing)
    draft, tensors = Draft(listing.path, alpha=listing.alpha), listing.tensors(name)
    check_gathered(listing.path, tensors)
    for tensor, lazy in tensors.items():
        match = _NAME.fullmatch(tensor)
        module = _module(match[1]) if match else None
        if match is None or module is None:
            draft.faults.append(f"{tensor}: no name that torchtune gives to a part of an adapter of a known model")
        else:
            draft.add(module, _PARTS[match[2]], lazy, tensor)
    draft.check()
    turned = [module for module in draft.groups if module.endswith((".q_proj", ".k_proj"))]
    config = listing.base.config if listing.base else {}
    heads = _heads(config) if turned else {}
    if turned and heads is None:
        raise UnsupportedAdapter(
            f"{listing.path}: the rows of {turned[0]} are in another order for some models, and the model is not known",
            hint=by_convert(
                listing, "--base BASE", "Give the base model, whose config.json tells the model and its heads"
            ),
        )
    by_projection = heads or {}
    draft.convert(lambda module, parts: {module: _permuted(parts, by_projection.get(module[-6:]), back=True)})
    if peft is None:
        return Adapter(draft.build(), dialect="torchtune")
    updates = draft.build(peft.rule)
    check_faults(listing.path, peft.contradictions(draft.groups))
    return Adapter(updates, base=peft.base, dialect="torchtune", settings=peft.carried)


def losses(adapter: Adapter) -> list[Loss]:
    """List what torchtune has no place for; ranks and scalings that differ are made equal without changing any ΔW."""
    config = adapter.settings.get(_SETTING)
    if not isinstance(config, Mapping) or _heads(config) is None:
        why = f"not known without the base model (--base); known are {', '.join(_PERMUTED)}"
        return [Loss("model", why), *identity_losses(adapter)]
    lost = update_losses(adapter, "torchtune", ("lora",), (A, B))
    nameless = [module for module in without(adapter, lost).updates if _name(module) is None]
    lost += [Loss(module, "torchtune has no name for it") for module in nameless]
    return lost + common_losses(adapter, "torchtune", named=False)


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write `adapter_model.pt` and its `adapter_config.json`, of one rank and one scaling as its recipes are."""
    from loratools.dialects.peft.profiles import uniform  # `inspect` need not wait for it

    config = adapter.settings.get(_SETTING)
    heads = _heads(config) if isinstance(config, Mapping) else None
    if heads is None:
        raise UnsupportedAdapter(f"{target}: the model is {losses(adapter)[0].what}")
    adapter = uniform(kept := left(adapter, losses(adapter), target))
    first = next(iter(adapter.updates.values()))
    tensors = {}
    for module, update in adapter.updates.items():
        for part, lazy in _permuted(update.parts, heads.get(module[-6:]), back=False).items():
            tensors[f"{_name(module)}.{'lora_a' if part == A else 'lora_b'}.weight"] = lazy
    targets = sorted({module.rpartition(".")[2] for module in adapter.updates})
    peft_config = {"r": first.rank, "lora_alpha": first.alpha, "target_modules": targets, "peft_type": "LORA"}
    tell_lost(adapter, target, "torchtune")
    with atomic.new_folder(target, force=force) as folder:
        text = json.dumps(peft_config, indent=2, sort_keys=True) + "\n"
        (folder / _CONFIG).write_text(text, encoding="utf-8", newline="\n")
        pickles.write(folder / _FILE, tensors)
    return kept


def _config(listing: Listing) -> PeftConfig | None:
    """Return the config, PEFT's with transformers' names of modules; None where the user's alpha is all that is known.

    Raises `UnsupportedAdapter` where neither says what the scaling is.
    """
    document = listing.json(_CONFIG)
    if document is None and listing.alpha is not None:
        return None
    complete = document is not None and None not in (document.get("r"), document.get("lora_alpha"))
    if document is not None and (complete or listing.alpha is not None):
        return PeftConfig.parse(document, listing.folder / _CONFIG, alpha=listing.alpha)
    raise UnsupportedAdapter(
        f"{listing.path}: no {_CONFIG} with r and lora_alpha beside it, and without them the scaling is unknown",
        hint=by_convert(listing, "--alpha NUMBER", "Put the one that torchtune saved beside it, or give its alpha"),
    )


def _heads(config: Mapping[str, object]) -> dict[str, int] | None:
    """Return projection -> the heads that permute its rows: {} for a model with rows in order, None if unknown."""
    model = str(config.get("model_type"))
    if model not in _PERMUTED:
        return None
    if not _PERMUTED[model]:
        return {}
    layout = Layout.of_config(config)
    return {"q_proj": layout.heads, "k_proj": layout.kv_heads} if layout and layout.heads and layout.kv_heads else None


def _permuted(parts: Mapping[str, LazyTensor], heads: int | None, *, back: bool) -> dict[str, LazyTensor]:
    """Return the parts with B's rows, and the magnitude's, in transformers' order (`back`) or torchtune's."""
    ordered = dict(parts)
    for part in (B, MAGNITUDE):
        if part in ordered and heads:
            lazy = ordered[part]
            matrix = lazy.reshaped((lazy.shape[0], lazy.parameters // lazy.shape[0]))
            ordered[part] = permuted(matrix, Order(PAIRS, heads), back=back).reshaped(lazy.shape)
    return ordered


def _module(name: str) -> str | None:
    """Return transformers' name of one of torchtune's modules; None for one that no known model has."""
    if name == "output":
        return "lm_head"
    _, layer, target = name.split(".", 2)
    return f"model.layers.{layer}.{_TARGETS[target]}" if target in _TARGETS else None


def _name(module: str) -> str | None:
    """Return torchtune's name of one of transformers' modules; None where it has none."""
    if module == "lm_head":
        return "output"
    match = re.fullmatch(r"(?:model\.)?layers\.(\d+)\.(\w+\.\w+)", module)
    return f"layers.{match[1]}.{_BACK[match[2]]}" if match and match[2] in _BACK else None
