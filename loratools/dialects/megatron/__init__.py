"""Megatron-Bridge and NeMo: linear_in and linear_out, on projections that Megatron fuses and interleaves. Read only.

    decoder.layers.0.self_attention.linear_qkv.adapter . linear_in.weight (r, in)   linear_out.weight (out, r)
    model.decoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter . …        the same in NeMo 1.x
    ….linear_qkv.adapter.adapter_q, ….linear_fc1.adapter.adapter_gate               canonical LoRA: projections apart

s = alpha/dim of the configuration beside the tensors, 1 without an alpha (Megatron-Bridge 0.3.1, `peft/utils.py`).
Modules get transformers' names for a Llama, and rows its order.

    files   what is read
    names   Megatron's names of a layer's parts, and the rows of those that it fuses
    nemo    `.nemo` archives, the same unpacked, and their configurations
"""

from __future__ import annotations

from loratools.adapter.model import Adapter
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import read_only
from loratools.format import keys

SUMMARY = "Megatron-Bridge and NeMo: linear_in and linear_out on fused projections (.nemo, state dicts); read only"
EXTRA = None
SURE = 100
FILES = ()
CANNOT = ("anything: it is only read; Megatron's own tools import PEFT",)


def detect(listing: Listing) -> Evidence | None:
    """Look for a `.nemo` archive, for `.distcp` shards, and for Megatron's names of an adapter's factors."""
    if _is_of_peft(listing):
        return None
    from loratools.dialects.megatron import files

    return files.evidence(listing)


def _is_of_peft(listing: Listing) -> bool:
    """Tell whether there is one file of tensors under PEFT's names, and nothing beside it of which more is asked."""
    header = listing.header(listing.weights[0]) if len(listing.weights) == 1 else None
    named = header is not None and all(tensor.startswith(keys.PREFIX) for tensor in header.tensors)
    beside = any(name.endswith((".nemo", ".distcp")) for name in listing.files)
    return named and not beside and not (listing.folder / "weights").is_dir()


def read(listing: Listing) -> Adapter:
    """Read as `files.read` says."""
    from loratools.dialects.megatron import files

    return files.read(listing)


losses, write = read_only("files of Megatron and NeMo are only read here; their own tools import PEFT (--to peft)")
