"""kohya-ss sd-scripts and LyCORIS: flattened names, `lora_down`, `lora_up` and an `alpha` for each module.

    lora_unet_down_blocks_0_attentions_0_proj_in . lora_down.weight (r, in[, kh, kw])  lora_up.weight (out, r[, 1, 1])
                                                   alpha ()                            dora_scale (out, 1[, 1, 1])
                                                   diff_b (out,)                       b' = b + diff_b, whatever s is

s = alpha/r (sd-scripts 48d368fa, LyCORIS 4.1.3, which folds rsLoRA into alpha); without a tensor for it alpha is the
header's `ss_network_alpha`, and s = 1 where that is missing too. The header's `ss_*` and `modelspec.*` stay with the
adapter. What sd-scripts saves as .pt or .ckpt has the same names and no header; it is read, and never written.

    files    what is read and written
    names    flattened names and the way back, by look-up
    beside   parts that change another parameter than their module's weight
    rotations  what rotations of inputs are made of: `oft_R`
    network  the header's `ss_network_module` and `ss_network_args`: what they say of the tensors
"""

from __future__ import annotations

from pathlib import Path

from loratools.adapter.model import Adapter, Loss
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import IDENTITY
from loratools.storage.pickles import SUFFIXES

SUMMARY = "kohya-ss sd-scripts and LyCORIS: flattened names (lora_unet_…), lora_down and lora_up, alpha"
EXTRA = None
FILES = (".safetensors",)
CANNOT = (*IDENTITY, "tensors trained whole", "embeddings", "stacked experts")

_BEGINNINGS = ("lora_unet_", "oft_unet_", "lora_te", "lora_transformer_", "lora_prior_", "lycoris_")


def detect(listing: Listing) -> Evidence | None:
    """Look for kohya's prefixes in the names, and for `ss_network_module` in the header."""
    name = listing.only(*FILES)
    header = listing.header(name) if name else None
    if header is None and listing.only(*SUFFIXES) is None:
        return None
    if header is not None and not any(tensor.startswith(_BEGINNINGS) for tensor in header.tensors):
        return None
    from loratools.dialects.kohya import files

    return files.evidence(listing)


def read(listing: Listing) -> Adapter:
    """Read as `files.read` says."""
    from loratools.dialects.kohya import files

    return files.read(listing)


def losses(adapter: Adapter) -> list[Loss]:
    """List what `files.losses` says."""
    from loratools.dialects.kohya import files

    return files.losses(adapter)


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write as `files.write` says."""
    from loratools.dialects.kohya import files

    return files.write(adapter, target, force=force)
