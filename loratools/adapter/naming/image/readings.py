"""Whose names an adapter's modules have: the families that fit, what tells them apart, and where each name leads.

A family fits if one of its namings has all the names. Of several that fit, those that lead to the same names are one.
Where they differ shapes tell, or what the file says of its base, or the depths that published models have; a base that
is given decides by its own names. What is still open is nobody's guess: the caller refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from loratools.adapter.naming.image import families
from loratools.adapter.naming.image.families import Family, Naming
from loratools.adapter.naming.image.patterns import Patterns, forms_of
from loratools.decisions import warned

Shapes = Mapping[str, tuple[int, ...]]

_UNKNOWN, _LONGEST, _ALL = -1, 1, 2
"""How well lists of blocks reach a published depth; a family whose depths are not known yields to `_ALL` only."""

ENCODER = "text_encoder"
"""The component of all families of text encoders, whichever of a pipeline's they are."""

NAMINGS: tuple[Naming, Naming] = ("original", "diffusers")


@dataclass(frozen=True, slots=True)
class Reading:
    """A way to read names: as those of a family, under one of its namings.

    `written` is the family whose original names the modules get, where that is another one of the same models.
    """

    name: str
    naming: Naming
    written: str = ""

    @property
    def family(self) -> Family:
        """The family."""
        return families.get(self.name)

    def at(self, to: Naming) -> Reading:
        """Return how the names are read to which this reading leads in a naming."""
        return Reading(self.written or self.name if to == "original" else self.name, to)

    def others(self, modules: Iterable[str]) -> list[Reading]:
        """Return the same reading for each family of the same models that has all the modules by other names."""
        patterns = {found[0] for module in modules if (found := self.find(module))}
        return [
            replace(self, written=name)
            for name in _same_models(self.name)
            if patterns <= _table(self.name, self.naming, "original", name).keys()
        ]

    def find(self, module: str, *, flat: bool = False) -> tuple[str, tuple[str, ...]] | None:
        """Return the pattern that a module fits, with its numbers."""
        return _patterns(self.name, self.naming, flat).find(module)

    def has_any(self, forms: Iterable[str], *, flat: bool = False) -> bool:
        """Tell whether the naming has names of any of these forms (`patterns.form_of`)."""
        return _patterns(self.name, self.naming, flat).has_any(forms)

    def fits(self, modules: Iterable[str], *, flat: bool = False) -> bool:
        """Tell whether the naming has all these modules."""
        patterns = _patterns(self.name, self.naming, flat)
        return all(patterns.find(module) for module in modules)


@dataclass(frozen=True, slots=True)
class Lead:
    """Where a module leads to in the other naming.

    `names`   its name there, or those of its parts
    `shares`  their output features as `Fused` has them; of the whole weight, where the module is a part
    `part`    which part of the named weight it is; None for all of it
    `whole`   the whole weight's output : input features, where the module is a part and the family knows them
    `swapped` whether the halves of its output features change places; `swapped_if` the one output : input features at
              which they do
    """

    names: tuple[str, ...]
    shares: tuple[float | None, ...] = ()
    part: int | None = None
    whole: tuple[int, int] | None = None
    swapped: bool = False
    swapped_if: tuple[int, int] | None = None

    def agrees(self, other: Lead) -> bool:
        """Tell whether two lead to the same, where a share that one leaves open may be any."""
        if replace(self, shares=(), whole=None) != replace(other, shares=(), whole=None) or len(self.shares) != len(
            other.shares
        ):
            return False
        return all(a == b or None in (a, b) for a, b in zip(self.shares, other.shares, strict=True))

    def swaps(self, shape: tuple[int, ...]) -> bool:
        """Tell whether the halves of the output features of a weight of this shape change places."""
        out, width = self.swapped_if or (0, 0)
        return self.swapped or (bool(out) and len(shape) > 1 and shape[0] * width == shape[1] * out)


