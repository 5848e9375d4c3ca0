"""microsoft/loralib: `torch.save(lora_state_dict(model))`, names without `.weight`, and no alpha at all.

    lora_A (r, in)        lora_B (out, r)         Linear: B·A; Embedding, A (r, V) and B (d, r): (B·A)ᵀ
    lora_A (g·r, in)      lora_B (g·out/n, r)     MergedLinear: g of n projections; block i is B_i·A_i
    lora_A (r·k, in·k)    lora_B (out·k, r·k)     Conv2d with kernel k: (B·A).view(out, in, k, k)

s = alpha/r (loralib 0.1.2). The file holds neither alpha nor which projections are enabled: the user must say both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.adapter import factors
from loratools.adapter.model import Adapter, Loss
from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING, A, B
from loratools.dialects._frame import pickles
from loratools.dialects._frame.build import Draft, Groups, both, check_gathered, factors_of, is_embedding
from loratools.dialects._frame.listing import Evidence, Listing, by_convert
from loratools.dialects._frame.losses import (
    IDENTITY,
    identity_losses,
    left,
    name_losses,
    replacement_losses,
    update_losses,
    without,
)  # fmt: skip
from loratools.dialects._frame.metadata import tell_lost
from loratools.dialects._frame.numbers import most_common
from loratools.errors import BadFile, InvalidOption, UnsupportedAdapter
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor
from loratools.storage.pickles import SUFFIXES

if TYPE_CHECKING:
    import torch

SUMMARY = "microsoft/loralib: a state dict of lora_A and lora_B; alpha must be told (--alpha)"
EXTRA = None
FILES = SUFFIXES
CANNOT = (*IDENTITY, "alpha", "the name of the base model", "tensors trained whole but biases", "DoRA", "conv")

_NAME = re.compile(r"(.+)\.(lora_A|lora_B)")
_FILE = "lora.pt"


def detect(listing: Listing) -> Evidence | None:
    """Look for names that end in `lora_A` and `lora_B`."""
    return pickles.evidence(listing, 70, _NAME.fullmatch)


def read(listing: Listing) -> Adapter:
    """Read an adapter with the user's alpha; its biases take the place of the base's.

    Raises `UnsupportedAdapter` without an alpha, without the enabled projections of a MergedLinear, and for a file that
    also holds weights of the base, which contain ΔW already when they were saved in eval mode. Raises `BadFile` for all
    that does not fit together.
    """
    name = pickles.file_of(listing)
    if name is None:
        raise BadFile(f"{listing.path}: expected one file of torch.save")
    draft, tensors = Draft(listing.path), listing.tensors(name)
    biases: dict[str, LazyTensor] = {}
    weights = []
    check_gathered(listing.path, tensors)
    for tensor, lazy in tensors.items():
        if match := _NAME.fullmatch(tensor):
            draft.add(match[1], match[2], lazy, tensor)
        elif tensor.endswith("bias"):
            biases[tensor] = lazy
        else:
            weights.append(tensor)
    if weights:
        raise UnsupportedAdapter(
            f"{listing.path}: it holds weights of the base too, such as {weights[0]}; saved in eval mode they contain "
            "the change already, and it would be applied twice",
            hint="Save loralib.lora_state_dict(model) alone.",
        )
    if listing.alpha is None:
        raise UnsupportedAdapter(
            f"{listing.path}: loralib's files do not record alpha, and without it the scaling is unknown",
            hint=by_convert(listing, "--alpha NUMBER", "Give the lora_alpha that it was trained with"),
        )
    alpha, ranks, fused = listing.alpha, {}, []

    def change(module: str, parts: Mapping[str, LazyTensor]) -> Groups:
        a, b = both(parts, "lora_A", "lora_B")
        converted, ranks[module] = _to_peft(module, a, b, listing)
        fused.extend([module] if A in converted and converted[A] is a and converted[B] is not b else [])
        return {module: converted}

    draft.convert(change)
    draft.check()
    if draft.unknown:
        hint = by_convert(listing, "--enable-lora T,F,T", "Say which are, such as query and value of a fused weight")
        reason = f"{listing.path}: which projections are enabled is not recorded"
        raise UnsupportedAdapter(reason, draft.unknown, hint=hint)
    if listing.enabled is not None and not fused:
        raise InvalidOption(f"{listing.path}: no weight in it is of several projections, so none can be enabled")
    # The rank of the factors as built is g·r or r·k; with loralib's r, s = alpha/r.
    updates = draft.build(lambda module, rank: (alpha / ranks[module], alpha * rank / ranks[module]))
    return Adapter(updates, biases, dialect="loralib")


def losses(adapter: Adapter) -> list[Loss]:
    """List what loralib has no place for. Alpha always is a loss, and its line says which alpha to read it with."""
    lost = update_losses(adapter, "loralib", ("lora", "embedding"), (A, B, A_EMBEDDING, B_EMBEDDING))
    for module, update in without(adapter, lost).updates.items():
        if (A_EMBEDDING in update.parts) != is_embedding(module):
            lost.append(Loss(module, "its name does not show whether it is an embedding"))
    lost += [loss for loss in replacement_losses(adapter, "loralib") if not loss.where.endswith("bias")]
    alpha = Loss("alpha", f"loralib's files do not record it; convert this one again with --alpha {_alpha(adapter):g}")
    return [*lost, *name_losses(adapter), alpha, *identity_losses(adapter)]


def write(adapter: Adapter, target: Path, *, force: bool = False) -> Adapter:
    """Write the state dict. The file has one alpha, the most common s·r; B takes the ratio to it."""
    adapter = left(adapter, losses(adapter), target)
    alpha = _alpha(adapter)
    tensors = dict(adapter.replacements)
    for module, update in adapter.updates.items():
        a, b = factors_of(update)
        tensors[f"{module}.lora_A"] = a
        tensors[f"{module}.lora_B"] = factors.scaled(b, update.scaling * update.rank / alpha)
    tell_lost(adapter, target, "loralib")
    pickles.save(target, _FILE, tensors, force=force)
    return adapter


def _alpha(adapter: Adapter) -> float:
    """Return the most common s·r."""
    return most_common(update.scaling * update.rank for update in adapter.updates.values())


def _to_peft(module: str, a: LazyTensor, b: LazyTensor, listing: Listing) -> tuple[dict[str, LazyTensor], int]:
    """Return PEFT's parts, and loralib's r.

    Raises `ValueError` for factors that do not fit, `LookupError` for a MergedLinear without its enabled projections.
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or 0 in a.shape + b.shape or a.shape[0] % b.shape[1]:
        raise ValueError(f"lora_A {a.shape} and lora_B {b.shape} do not share a rank")
    groups, r = a.shape[0] // b.shape[1], b.shape[1]
    shape = _shape(module, listing)
    if groups > 1 or _single(b, shape, listing.enabled):
        return {A: a, B: _placed(b, groups, r, listing.enabled)}, r
    if len(shape) == 4:
        return _conv(a, b, shape), r // shape[-1]
    embedding = is_embedding(module)
    if shape and shape[0] != shape[1]:
        embedding = shape == (a.shape[1], b.shape[0])
    return ({A_EMBEDDING: a, B_EMBEDDING: b} if embedding else {A: a, B: b}), r


