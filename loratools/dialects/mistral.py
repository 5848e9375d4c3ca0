"""mistral-finetune: `lora.safetensors` with Mistral's own names, beside `params.json`. Read only.

    layers.0.attention.wq.lora_A.weight (r, in)   lora_B.weight (out, r)   ΔW = scaling·B·A
    layers.0.feed_forward.w1, w3, w2              gate, up, down; of Mixtral feed_forward.experts.7.w1
    layers.0.attention_norm.weight                a norm, trained whole

`params.json` has the model's heads and `lora.scaling`, which is no alpha/r (mistral-finetune, `model/lora.py` and
`utils/merge_lora.py`). Rows of wq and wk are in the order of Mistral's own RoPE, each pair beside the other; for a base
of these names an adapter stays as it is, for transformers' they are put in its order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.adapter.model import Adapter
from loratools.adapter.parts import A, B
from loratools.dialects._frame.build import Draft, Groups, both, check_gathered
from loratools.dialects._frame.listing import Evidence, Listing, by_convert
from loratools.dialects._frame.losses import read_only
from loratools.dialects._frame.numbers import is_number
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage.lazy import LazyTensor

SUMMARY = "mistral-finetune: lora.safetensors (layers.0.attention.wq.lora_A.weight) beside params.json; read only"
EXTRA = None
FILES = ()
CANNOT = ("anything: it is only read; vLLM and transformers read PEFT",)

_FILE, _PARAMETERS = "lora.safetensors", "params.json"
_FACTOR = r"(layers\.\d+)\.(attention\.w[qkvo]|feed_forward\.(?:experts\.\d+\.)?w[123])\.(lora_[AB]\.weight)"
_NORM = r"(?:(layers\.\d+)\.(attention_norm|ffn_norm)|norm)\.weight"
_TARGETS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEADS = {"attention.wq": ("n_heads", "num_attention_heads"), "attention.wk": ("n_kv_heads", "num_key_value_heads")}


def detect(listing: Listing) -> Evidence | None:
    """Look for Mistral's names of attentions in a file of safetensors; Z-Image and its kin have those of its MLPs."""
    name = _file(listing)
    header = listing.header(name) if name else None
    factors = [match[2] for tensor in header.tensors if (match := re.fullmatch(_FACTOR, tensor))] if header else []
    count = len(factors) if any(module.startswith("attention.") for module in factors) else 0
    return Evidence(95, f"{count} of the tensors in {name} have the names of mistral-finetune") if count else None


def read(listing: Listing) -> Adapter:
    """Read an adapter under transformers' names, or under its own where the base has them.

    Raises `UnsupportedAdapter` where the scaling, or the heads of wq and wk, are in no file, `BadFile` for strange
    names and for a scaling that is no number.
    """
    name = _file(listing)
    if name is None:
        raise BadFile(f"{listing.path}: expected {_FILE}, or one file of safetensors")
    parameters = listing.json(_PARAMETERS) or {}
    scaling = _scaling(listing, parameters)
    draft, tensors = Draft(listing.path, alpha=listing.alpha), listing.tensors(name)
    check_gathered(listing.path, tensors)
    own = listing.base is not None and any(_is_own(tensor) for tensor in listing.base.specs)
    replacements: dict[str, LazyTensor] = {}
    for tensor, lazy in tensors.items():
        if match := re.fullmatch(_FACTOR, tensor):
            draft.add(f"{match[1]}.{match[2]}", match[3], lazy, tensor)
        elif match := re.fullmatch(_NORM, tensor):
            layer = f"model.{match[1]}.{_NORMS[match[2]]}" if match[1] else "model.norm"
            replacements[tensor if own else f"{layer}.weight"] = lazy
        else:
            draft.faults.append(f"{tensor}: no name that mistral-finetune gives to a part of an adapter")
    draft.check()
    if not own:
        heads = _heads(listing, parameters, draft.groups)
        draft.convert(lambda module, parts: _transformed(module, parts, heads))
    updates = draft.build(draft.usual if scaling is None else lambda _, rank: (scaling, scaling * rank))
    return Adapter(updates, replacements, dialect="mistral")


losses, write = read_only("files of mistral-finetune are only read here; vLLM and transformers read PEFT (--to peft)")


def _file(listing: Listing) -> str | None:
    if listing.single:
        return listing.only(".safetensors")
    return _FILE if _FILE in listing.files else None


def _is_own(tensor: str) -> bool:
    """Tell whether a base's tensor has Mistral's own name."""
    return re.fullmatch(r"layers\.\d+\.attention\.wq\.weight", tensor) is not None


def _scaling(listing: Listing, parameters: Mapping[str, Any]) -> float | None:
    """Return `lora.scaling`; None where the user's alpha is what counts."""
    if listing.alpha is not None:
        return None
    lora = parameters.get("lora")
    scaling = lora.get("scaling") if isinstance(lora, dict) else None
    path = listing.folder / _PARAMETERS
    if scaling is None:
        raise UnsupportedAdapter(
            f"{path}: no lora.scaling, and without it the scaling is unknown",
            hint=by_convert(
                listing, "--alpha NUMBER", f"Put the {_PARAMETERS} of the run beside it, or give alpha, scaling times r"
            ),
        )
    if not is_number(scaling):
        raise BadFile(f"{path}: lora.scaling: expected a number, found {str(scaling)[:80]!r}")
    return float(scaling)


def _heads(listing: Listing, parameters: Mapping[str, Any], groups: Groups) -> dict[str, int]:
    """Return projection -> heads, of wq and wk; raise `UnsupportedAdapter` where one has factors and none is known."""
    config = listing.base.config if listing.base else {}
    heads, missing = {}, []
    for projection, (own, theirs) in _HEADS.items():
        count = parameters.get(own) or config.get(theirs)
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            heads[projection] = count
        elif any(module.endswith(projection) for module in groups):
            missing.append(f"{own}: expected a number of heads, found {str(count)[:80]}")
    if missing:
        raise UnsupportedAdapter(
            f"{listing.path}: the rows of wq and wk are in another order than transformers', and the heads are unknown",
            missing,
            hint=by_convert(listing, "--base BASE", f"Put the {_PARAMETERS} of the run beside it, or give the base"),
        )
    return heads


def _transformed(module: str, parts: Mapping[str, LazyTensor], heads: Mapping[str, int]) -> Groups:
    """Return a module under transformers' name, with rows of B in its order."""
    from loratools.adapter.naming.llama_cpp import Order, permuted
    from loratools.adapter.naming.llama_cpp_table import PAIRS

    _, layer, target = module.split(".", 2)
    if target not in _TARGETS:  # Mixtral's experts are called alike
        return {f"model.layers.{layer}.{target.replace('feed_forward', 'block_sparse_moe')}": dict(parts)}
    a, b = both(parts, A, B)
    b = permuted(b, Order(PAIRS, heads[target]), back=True) if target in heads else b
    return {f"model.layers.{layer}.{_TARGETS[target]}": {A: a, B: b}}
