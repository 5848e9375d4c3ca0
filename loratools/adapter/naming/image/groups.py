"""The image models that an adapter changes: their modules, the families that these can be of, and what readers want.

A family is read under whichever of its namings the names are, and written under the one that a reader knows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.image import readings
from loratools.adapter.naming.image.components import COMPONENTS, component
from loratools.adapter.naming.image.families import Family, Naming
from loratools.adapter.naming.image.readings import Lead, Reading

ORIGINAL = "diffusion_model"
"""ComfyUI's name for the image model of a checkpoint: the component of all modules with the original's names."""

Reader = Literal["diffusers", "comfy", "kohya"]
"""Who reads names: diffusers, ComfyUI, kohya's trainers."""

_STATED = ("modelspec.architecture", "ss_base_model_version", "ss_base_model", "ss_sd_model_name")


@dataclass(frozen=True, slots=True)
class Group:
    """The modules of one model in an adapter: the component before their names, "" without one, and their updates.

    `fits` are the readings that have all the names, `readings` those that what else the adapter tells leaves of them.
    """

    prefix: str
    updates: Mapping[str, Update]
    fits: tuple[Reading, ...]
    readings: tuple[Reading, ...]

    def leads(self, reading: Reading, to: Naming) -> dict[str, Lead]:
        """Return where each name leads; a bias that changes alone goes with its module."""
        return readings.leads(reading, map(module_of, self.updates), to)

    def target(self, reading: Reading, reader: Reader) -> tuple[Naming, str] | None:
        """Return the naming in which a reader knows a family, and what stands before names in an `Adapter`.

        None for names that the reader does not read.
        """
        family = reading.at("original").family if reader != "diffusers" else reading.family
        if reader != "diffusers" and reader not in family.prefixes:
            return None
        if reader == "comfy":
            return "diffusers" if family.diffusers_in_comfy else "original", f"{ORIGINAL}."
        if reader == "kohya" and family.kohya == "original":
            return family.kohya, f"{ORIGINAL}."
        return "diffusers", home(self.prefix, family)

    def decided(self, reader: Reader) -> list[tuple[Reading, Naming, str]]:
        """Return a reading of each outcome, with its target: several where it is open which family's the names are.

        Of readings that lead to the same names the first is returned that has the most to say of sizes.
        """
        outcomes: list[tuple[Reading, Naming, str, dict[str, Lead]]] = []
        direct = self._direct(reader)
        if reader == "kohya" and self.stays:
            direct = [(way, self._kept(way)) for way, _ in direct]
        for reading, (to, prefix) in direct or self._around(reader):
            leads = self.leads(reading, to)
            if reader == "kohya" and _same_names(reading, to, leads):
                prefix = home(self.prefix, reading.family)  # whose names are diffusers' too
            same = [number for number, (_, _, before, other) in enumerate(outcomes)
                    if before == prefix and alike(leads, other)]  # fmt: skip
            if not same:
                outcomes.append((reading, to, prefix, leads))
            elif _definite(leads) > _definite(outcomes[same[0]][3]):
                outcomes[same[0]] = (reading, to, prefix, leads)
        return [(reading, to, prefix) for reading, to, prefix, _ in outcomes]

    @property
    def stays(self) -> bool:
        """Tell whether kohya's names are open, as of a few modules that UNets share: then they stay as they are."""
        ways = self._direct("kohya")
        return len({to for _, (to, _) in ways}) > 1 and all(way.family.component == "unet" for way, _ in ways)

    def _direct(self, reader: Reader) -> list[tuple[Reading, tuple[Naming, str]]]:
        """Return the readings whose names this reader knows, with their targets."""
        return [(way, target) for way in self.readings if (target := self.target(way, reader)) is not None]

    def _kept(self, reading: Reading) -> tuple[Naming, str]:
        """Return the target that leaves this group's names as they are."""
        own = f"{ORIGINAL}." if reading.naming == "original" else home(self.prefix, reading.family)
        return reading.naming, own

    def _around(self, reader: Reader) -> list[tuple[Reading, tuple[Naming, str]]]:
        """Return readings with their targets by the other names that a reader has for the same models."""
        modules = [module_of(name) for name in self.updates]
        ways = [other for reading in self.readings for other in reading.others(modules)]
        return [(way, target) for way in ways if (target := self.target(way, reader)) is not None]


