"""diffusers: `pytorch_lora_weights.safetensors`, PEFT's names behind a component's, the configs in the header.

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q . lora_A.weight      component.module.part

The header's `lora_adapter_metadata` is a JSON object of each component's LoraConfig, `unet.r`, `unet.lora_alpha`, …
Files without it (all before 2025, and most since) have lost their scale: diffusers applies 1.0, or alpha/r where there
are tensors `….alpha` of a transformer; a module without one has that of most others. Of a UNet it reads none, and here
alpha/r is taken, with a warning. Reading knows every spelling of names since 2023, writing uses the current one.

    files   what is read and written
"""

from __future__ import annotations

from pathlib import Path

from loratools.adapter.model import Adapter, Loss
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import IDENTITY
from loratools.format import keys

SUMMARY = "diffusers: pytorch_lora_weights.safetensors; also older lora.down/up names and attention processors"
EXTRA = None
FILES = (".safetensors",)
CANNOT = (*IDENTITY, "tensors trained whole", "embeddings", "DoRA on some modules of a component only")

_KEY = "lora_adapter_metadata"


def detect(listing: Listing) -> Evidence | None:
    """Look for the metadata, for components in front of the names, and for the names of diffusers' models."""
    name = listing.only(*FILES)
    header = listing.header(name) if name else None
    if header and _KEY not in header.metadata and all(tensor.startswith(keys.PREFIX) for tensor in header.tensors):
        return None  # PEFT's: the families' tables stay unread
    from loratools.dialects.diffusers import files

    return files.evidence(listing)


def read(listing: Listing) -> Adapter:
    """Read as `files.read` says."""
    from loratools.dialects.diffusers import files

    return files.read(listing)


def losses(adapter: Adapter) -> list[Loss]:
    """List what `files.losses` says."""
    from loratools.dialects.diffusers import files

    return files.losses(adapter)


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write as `files.write` says."""
    from loratools.dialects.diffusers import files

    return files.write(adapter, target, force=force)
