"""microsoft/loralib: `torch.save(lora_state_dict(model))`, names without `.weight`, and no alpha at all.

    lora_A (r, in)        lora_B (out, r)         Linear: B·A; Embedding, A (r, V) and B (d, r): (B·A)ᵀ
    lora_A (g·r, in)      lora_B (g·out/n, r)     MergedLinear: g of n projections; block i is B_i·A_i
    lora_A (r·k, in·k)    lora_B (out·k, r·k)     Conv2d with kernel k: (B·A).view(out, in, k, k)

s = alpha/r (loralib 0.1.2). Neither alpha nor which projections are enabled is in the file: both must be told.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from loratools.adapter import factors
from loratools.adapter.model import Adapter, Loss
from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING, A, B
from loratools.dialects._frame import build, pickles
from loratools.dialects._frame.listing import Evidence, Listing
from loratools.dialects._frame.losses import IDENTITY, identity, kept, replacements, updates
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage.lazy import LazyTensor
from loratools.storage.pickles.archive import SUFFIXES

SUMMARY = "microsoft/loralib: a state dict of lora_A and lora_B; alpha must be told (--alpha)"
EXTRA = None
FILES = SUFFIXES
CANNOT = (*IDENTITY, "alpha", "the name of the base model", "tensors trained whole but biases", "DoRA", "conv")

_NAME = re.compile(r"(.+)\.(lora_A|lora_B)")
_FILE = "lora.pt"


def detect(listing: Listing) -> Evidence | None:
    """Look for names that end in `lora_A` and `lora_B`."""
    factors_found = [name for name in pickles.names(listing) if _NAME.fullmatch(name)]
    if not factors_found:
        return None
    return Evidence(
        70, f"{len(factors_found)} of the tensors in {pickles.file_of(listing)} are called as {factors_found[0]}"
    )


def read(listing: Listing) -> Adapter:
    """Read an adapter with the alpha that was told; biases take the place of the base's.

    Raises `UnsupportedAdapter` where alpha, or what a MergedLinear enables, is not told, and where the base's weights
    are there too: saved in eval mode they contain ΔW already; `BadFile` for all that does not fit together.
    """
    name = pickles.file_of(listing)
    if name is None:
        raise BadFile(f"{listing.path}: expected one file of torch.save")
    factors_of: build.Groups = {}
    biases: dict[str, LazyTensor] = {}
    weights = []
    tensors = listing.tensors(name)
    build.check_gathered(listing.path, tensors)
    for tensor, lazy in tensors.items():
        if match := _NAME.fullmatch(tensor):
            factors_of.setdefault(match[1], {})[match[2]] = lazy
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
            hint="Give the lora_alpha that it was trained with: --alpha NUMBER.",
        )
    alpha, groups, ranks, faults, untold = listing.alpha, {}, {}, [], []
    for module, parts in factors_of.items():
        if missing := sorted({"lora_A", "lora_B"} - parts.keys()):
            faults.append(f"{module}.{missing[0]}: missing, while its partner is there")
            continue
        try:
            groups[module], ranks[module] = _to_peft(module, parts["lora_A"], parts["lora_B"], listing)
        except LookupError as error:
            untold.append(f"{module}: {error.args[0]}")
        except ValueError as error:
            faults.append(f"{module}: {error}")
    if faults:
        raise BadFile(f"{listing.path}: {len(faults)} problem(s) in this adapter", faults)
    if untold:
        hint = "Say which are: --enable-lora T,F,T for query and value of a query-key-value weight."
        raise UnsupportedAdapter(f"{listing.path}: which projections are enabled is not recorded", untold, hint=hint)
    built = build.build(listing.path, groups, lambda module, rank: _rule(alpha, ranks[module], rank))
    return Adapter(built, biases, dialect="loralib")


def losses(adapter: Adapter) -> list[Loss]:
    """List what loralib has no place for; alpha always is a loss, and the line says which one to tell the reader."""
    lost = updates(adapter, "loralib", ("lora", "embedding"), (A, B, A_EMBEDDING, B_EMBEDDING))
    for module, update in kept(adapter, lost).updates.items():
        if (A_EMBEDDING in update.parts) != (module.rpartition(".")[2] in build.EMBEDDINGS):
            lost.append(Loss(module, "its name does not show whether it is an embedding"))
    lost += [loss for loss in replacements(adapter, "loralib") if not loss.where.endswith("bias")]
    if adapter.base and adapter.base.id:
        lost.append(Loss("base model", f"its name, {adapter.base.id}"))
    lost.append(
        Loss("alpha", f"loralib's files do not record it; read this one again with --alpha {_alpha(adapter):g}")
    )
    return lost + identity(adapter)


def write(adapter: Adapter, target: Path, *, force: bool = False) -> None:
    """Write the state dict; what s·r has beyond the most common one goes into B."""
    adapter = kept(adapter, losses(adapter))
    alpha = _alpha(adapter)
    tensors = dict(adapter.replacements)
    for module, update in adapter.updates.items():
        names = (A_EMBEDDING, B_EMBEDDING) if A_EMBEDDING in update.parts else (A, B)
        tensors[f"{module}.lora_A"] = update.parts[names[0]]
        tensors[f"{module}.lora_B"] = factors.scaled(update.parts[names[1]], update.scaling * update.rank / alpha)
    pickles.save(target, _FILE, tensors, force=force)


def _alpha(adapter: Adapter) -> float:
    """Return the most common s·r."""
    counts = Counter(update.scaling * update.rank for update in adapter.updates.values() if update.scaling)
    return max(counts, key=lambda value: (counts[value], value), default=1.0)


def _rule(alpha: float, r: int, rank: int) -> tuple[float, float]:
    """Return s = alpha/r with loralib's r, and the alpha that gives it with the rank of the factors as built."""
    return alpha / r, alpha * rank / r


