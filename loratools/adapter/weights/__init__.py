"""The weight of an adapter: one number, one for each module pattern, or one for each block of an image model.

blocks    lists with a number for each block of Stable Diffusion's UNet or of Flux.1, as image people write them
layouts   the blocks of every other family, by what it states of itself
scaled    an adapter whose scalings have the weights in them, for a merge
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loratools.adapter.naming.selection import matches
from loratools.decisions import warned
from loratools.errors import InvalidOption, LoraToolsError
from loratools.options import is_finite

if TYPE_CHECKING:
    from loratools.adapter.model import Adapter
    from loratools.adapter.weights.layouts import Layout

BLOCKS = "lbw:"
"""What begins a list of block weights."""


@dataclass(frozen=True, slots=True)
class Weight:
    """`default` for every module but those that a pattern names (the first that matches wins), or that a block holds.

    `numbers` is a list for blocks, which `bound` tells by an adapter: then every module must be in one of the `blocks`
    of Stable Diffusion's UNet or of Flux.1, or has its place in the `layout` of its family; `default` multiplies.
    """

    default: float = 1.0
    patterns: tuple[tuple[str, float], ...] = ()
    blocks: Mapping[str, float] = field(default_factory=dict)
    numbers: tuple[float, ...] = ()
    layout: Layout | None = None

    def __post_init__(self) -> None:
        for value in (self.default, *(value for _, value in self.patterns), *self.blocks.values(), *self.numbers):
            if not math.isfinite(value):
                raise InvalidOption(f"a weight must be a finite number, not {value}")

    @classmethod
    def parse(cls, text: str | float) -> Weight:
        """Read `0.7`, `q_proj=0.5,v_proj=-1`, `0.7,*.mlp.*=0`, or `lbw:1,0,0,…`; raise `InvalidOption`.

        Patterns are those of `selection.matches`; modules that none of them names have the number without a pattern,
        or 1.
        """
        if is_finite(text):
            return cls(float(text))
        if not isinstance(text, str):
            raise InvalidOption(f"weight {text!r}: a weight is a finite number, or a text with patterns")
        if text.startswith(BLOCKS):
            return cls(numbers=tuple(_number(part, text) for part in text[len(BLOCKS) :].split(",")))
        default, patterns = None, []
        for part in text.split(","):
            pattern, separator, number = part.rpartition("=")
            if separator and pattern.strip():
                patterns.append((pattern.strip(), _number(number, text)))
            elif default is None and not separator:
                default = _number(part, text)
            else:
                raise InvalidOption(f"weight {text!r}: give one number, then PATTERN=NUMBER, separated by commas")
        return cls(1.0 if default is None else default, tuple(patterns))

    def bound(self, adapter: Adapter, name: str) -> Weight:
        """Return the weight with its numbers given to the blocks of the model that an adapter, called `name`, changes.

        Raises `LoraToolsError` where their count is not that of the blocks, with the counts that can be, or where it is
        open which blocks they are for.
        """
        if not self.numbers:
            return self
        from loratools.adapter.naming.image.groups import groups  # most weights are numbers
        from loratools.adapter.weights import blocks
        from loratools.adapter.weights.layouts import layouts

        count, known = len(self.numbers), layouts(adapter)
        fitting = [layout for layout in known if len(layout) == count]
        names = {reading.name for group in groups(adapter) for reading in group.readings}
        listed = {length for each in names for length in blocks.OWNERS.get(each, ())}
        if count in listed or not names:
            if fitting:
                warned("%s: %d numbers are taken for %s, not for %s", name, count, blocks.SUMMARY[count], fitting[0])
            return replace(self, blocks=blocks.weights_of(list(self.numbers)))
        modules = [*adapter.updates, *adapter.replacements]
        if len({tuple(map(layout.place, modules)) for layout in fitting}) == 1:
            return replace(self, layout=fitting[0], blocks=dict(zip(fitting[0].names, self.numbers, strict=True)))
        expected = [*(f"{length} for {blocks.SUMMARY[length]}" for length in sorted(listed)), *map(str, known)]
        why = "which may be for the blocks of several models" if fitting else "its model has other counts of blocks"
        raise LoraToolsError(
            f"{name}: {count} block weights, {why}; expected {' or '.join(expected)}",
            hint="Patterns name the blocks of any model: *.blocks.3.*=0",
        )

    def of(self, module: str) -> float:
        """Return the weight of a module."""
        if self.layout:
            return self.default * self.numbers[self.layout.place(module)]
        if not self.numbers and not self.blocks:
            return next((value for pattern, value in self.patterns if matches(pattern, module)), self.default)
        from loratools.adapter.weights import blocks

        if not self.blocks:
            return self.default * replace(self, blocks=blocks.weights_of(list(self.numbers)), numbers=()).of(module)
        return self.default * self.blocks.get(blocks.block_of(module, blocks.FLUX[0] in self.blocks), 0.0)

    def negated(self) -> Weight:
        """Return −1 times it, for every module."""
        patterns = tuple((pattern, -value) for pattern, value in self.patterns)
        return replace(self, default=-self.default, patterns=patterns)

    @property
    def plain(self) -> bool:
        """Whether it is the same for all modules."""
        return not self.patterns and not self.blocks and not self.numbers

    def unmatched(self, modules: Sequence[str]) -> list[str]:
        """Return the patterns that name none of the modules."""
        return [pattern for pattern, _ in self.patterns if not any(matches(pattern, module) for module in modules)]

    def to_json(self) -> float | dict[str, object]:
        """Return it as it is recorded: a number, or what differs from module to module."""
        if self.plain:
            return self.default
        named = dict(self.blocks) or dict(self.patterns)
        return {"default": self.default, "blocks" if self.blocks else "patterns": named}


def example(modules: Iterable[str]) -> str:
    """Return the first module in words, to follow a sentence; nothing where there is none.

    >>> example(["h.0.q", "h.1.q"]), example([])
    (', such as h.0.q', '')
    """
    return next((f", such as {module}" for module in modules), "")


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidOption(f"weight {whole!r}: {text.strip()!r} is not a number") from None
