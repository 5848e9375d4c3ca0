"""What `print(lora)` says: modules, parameters and their share, bytes of the file to come."""

from __future__ import annotations

from math import prod

from loratools.live.export import slice_groups
from loratools.live.modules._slices import outputs_of
from loratools.live.site import Handle


def summary(lora: Handle) -> str:
    """Return a line for each adapter: modules, parameters and their share of the model's, bytes, what it does now."""
    base = sum({id(p): prod(p.shape) for site in [lora.model] for p in site.parameters()}.values())
    own: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in lora.entries}
    modules: dict[str, set[str]] = {name: set() for name in lora.entries}
    every: set[int] = set()
    padding = {name: _padding(lora, name) for name in lora.entries}
    for name, child, path, _ in lora.children():
        for key, tensor in (*child.named_parameters(), *child.named_buffers()):
            if key not in ("places", "indices"):  # A0 and B0 are in the file, and no parameters
                count = 0 if key in ("A0", "B0") else tensor.numel()
                own[name][id(tensor)] = count, tensor.numel() * tensor.element_size()
        modules[name].add(path)
        every |= {id(p) for p in child.parameters()}
    base -= sum(p.numel() for p in {id(p): p for p in lora.model.parameters() if id(p) in every}.values())
    lines = []
    for name, entry in lora.entries.items():
        count, size = (sum(pair[i] for pair in own[name].values()) for i in (0, 1))
        size += padding[name]
        if not entry.trainable:  # it is saved as it came, whatever the dtype that it acts in
            size = sum(lazy.nbytes for lazy in entry.adapter.tensors().values())
        share = f"{100 * count / base:.2f} %" if base else "all"
        trained = ", trainable" if entry.trainable else ""
        lines.append(
            f"{name}: {len(modules[name])} modules, {count:,} of {readable(base).strip()} parameters ({share}), "
            f"{readable(size)}B{trained}"
        )
    return "\n".join(lines) or "no adapter"


def _padding(lora: Handle, name: str) -> int:
    """Return the bytes that a file has beyond the factors of slices: B and magnitudes of the outputs around them."""
    size = 0
    for path, pieces in slice_groups(lora, name).items():
        outputs, first = outputs_of(lora.sites[path]), pieces[0]
        Bs = [B for piece in pieces for B in (piece.B, piece.B0) if B is not None]
        size += (outputs * sum(B.shape[1] for B in Bs) - sum(B.numel() for B in Bs)) * first.B.element_size()
        if first.magnitude is not None:
            size += (outputs - sum(len(piece.B) for piece in pieces)) * first.magnitude.element_size()
    return size


def readable(number: float) -> str:
    """Return a number with three digits and k, M or G, and a space before the unit."""
    if number < 999.5:
        return f"{number:g} "
    for unit in "kMG":
        number /= 1000
        if number < 999.5 or unit == "G":
            return f"{number:.3g} {unit}"
    raise AssertionError
