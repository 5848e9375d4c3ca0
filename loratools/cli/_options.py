"""Options that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    Choice = click.Choice[str]
else:
    Choice = click.Choice


class Words(Choice):
    """The words that the library has for an option: a `Literal` type, or a list, imported when they are asked for."""

    def __init__(self, module: str, name: str, *more: str) -> None:
        self.case_sensitive = True
        self._place, self._more = (module, name), more

    def __getattr__(self, name: str) -> Any:
        if name != "choices":
            raise AttributeError(name)
        from loratools.options import words

        module, attribute = self._place
        listed = getattr(import_module(module), attribute)
        self.choices = (*(words(listed) or listed), *self._more)
        return self.choices


Decorated = TypeVar("Decorated", bound=Callable[..., Any])

FACTORS = Words("loratools.storage.dtypes", "FACTORS")
"""The dtypes that factors are stored in."""

PATH = click.Path(path_type=Path)
"""A file or folder; the library says what is wrong with it, in its own words."""

INPUT = click.Path()
"""A text that the library takes as it is: a file or folder, here or on the Hub."""


def word_option(name: str, literal: str, default: str, help: str) -> Callable[[Decorated], Decorated]:
    """Return the option whose words are a `Literal` type of `loratools.options`."""
    return click.option(name, type=Words("loratools.options", literal), default=default, show_default=True, help=help)


def swept(context: click.Context, _: click.Parameter, value: Path | None) -> Path | None:
    """Remove what killed runs left beside an output; its option is eager, so that no other can be wrong before."""
    if value is not None and not context.resilient_parsing:
        from loratools.storage import atomic

        atomic.sweep(value)
    return value


trained_on_option = click.option(
    "--trained-on", type=Words("loratools.options", "TrainedOn"),
    help="What the adapter saw where the base is folded (AWQ, SmoothQuant): its original, or the folded base itself.",
)  # fmt: skip
output_option = click.option(
    "-o", "--output", type=PATH, required=True, metavar="PATH", is_eager=True, callback=swept,
    help="Where the result goes; it must not exist yet.",
)  # fmt: skip
force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")
durable_option = click.option(
    "--durable", is_flag=True,
    help="Write the model to the disk itself before it gets its name: a power cut leaves it whole or absent.",
)  # fmt: skip
dry_run_option = click.option("--dry-run", is_flag=True, help="Print the plan, from headers alone, and stop.")


class _Weight(click.ParamType[Any]):
    name = "weight"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Return a number as that, and a text with patterns or block weights as it is."""
        if isinstance(value, str) and any(mark in value for mark in "=,:"):
            return value
        return float(click.FLOAT.convert(value, param, ctx))


WEIGHT = _Weight()
weight_option = click.option(
    "-w", "--weight", "weights", type=WEIGHT, multiple=True, metavar="WEIGHT",
    help="Weight of an adapter, once for each in order: a number, which may be negative; PATTERN=NUMBER for some of "
    "its modules, after a comma; or lbw: and a number for each block.  [default: 1 for each]",
)  # fmt: skip
to_option = click.option(
    "--to", metavar="DIALECT", help="See `loratools dialects`.  [default: the adapter's, ours for PEFT's]"
)
factors_option = click.option("--dtype", type=FACTORS, help="Of the factors.  [default: as they are stored]")
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N",
    help="Threads to work with; the result does not depend on it.  [default: one per core]",
)  # fmt: skip
device_option = word_option(
    "--device", "Device", "cpu",
    "Where the arithmetic is done; cuda may round one element in some ten thousand to its other neighbour.",
)  # fmt: skip
check_base_option = word_option(
    "--check-base", "CheckBase", "strict", "What to do when the base is not the one the adapter was sealed with."
)
dialect_option = click.option(
    "--dialect", metavar="NAME",
    help="Read the adapter as this dialect (see `loratools dialects`).  [default: by its contents]",
)  # fmt: skip
algorithm_option = click.option(
    "--algorithm", type=Words("loratools.storage.digest", "ALGORITHMS"), default="blake3", show_default=True,
    help="Digest algorithm.",
)  # fmt: skip


def require_one_each(weights: Sequence[object], adapters: Sequence[str]) -> None:
    """Raise `UsageError` where weights are given, but not one for each adapter."""
    if weights and len(weights) != len(adapters):
        raise click.UsageError(f"{len(weights)} weight(s) for {len(adapters)} adapter(s); give -w once for each")
