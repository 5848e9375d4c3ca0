"""The updates of an image model under other names: renamed, taken apart, fused, or with halves that change places."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from loratools.adapter.kinds import Update
from loratools.adapter.naming.image.families import Naming
from loratools.adapter.naming.image.groups import Group, module_of
from loratools.adapter.naming.image.readings import Lead, Reading

Parts = Mapping[int, tuple[str, Update]]
Sizes = Callable[[str], int | None]
"""Of a module under its new name: its output features, where they are known."""


class Fusing(Protocol):
    """How to take fused projections apart and to fuse them: the functions of `fusing/products.py`, or of `rows.py`."""

    def apart(self, update: Update, sizes: Sequence[int]) -> list[Update | None]:
        """Return the updates of consecutive blocks of output features."""
        ...

    def together(self, blocks: Sequence[Update | None], sizes: Sequence[int]) -> Update:
        """Return one update of the consecutive blocks."""
        ...

    def swapped(self, update: Update) -> Update:
        """Return the update with the two halves of its output features swapped."""
        ...


def translated(group: Group, reading: Reading, to: Naming, new: str, by: Fusing, known: Sizes) -> dict[str, Update]:
    """Return a group's updates in a naming, with `new` before the names; what cannot be divided or joined as it is.

    `known` has the output features of modules under their new names, for fused weights of any proportions.
    """
    places, updates = group.leads(reading, to), dict[str, Update]()
    joined: dict[str, dict[int, tuple[str, Update]]] = defaultdict(dict)
    into: dict[str, Lead] = {}
    for name, update in group.updates.items():
        lead = places[module_of(name)]
        targets = [new + target + name.removeprefix(module_of(name)) for target in lead.names]
        if lead.part is not None:
            joined[targets[0]][lead.part] = group.prefix + name, update
            into[targets[0]] = lead
        elif len(targets) > 1:
            updates |= _apart(group.prefix + name, update, targets, lead.shares, by, known)
        else:
            updates |= _one(group.prefix + name, targets[0], update, by, swap=lead.swaps(update.shape))
    for name, parts in joined.items():
        first = next(iter(parts.values()))[1]
        present = [parts[i][1].shape[0] if i in parts else None for i in range(len(into[name].shares))]
        sizes = _sizes(into[name].shares, first.shape[1:2], known(name) or _total(into[name], first.shape), present)
        updates |= together(name, parts, sizes, by) if sizes else dict(parts.values())
    return updates


def together(name: str, parts: Parts, sizes: Sequence[int], by: Fusing) -> dict[str, Update]:
    """Return the parts of a fused weight as its one update, or under their own names where that cannot be.

    `parts` are (module, update) by their place in the weight, `sizes` the output features of all places.
    """
    blocks = [parts[i][1] if i in parts else None for i in range(len(sizes))]
    apart = dict(parts.values())
    try:
        fits = all(update.shape[0] == sizes[i] for i, (_, update) in parts.items())
        return {name: by.together(blocks, sizes)} if fits else apart
    except ValueError:
        return apart


def _sizes(
    shares: Sequence[float | None], width: Sequence[int], total: int | None, known: Sequence[int | None]
) -> tuple[int, ...] | None:
    """Return the output features of the parts of a fused weight; None where they cannot be told, or contradict it.

    `width` is (input features,), `total` the whole weight's output features and `known` those of parts, where known.
    """
    if not width:
        return None
    asked = [None if share is None else round(share * width[0]) for share in shares]
    if total is None and any(None not in pair and pair[0] != pair[1] for pair in zip(asked, known, strict=True)):
        return None
    sizes = [size if size is not None else wanted for size, wanted in zip(known, asked, strict=True)]
    left = sizes.count(None)
    equal = {size for size, share in zip(known, shares, strict=True) if share is None and size is not None}
    if left and total is not None:
        each, rest = divmod(total - sum(size or 0 for size in sizes), left)
        if rest or each <= 0:
            return None
    elif left and len(equal) == 1:
        each = equal.pop()
    elif left:
        return None
    whole = tuple(each if size is None else size for size in sizes)
    return whole if total in (None, sum(whole)) else None


def _total(lead: Lead, shape: Sequence[int]) -> int | None:
    """Return the output features of the whole weight that a part of this shape leads to, where its family knows."""
    out, width = lead.whole or (0, 0)
    return shape[1] * out // width if out and len(shape) > 1 and not shape[1] * out % width else None


def _apart(
    old: str, update: Update, new: Sequence[str], shares: Sequence[float | None], by: Fusing, known: Sizes
) -> dict[str, Update]:
    sizes = _sizes(shares, update.shape[1:2], update.shape[0], [known(name) for name in new])
    if sizes is None:
        return {old: update}
    try:
        blocks = by.apart(update, sizes)
    except ValueError:
        return {old: update}
    return {name: block for name, block in zip(new, blocks, strict=True) if block is not None}


def _one(old: str, new: str, update: Update, by: Fusing, *, swap: bool) -> dict[str, Update]:
    if not swap:
        return {new: update}
    try:
        return {new: by.swapped(update)}
    except ValueError:
        return {old: update}