def _to_peft(module: str, a: LazyTensor, b: LazyTensor, listing: Listing) -> tuple[dict[str, LazyTensor], int]:
    """Return PEFT's parts, and loralib's r. Raises `LookupError` for a MergedLinear that is not explained."""
    if len(a.shape) != 2 or len(b.shape) != 2 or 0 in a.shape + b.shape or a.shape[0] % b.shape[1]:
        raise ValueError(f"lora_A {a.shape} and lora_B {b.shape} do not share a rank")
    groups, r = a.shape[0] // b.shape[1], b.shape[1]
    if groups > 1:
        return {A: a, B: _placed(b, groups, r, listing.enabled)}, r
    shape = _shape(module, listing)
    if len(shape) == 4:
        return _conv(a, b, shape), r // shape[-1]
    embedding = module.rpartition(".")[2] in build.EMBEDDINGS
    if shape and shape[0] != shape[1]:
        embedding = shape == (a.shape[1], b.shape[0])
    return ({A_EMBEDDING: a, B_EMBEDDING: b} if embedding else {A: a, B: b}), r


def _shape(module: str, listing: Listing) -> tuple[int, ...]:
    """Return the shape of the base's weight, or () where it is not known."""
    specs: Mapping[str, object] = listing.base.specs if listing.base else {}
    for name in (f"{module}.weight", f"{module}.conv.weight"):
        if name in specs:
            return tuple(getattr(specs[name], "shape", ()))
    return ()


def _placed(b: LazyTensor, groups: int, r: int, enabled: tuple[bool, ...] | None) -> LazyTensor:
    """Return B of rank g·r over all n projections: block i of rows in the columns of its own A, zeros elsewhere."""
    if enabled is None or sum(enabled) != groups or b.shape[0] % groups:
        stated = f"{sum(enabled)} enabled were told" if enabled else "none were told"
        raise LookupError(f"a MergedLinear with {groups} enabled projections of unknown places; {stated}")
    size = b.shape[0] // groups
    shape = (size * len(enabled), groups * r)

    def change(tensor: object) -> object:
        import torch

        assert isinstance(tensor, torch.Tensor)
        grown = tensor.new_zeros(shape)
        for i, place in enumerate(place for place, on in enumerate(enabled) if on):
            grown[place * size : (place + 1) * size, i * r : (i + 1) * r] = tensor[i * size : (i + 1) * size]
        return grown

    return b.map(change, shape)  # type: ignore[arg-type]


def _conv(a: LazyTensor, b: LazyTensor, shape: tuple[int, ...]) -> dict[str, LazyTensor]:
    """Return the factors of a convolution with the same ΔW, k times as many.

    Row o·k + j of B·A is row j of the slice of output o, seen as (k, in·k): so B' = [B_0 … B_{k-1}] side by side, B_j
    the rows of that j, and A' = diag(A, …, A).
    """
    out, inputs, k, _ = shape
    if a.shape[1] != inputs * k or b.shape[0] != out * k or shape[2] != shape[3]:
        raise ValueError(f"lora_A {a.shape} and lora_B {b.shape} do not fit a convolution of shape {shape} (one group)")
    rank = a.shape[0]

    def down(tensor: object) -> object:
        import torch

        assert isinstance(tensor, torch.Tensor)
        return torch.kron(torch.eye(k, dtype=tensor.dtype), tensor).reshape(k * rank, inputs, k, k)

    def up(tensor: object) -> object:
        import torch

        assert isinstance(tensor, torch.Tensor)
        return tensor.reshape(out, k * rank, 1, 1).contiguous()

    return {
        A: a.map(down, (k * rank, inputs, k, k)),  # type: ignore[arg-type]
        B: b.map(up, (out, k * rank, 1, 1)),  # type: ignore[arg-type]
    }
