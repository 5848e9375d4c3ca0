"""The blocks of families of image and video models, in order: what is in no block first, then block by block.

The lists of blocks, their order and their lengths are those that a family states (`adapter/naming/image/families/`); a
family that states no lengths has the lists that an adapter shows. A model may have more or fewer blocks than published
ones: then they are counted in the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

from loratools.adapter.model import Adapter
from loratools.adapter.naming.image import families
from loratools.adapter.naming.image.components import component, inside
from loratools.adapter.naming.image.families import Family
from loratools.adapter.naming.image.groups import ORIGINAL, Group, groups, module_of
from loratools.adapter.naming.image.readings import ENCODER, Reading

Lists = tuple[tuple[str, int], ...]
"""Lists of blocks by their names, with their lengths."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A model's blocks: `reading` tells whose names its modules have, `lists` the blocks in order."""

    reading: Reading
    lists: Lists

    def __len__(self) -> int:
        return 1 + sum(length for _, length in self.lists)

    def __str__(self) -> str:
        lists = ", ".join(f"{length} for {name}" for name, length in self.lists)
        return f"{len(self)} of {self.reading.family.summary} (1 for what is in no block, {lists})"

    @property
    def names(self) -> tuple[str, ...]:
        """The places in order."""
        return ("outside", *(f"{name}.{number}" for name, length in self.lists for number in range(length)))

    def place(self, module: str) -> int:
        """Return which place a module has, by its name with or without its component: 0 in no block."""
        if component(module).removesuffix("_2") not in ("", self.reading.family.component):
            return 0
        for name in _names(module):
            if (block := _block(self.reading, name)) is not None:
                start = 1
                for blocks, length in self.lists:
                    if blocks == block[0]:
                        return start + block[1]
                    start += length
                return 0
        return 0


def layouts(adapter: Adapter) -> tuple[Layout, ...]:
    """Return the layouts that the blocks of the image models which an adapter changes may have.

    What stands beside a model in its file, and text encoders, are in no block. A family whose blocks lie in levels, as
    those of a UNet, has none of these layouts.
    """
    models = [group for group in groups(adapter) if not any(each.family.beside for each in group.readings)]
    every = [layout for group in models for each in group.readings for layout in layouts_of(group, each)]
    return tuple(dict.fromkeys(every))


def layouts_of(group: Group, reading: Reading) -> Iterator[Layout]:
    """Yield the layouts of a model's modules under one reading: as published models have them, and as it shows."""
    seen: dict[str, int] = {}
    for name in group.updates:
        block, number = _block(reading, name) or ("", 0)
        seen[block] = max(seen.get(block, 0), number + 1)
    stated = [(blocks, depths) for blocks, depths in _lists(reading) if blocks in seen or (depths and 0 not in depths)]
    lengths = [
        [depth for depth in depths if depth >= max(seen.get(blocks, 0), 1)] or [seen.get(blocks, 0)]
        for blocks, depths in stated
    ]
    shown = [seen.get(blocks, 0) for blocks, _ in stated]
    for chosen in dict.fromkeys([*product(*lengths), tuple(shown)] if stated else []):
        if any(chosen):
            yield Layout(reading, tuple((blocks, n) for (blocks, _), n in zip(stated, chosen, strict=True) if n))


def _names(module: str) -> Iterator[str]:
    """Yield the names under which a family may know a module, or the module of a tensor."""
    for name in dict.fromkeys((module, inside(module).removeprefix(f"{ORIGINAL}."))):
        yield from (module_of(name), name.rpartition(".")[0])


def _block(reading: Reading, module: str) -> tuple[str, int] | None:
    """Return the list of blocks that a module is in, with its number, ("", 0) outside; None without such a module."""
    if (found := reading.find(module_of(module))) is None:
        return None
    pattern, numbers = found
    blocks = pattern.split(".{}")[0]
    return (blocks, int(numbers[0])) if numbers and blocks in dict(_lists(reading)) else ("", 0)


def _lists(reading: Reading) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the lists of blocks of a family under a naming, in order, with the depths that it states."""
    side = int(reading.naming == "diffusers")
    return tuple((names[side], depths) for names, depths in _of_family(reading.name))


@cache
def _of_family(name: str) -> tuple[tuple[tuple[str, str], tuple[int, ...]], ...]:
    """Return the lists of a family by their (original, diffusers') names, in the order of its depths, else of names."""
    family = families.get(name)
    lists = [(pair, family.depths.get(pair[0]) or family.depths.get(pair[1]) or ()) for pair in _pairs(family)]
    if family.depths:
        order = list(family.depths)
        first = {pair: min(order.index(side) for side in pair if side in order) for pair, depths in lists if depths}
        lists = sorted(((pair, depths) for pair, depths in lists if depths), key=lambda each: first[each[0]])
    every: list[tuple[tuple[str, str], tuple[int, ...]]] = []
    for (original, diffusers), depths in lists:  # a list is one other's, under its first name
        if all(original != pair[0] and diffusers != pair[1] for pair, _ in every):
            every.append(((original, diffusers), depths))
    return tuple(every) if family.component not in ("unet", ENCODER) else ()


def _pairs(family: Family) -> list[tuple[str, str]]:
    """Return the lists of blocks by their names in the original and in diffusers."""
    whole = [
        *family.renames.items(),
        *((theirs, part) for theirs, fused in family.fused.items() for part in fused.parts),
        *((part, ours) for ours, fused in family.split.items() for part in fused.parts),
    ]
    return list(dict.fromkeys((a.split(".{}")[0], b.split(".{}")[0]) for a, b in whole if ".{}" in a and ".{}" in b))
