"""MLX-VLM: `adapters.safetensors` with factors called A and B, and an alpha that is the scaling itself. Read only.

    language_model.model.layers.0.self_attn.q_proj.A (in, r)   .B (r, out)   ΔW = alpha·(A·B)ᵀ

`adapter_config.json` has rank, alpha and dropout, and no `lora_parameters` (mlx-vlm, `trainer/lora.py`). Later versions
write what MLX-LM does, which the dialect `mlx` reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.adapter import factors
from loratools.adapter.model import Adapter
from loratools.adapter.parts import A, B
from loratools.dialects._frame.build import Draft, Groups, both, check_faults, check_gathered, check_read
from loratools.dialects._frame.listing import Evidence, Listing, by_convert
from loratools.dialects._frame.losses import read_only
from loratools.dialects._frame.numbers import is_number
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage.lazy import LazyTensor

SUMMARY = (
    "MLX-VLM: adapters.safetensors (q_proj.A, q_proj.B) beside an adapter_config.json with rank and alpha; read only"
)
EXTRA = None
FILES = ()
CANNOT = ("anything: it is only read; later versions read MLX-LM's files",)

_FILE, _CONFIG = "adapters.safetensors", "adapter_config.json"
_NAME = r"(.+\.layers\.\d+\..+|lm_head|.+\.lm_head)\.([AB])"


def detect(listing: Listing) -> Evidence | None:
    """Look for matrices A and B of linear layers in the header, and for `rank` in the config."""
    name = _file(listing)
    header = listing.header(name) if name else None
    named = [tensor for tensor in header.tensors if tensor.endswith((".A", ".B"))] if header else []
    matches = [match for tensor in named if (match := re.fullmatch(_NAME, tensor))]
    modules = {part: {match[1] for match in matches if match[2] == part} for part in "AB"}
    if not modules["A"] & modules["B"]:
        return None
    seen = f"{len(matches)} of the tensors in {name} are called A or B"
    stated = "rank" in (listing.json(_CONFIG) or {})
    return Evidence(90, f"{_CONFIG} has rank, and {seen}") if stated else Evidence(55, seen)


def read(listing: Listing) -> Adapter:
    """Read an adapter; the scaling of every module is the config's alpha.

    Raises `BadFile` for a rank or alpha that is no number, or that the tensors contradict; `UnsupportedAdapter` where
    the scaling is in no file, and for tensors trained whole, whose layout is MLX's.
    """
    name = _file(listing)
    if name is None:
        raise BadFile(f"{listing.path}: expected {_FILE}, or one file of safetensors")
    config, path = listing.json(_CONFIG) or {}, listing.folder / _CONFIG
    scaling, rank = config.get("alpha"), config.get("rank")
    if listing.alpha is None and scaling is None:
        raise UnsupportedAdapter(
            f"{path}: no alpha, and without it the scaling is unknown",
            hint=by_convert(
                listing, "--alpha NUMBER", f"Put the {_CONFIG} of the run beside it, or give alpha times r"
            ),
        )
    if scaling is not None and not is_number(scaling):
        raise BadFile(f"{path}: alpha: expected a number, found {str(scaling)[:80]!r}")
    draft, tensors = Draft(listing.path, alpha=listing.alpha), listing.tensors(name)
    check_gathered(listing.path, tensors)
    whole = []
    for tensor, lazy in tensors.items():
        if match := re.fullmatch(_NAME, tensor):
            draft.add(match[1], match[2], lazy, tensor)
        else:
            whole.append(f"{tensor}: trained whole, in the layout of MLX")
    check_read(listing.path, whole)
    draft.convert(_to_peft)
    draft.check()
    odd = [
        f"{module}: its tensors have rank {parts[A].shape[0]}, the config says {rank}"
        for module, parts in draft.groups.items()
        if rank is not None and parts[A].shape[0] != rank
    ]
    check_faults(listing.path, odd)
    stated = None if listing.alpha is not None or scaling is None else float(scaling)
    updates = draft.build(draft.usual if stated is None else lambda _, r: (stated, stated * r))
    return Adapter(updates, dialect="mlx_vlm")


losses, write = read_only("files of MLX-VLM's own are only read here; it reads MLX-LM's too (--to mlx)")


def _file(listing: Listing) -> str | None:
    if listing.single:
        return listing.only(".safetensors")
    return _FILE if _FILE in listing.files else None


def _to_peft(module: str, parts: Mapping[str, LazyTensor]) -> Groups:
    """Return PEFT's parts of a module."""
    a, b = both(parts, "A", "B")
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise ValueError(f"A {a.shape} and B {b.shape}: expected (in, r) and (r, out)")
    return {module: {A: factors.turned(a), B: factors.turned(b)}}