def home(prefix: str, family: Family) -> str:
    """Return what stands before diffusers' names of a group: its own component, else the family's."""
    return prefix if prefix.removesuffix(".") in COMPONENTS else f"{family.component}."


def groups(adapter: Adapter) -> list[Group]:
    """Return the image models that an adapter changes, each with the readings that fit all its modules."""
    by_model: dict[tuple[str, str], dict[str, Update]] = defaultdict(dict)
    for module, update in adapter.updates.items():
        first, _, name = module.partition(".")
        if first == ORIGINAL or (first in COMPONENTS and not first.startswith("text_encoder")):
            part = readings.beside(module_of(name)) if first == ORIGINAL else ""
            by_model[f"{first}.", part][name] = update
    hints, encoders = _hints(adapter), {c for c in map(component, adapter.updates) if c.startswith("text_encoder")}
    return [
        Group(prefix, updates, *_readings(prefix, updates, hints, encoders))
        for (prefix, _), updates in by_model.items()
    ]


def component_of(reading: Reading, modules: Iterable[str]) -> str:
    """Return what stands before these bare names in an `Adapter`: diffusers' component where it has the same names."""
    places = readings.leads(reading, modules, "diffusers")
    return reading.family.component if all(lead.names == (name,) for name, lead in places.items()) else ORIGINAL


def stated(metadata: Mapping[str, str]) -> str:
    """Return what a file's header says of the base model, in lower case."""
    return "\n".join(str(metadata[key]).lower() for key in _STATED if key in metadata)


def module_of(name: str) -> str:
    """Return the module whose name this is: a bias that changes alone has that of its module."""
    return name.removesuffix(".bias")


def prefixes(adapter: Adapter, reader: str) -> dict[str, str]:
    """Return component -> what stands before its modules' names in a file for a reader, where families agree on it."""
    own = [(group.prefix[:-1], reading.family.prefixes.get(reader))
           for group in groups(adapter) for reading in group.readings]  # fmt: skip
    return _agreed((name, prefix) for name, prefix in own if prefix) | (
        encoders(adapter, 0) if reader == "kohya" else {}
    )


def encoders(adapter: Adapter, of: Literal[0, 1] = 1) -> dict[str, str]:
    """Return component -> what kohya's files (0) or ComfyUI's (1) call a text encoder, where families agree on it."""
    return _agreed(
        (component, names[of])
        for group in groups(adapter)
        for reading in group.readings
        for component, names in reading.family.encoders.items()
    )


def _agreed(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    several: dict[str, set[str]] = defaultdict(set)
    for name, value in pairs:
        several[name].add(value)
    return {name: values.pop() for name, values in several.items() if len(values) == 1}


def alike(leads: Mapping[str, Lead], others: Mapping[str, Lead]) -> bool:
    """Tell whether two readings of the same modules lead to the same names, with sizes that do not contradict."""
    return all(lead.agrees(others[module]) for module, lead in leads.items())


def _same_names(reading: Reading, to: Naming, leads: Mapping[str, Lead]) -> bool:
    """Tell whether names to which modules lead are diffusers' too."""
    names = {name for lead in leads.values() for name in lead.names}
    return component_of(reading.at(to), names) != ORIGINAL


def _definite(leads: Mapping[str, Lead]) -> int:
    return sum(share is not None for lead in leads.values() for share in lead.shares)


def _readings(
    prefix: str, updates: Mapping[str, Update], hints: str, encoders: set[str]
) -> tuple[tuple[Reading, ...], tuple[Reading, ...]]:
    """Return the readings that fit a group, and what is left of them; what stands before names speaks for a naming."""
    own, usual = prefix[:-1].removesuffix("_2"), "original" if prefix == f"{ORIGINAL}." else "diffusers"
    fits = readings.fitting(map(module_of, updates), components=None if own == ORIGINAL else (own,))
    fits = [reading for reading in fits if reading.naming == usual] or fits
    left = [reading for reading in fits if encoders <= reading.family.encoders.keys()] or fits
    return tuple(fits), tuple(readings.told(left, {name: update.shape for name, update in updates.items()}, hints))


def _hints(adapter: Adapter) -> str:
    """Return what an adapter states of its base, in lower case."""
    metadata = adapter.settings.get("metadata", {})
    return "\n".join(((adapter.base.id if adapter.base else None) or "", stated(metadata))).lower()