def fitting(modules: Iterable[str], *, flat: bool = False, components: Iterable[str] | None = None) -> list[Reading]:
    """Return every reading that has all the modules, by family; none where there are no modules.

    `components` are those whose families may fit. Default: all but text encoders, and what stands beside a model only
    where no model has the names.
    """
    wanted = list(modules)
    fits = [reading for reading in every(components) if reading.fits(wanted, flat=flat)] if wanted else []
    return fits if components is not None else [reading for reading in fits if not reading.family.beside] or fits


def every(components: Iterable[str] | None = None) -> list[Reading]:
    """Return all readings of families of these components. Default: of all but text encoders."""
    allowed = None if components is None else set(components)
    return [
        Reading(name, naming)
        for name in families.names()
        for naming in NAMINGS
        if (families.get(name).component != ENCODER if allowed is None else families.get(name).component in allowed)
    ]


def beside(name: str, *, flat: bool = False) -> str:
    """Return the family whose modules stand beside those of the model in its file, if it has this one; else ""."""
    return next((each for each in _beside() if _patterns(each, "original", flat).find(name)), "")


def leads(reading: Reading, modules: Iterable[str], to: Naming) -> dict[str, Lead]:
    """Return where each of the modules, all of which fit, leads to."""
    table = _table(reading.name, reading.naming, to, reading.written or reading.name)
    places: dict[str, Lead] = {}
    for module in modules:
        pattern, numbers = reading.find(module) or (module, ())
        lead = table[pattern]
        places[module] = replace(lead, names=tuple(name.format(*numbers) for name in lead.names))
    return places


def told(readings: Sequence[Reading], shapes: Shapes, hints: str = "", *, flat: bool = False) -> list[Reading]:
    """Return those that shapes, statements, and depths leave of readings that fit all modules of `shapes`.

    `hints` is what the file says of its base, in lower case. A shape of one side or none tells nothing. A model that is
    as wide as a published one is that rather than another; what is as wide as none of them may be any.
    """
    left = [reading for reading in readings if _in_proportion(reading, shapes, flat)]
    left = [reading for reading in left if any(re.search(p, hints) for p in reading.family.called)] or left
    left = [reading for reading in left if _as_wide(reading, shapes, flat)] or left
    reached = {reading: _reached(reading, shapes, flat) for reading in left}
    left = [reading for reading in left if reached[reading] is not None] or left
    best = max((level for level in reached.values() if level is not None), default=0)
    least = {*range(max(best, 0), _ALL + 1), *([_UNKNOWN] if best < _ALL else [])}
    left = [reading for reading in left if (reached[reading] or 0) in least]
    there = {reading.name for reading in left}
    usual = [reading for reading in left if there.isdisjoint(reading.family.rather)] if best == _ALL else left
    if len(usual) < len(left):
        others = summaries(reading for reading in left if reading not in usual)
        warned(
            "the names, widths and numbers of blocks are those of %s and of %s alike; they are read as %s: give the "
            "base model (--base) where it is another", summaries(usual), others, summaries(usual),
        )  # fmt: skip
    return usual


def most(modules: Iterable[str]) -> tuple[int, list[Reading]]:
    """Return how many of the modules the readings have that have the most, and those; of families of image models."""
    forms = forms_of(modules)
    counts = {reading: _patterns(reading.name, reading.naming, False).count(forms) for reading in every()}
    best = max(counts.values(), default=0)
    return best, [reading for reading, count in counts.items() if count == best]


def summaries(readings: Iterable[Reading]) -> str:
    """Return the families of readings in words, each once."""
    return ", ".join(dict.fromkeys(reading.family.summary for reading in readings))


def _in_proportion(reading: Reading, shapes: Shapes, flat: bool) -> bool:
    """Tell whether no module contradicts the family's proportions."""
    if reading.naming != "original":
        return True
    wanted = reading.family.proportions
    for module, shape in shapes.items():
        found = reading.find(module, flat=flat) if len(shape) == 2 else None
        out, width = wanted.get(found[0], (0, 0)) if found else (0, 0)
        if out and shape[0] * width != shape[1] * out:
            return False
    return True


