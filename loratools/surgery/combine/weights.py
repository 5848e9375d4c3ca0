"""The weight of an adapter: one number, one for each module pattern, or one for each block of an image model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loratools.adapter.naming.selection import matches
from loratools.errors import InvalidOption
from loratools.options import is_finite
from loratools.surgery.combine import blocks

BLOCKS = "lbw:"
"""What begins a list of block weights."""


@dataclass(frozen=True, slots=True)
class Weight:
    """`default` for every module but those that a pattern names (the first that matches wins), or that a block holds.

    With `blocks` set every module must be in a block of Stable Diffusion's UNet or of Flux.1; `default` multiplies.
    """

    default: float = 1.0
    patterns: tuple[tuple[str, float], ...] = ()
    blocks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (self.default, *(value for _, value in self.patterns), *self.blocks.values()):
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
            return cls(blocks=blocks.weights_of([_number(part, text) for part in text[len(BLOCKS) :].split(",")]))
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

    def of(self, module: str) -> float:
        """Return the weight of a module."""
        if self.blocks:
            return self.default * self.blocks.get(blocks.block_of(module, blocks.FLUX[0] in self.blocks), 0.0)
        return next((value for pattern, value in self.patterns if matches(pattern, module)), self.default)

    def negated(self) -> Weight:
        """Return −1 times it, for every module."""
        patterns = tuple((pattern, -value) for pattern, value in self.patterns)
        return Weight(-self.default, patterns, self.blocks)

    @property
    def plain(self) -> bool:
        """Whether it is the same for all modules."""
        return not self.patterns and not self.blocks

    def unmatched(self, modules: Sequence[str]) -> list[str]:
        """Return the patterns that name none of the modules."""
        return [pattern for pattern, _ in self.patterns if not any(matches(pattern, module) for module in modules)]

    def to_json(self) -> float | dict[str, object]:
        """Return it as it is recorded: a number, or what differs from module to module."""
        if self.plain:
            return self.default
        named = dict(self.blocks) or dict(self.patterns)
        return {"default": self.default, "blocks" if self.blocks else "patterns": named}


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidOption(f"weight {whole!r}: {text.strip()!r} is not a number") from None
