"""The module names of known architectures, shipped as short lists in `_keys`: how a flattened name finds its dots.

kohya's names have `_` for every `.`: `down_blocks_0_attentions_0_proj_in`. Such a name does not tell which `_` was a
dot, so readers look it up among the names of the base or of these architectures, and never take it apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent / "_keys"
_BRACES = re.compile(r"\{([^{}]*)\}")  # without others in them
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True, slots=True)
class Architecture:
    """One list: its name, the component whose modules it lists (`diffusion_model` for originals), flat -> dotted."""

    name: str
    component: str
    by_flat: Mapping[str, str]


@cache
def names() -> tuple[str, ...]:
    """Return the names of all lists, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.txt")))


@cache
def get(name: str) -> Architecture:
    """Return one list; raise `ValueError` if two of its names become one when flattened."""
    lines = [line for line in (_FOLDER / f"{name}.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    component = lines[0].removeprefix("component ")
    return Architecture(name, component, flatten(module for line in lines[1:] for module in expand(line)))


def expand(pattern: str) -> list[str]:
    """Expand braces as a shell does: `{a,b}` and `{0..2}`, also within each other.

    >>> expand("x.{0..1}.{q,k.{a,b}}")
    ['x.0.q', 'x.0.k.a', 'x.0.k.b', 'x.1.q', 'x.1.k.a', 'x.1.k.b']
    """
    return list(dict.fromkeys(_expanded(pattern)))


def flatten(modules: Iterable[str]) -> dict[str, str]:
    """Return flat -> dotted; raise `ValueError` for two names that are one when flattened."""
    by_flat: dict[str, str] = {}
    for module in modules:
        flat = module.replace(".", "_")
        if by_flat.setdefault(flat, module) != module:
            raise ValueError(f"{by_flat[flat]} and {module} both become {flat}")
    return by_flat


def explain(flat: Iterable[str], components: Iterable[str]) -> list[tuple[Architecture, dict[str, str]]]:
    """Return each architecture that knows all of these flat names, with their dotted ones; the same reading once."""
    wanted, allowed = sorted(set(flat)), set(components)
    readings: list[tuple[Architecture, dict[str, str]]] = []
    for architecture in map(get, names()):
        if architecture.component in allowed and all(name in architecture.by_flat for name in wanted):
            reading = {name: architecture.by_flat[name] for name in wanted}
            if all((architecture.component, reading) != (other.component, known) for other, known in readings):
                readings.append((architecture, reading))
    return readings


def knowing(modules: Iterable[str], components: Iterable[str]) -> list[Architecture]:
    """Return each architecture that has all of these dotted names."""
    wanted, allowed = set(modules), set(components)
    return [
        architecture
        for architecture in map(get, names())
        if architecture.component in allowed and wanted <= set(architecture.by_flat.values())
    ]


def _expanded(pattern: str) -> Iterator[str]:
    braces = _BRACES.search(pattern)
    if braces is None:
        yield pattern
        return
    span = _RANGE.fullmatch(braces[1])
    choices = map(str, range(int(span[1]), int(span[2]) + 1)) if span else braces[1].split(",")
    for choice in choices:
        yield from _expanded(pattern[: braces.start()] + choice + pattern[braces.end() :])