def _as_wide(reading: Reading, shapes: Shapes, flat: bool) -> bool:
    """Tell whether modules have the input features of a published model, all that are known."""
    known = []
    for module, shape in shapes.items():
        found = reading.find(module, flat=flat) if len(shape) == 2 else None
        widths = reading.family.inputs.get(found[0], ()) if found else ()
        known += [shape[1] in widths] if widths else []
    return bool(known) and all(known)


def _reached(reading: Reading, modules: Iterable[str], flat: bool) -> int | None:
    """Return how well lists of blocks are as long as those of a published model.

    None where one is longer than any published; 0 where the longest is not as long.
    """
    lengths: dict[str, int] = {}
    for module in modules:
        pattern, numbers = reading.find(module, flat=flat) or ("", ())
        if numbers:
            blocks = pattern.split(".{}")[0]
            lengths[blocks] = max(lengths.get(blocks, 0), int(numbers[0]) + 1)
    depths = reading.family.depths
    known = {blocks: length for blocks, length in lengths.items() if blocks in depths}
    if any(length > max(depths[blocks]) for blocks, length in known.items()):
        return None
    if not known:
        return _UNKNOWN
    longest = max(known, key=lambda blocks: known[blocks])
    if all(length in depths[blocks] for blocks, length in known.items()):
        return _ALL
    return _LONGEST if known[longest] in depths[longest] else 0


@cache
def _patterns(name: str, naming: Naming, flat: bool) -> Patterns:
    family = families.get(name)
    return Patterns(family.original if naming == "original" else family.diffusers, flat=flat)


@cache
def _beside() -> tuple[str, ...]:
    return tuple(name for name, family in families.every() if family.beside)


@cache
def _same_models(name: str) -> tuple[str, ...]:
    """Return the other families of the same models."""
    usual = families.get(name).like or name
    return tuple(other for other, family in families.every() if (family.like or other) == usual and other != name)


@cache
def _table(name: str, naming: Naming, to: Naming, written: str) -> Mapping[str, Lead]:
    """Return pattern -> where it leads, from one naming to one; `written` is the family whose original names it has."""
    if to == "original" and written != name:
        return _across(_table(name, naming, "diffusers", name), _table(written, "diffusers", to, written))
    family = families.get(name)
    if naming == to:
        return {pattern: Lead((pattern,)) for pattern in (family.original if to == "original" else family.diffusers)}
    forth = naming == "original"
    table = {}
    for theirs, ours in family.renames.items():
        source, target = (theirs, ours) if forth else (ours, theirs)
        table[source] = Lead((target,), swapped=theirs in family.swapped, swapped_if=family.swapped_if.get(theirs))
    for whole, fused in (family.fused if forth else family.split).items():
        table[whole] = Lead(fused.parts, fused.shares)
    for whole, fused in (family.split if forth else family.fused).items():
        sides = family.proportions.get(whole)
        table |= {part: Lead((whole,), fused.shares, number, sides) for number, part in enumerate(fused.parts)}
    return table


def _across(forth: Mapping[str, Lead], back: Mapping[str, Lead]) -> dict[str, Lead]:
    """Return where patterns lead that lead to diffusers' names, and from there to other original names."""
    table = {}
    for pattern, lead in forth.items():
        ways = [back.get(name) for name in lead.names]
        known = [way for way in ways if way is not None]
        if len(known) < len(ways) or lead.part is not None or lead.swapped_if or any(way.swapped_if for way in known):
            continue
        whole = {way.names for way in known}
        if len(ways) == 1:
            table[pattern] = replace(known[0], swapped=lead.swapped != known[0].swapped)
        elif len(whole) == 1 and [way.part for way in known] == list(range(len(known[0].shares))):
            table[pattern] = Lead(known[0].names)
        elif all(way.part is None and len(way.names) == 1 and not way.swapped for way in known):
            table[pattern] = Lead(tuple(way.names[0] for way in known), lead.shares)
    return table
