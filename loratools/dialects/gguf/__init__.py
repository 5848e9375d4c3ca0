"""GGUF, llama.cpp's LoRA: `blk.0.attn_q.weight.lora_a`, architecture names, one alpha for all.

    lora_a (r, in), lora_b (out, r); experts stacked (E, r, in), (E, out, r); token_embd flipped: (V, r), (d, r)

s = alpha/r for each tensor; alpha is a float32 in the file, s = 1 if it is 0 or missing (llama.cpp's `get_scale`). The
`gguf` package reads and writes the container.

    files   what is read and written
    names   architectures, which of their tensors is which module, and the rows of q and k, which some permute
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from loratools.adapter.model import Adapter, Loss
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import IDENTITY
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage.sources import open_file

SUMMARY = "GGUF: a LoRA adapter of llama.cpp, with architecture names and one alpha"
EXTRA = "gguf"
FILES = (".gguf",)
CANNOT = (*IDENTITY, "tensors trained whole", "DoRA", "convolutions", "biases of B", "unknown architectures")


def detect(listing: Listing) -> Evidence | None:
    """Look at the file's first four bytes."""
    name = listing.only(".gguf")
    if name is None:
        return None
    with open_file(listing.folder / name) as file:
        if file.read(4) != b"GGUF":
            return None
    with suppress(BadFile, UnsupportedAdapter):  # reading it says what is wrong
        from loratools.storage.gguf.container import read_container

        container = read_container(listing.folder / name)
        if not any(".lora_" in tensor for tensor in container.tensors):
            return None
    return Evidence(100, f"{name} begins with GGUF")


def read(listing: Listing) -> Adapter:
    """Read as `files.read` says."""
    from loratools.dialects.gguf import files

    return files.read(listing)


def losses(adapter: Adapter) -> list[Loss]:
    """List what `files.losses` says."""
    from loratools.dialects.gguf import files

    return files.losses(adapter)


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write as `files.write` says."""
    from loratools.dialects.gguf import files

    return files.write(adapter, target, force=force)