def _shape(module: str, listing: Listing) -> tuple[int, ...]:
    """Return the shape of the base's weight, or () where it is not known."""
    specs: Mapping[str, TensorSpec] = listing.base.specs if listing.base else {}
    names = (f"{module}.weight", f"{module}.conv.weight")
    return next((specs[name].shape for name in names if name in specs), ())


def _single(b: LazyTensor, shape: tuple[int, ...], enabled: tuple[bool, ...] | None) -> bool:
    """Tell whether these are the factors of the one enabled projection of several; the base's weight decides.

    Raises `LookupError` where such a one was told, and the base is not known.
    """
    if enabled is None or len(enabled) < 2 or sum(enabled) != 1:
        return False
    if not shape:
        raise LookupError("one projection of several, or a weight of its own: only the base model tells")
    return len(shape) == 2 and shape[0] == b.shape[0] * len(enabled)


def _placed(b: LazyTensor, groups: int, r: int, enabled: tuple[bool, ...] | None) -> LazyTensor:
    """Return B of rank g·r over all n projections: block i of rows in the columns of its own A, zeros elsewhere."""
    if enabled is None or sum(enabled) != groups or b.shape[0] % groups:
        stated = f"{sum(enabled)} enabled were told" if enabled else "none were told"
        raise LookupError(f"a MergedLinear with {groups} enabled projections of unknown places; {stated}")
    size, blocks, i = b.shape[0] // groups, [], 0
    for on in enabled:
        block = factors.rows(b, i * size, (i + 1) * size) if on else None
        blocks.append(
            factors.padded(block, 1, groups * r, start=i * r) if block else factors.zeros((size, groups * r), b.dtype)
        )
        i += on
    return factors.joined(blocks)


def _conv(a: LazyTensor, b: LazyTensor, shape: tuple[int, ...]) -> dict[str, LazyTensor]:
    """Return PEFT's factors of a convolution, of k times the rank, with the same ΔW.

    Row o·k + j of B·A is row j of the kernels of output o, seen as (k, in·k). So B' = [B_0 … B_{k-1}] side by side,
    where B_j holds the rows of that j, and A' = diag(A, …, A).
    """
    out, inputs, k, _ = shape
    if a.shape[1] != inputs * k or b.shape[0] != out * k or shape[2] != shape[3]:
        raise ValueError(f"lora_A {a.shape} and lora_B {b.shape} do not fit a convolution of shape {shape} (one group)")
    rank = a.shape[0]

    def down(tensor: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.kron(torch.eye(k, dtype=tensor.dtype), tensor).reshape(k * rank, inputs, k, k)

    def up(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(out, k * rank, 1, 1).contiguous()

    return {A: a.map(down, (k * rank, inputs, k, k)), B: b.map(up, (out, k * rank, 1, 1))}
