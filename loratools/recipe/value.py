"""A recipe: names for what exists, and commands in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratools.recipe.catalog import Command

Value = tuple[str, ...] | bool
"""What a key of a step says: texts as they are written, which the option itself types, or a bool for a flag."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input that exists: where it lies as far as the recipe says it, and what it is.

    `digest` is that of its tensors, as `loratools hash` prints it; `schema` is that of a model's names and shapes,
    where the record of an output knows no more; `content` is that of all else that is read of it.
    """

    name: str
    location: str | None = None
    digest: str | None = None
    schema: str | None = None
    content: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One command. `output` is where its result goes, below the folder of outputs; None for a command that only checks.

    `digest` and `files` are what the result is, where the recipe was made from an output.
    """

    name: str
    command: Command
    values: Mapping[str, Value]
    output: str | None
    digest: str | None = None
    files: str | None = None
    line: int = 0

    def inputs(self) -> Iterator[tuple[str, str]]:
        """Yield key and text of everything that it takes in: names, paths, references."""
        for name, value in self.values.items():
            if self.command.keys[name].role and not isinstance(value, bool):
                yield from ((name, text) for text in value)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe that is sound: every step takes inputs, paths, or outputs of steps before it."""

    path: Path
    sources: Mapping[str, Source] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()

    def needed(self) -> Iterator[tuple[Source, str]]:
        """Yield each input that a step takes, with what it is there: an adapter or a model."""
        told: set[str] = set()
        for step in self.steps:
            for key, text in step.inputs():
                if text in self.sources and text not in told:
                    told.add(text)
                    yield self.sources[text], str(step.command.keys[key].role)
