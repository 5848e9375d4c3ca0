"""Options that several commands share: one name, one meaning, one help text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loratools.cli._show import Report, fields, plain, size
from loratools.cli._words import WORDS
from loratools.errors import counted
from loratools.options import near

if TYPE_CHECKING:
    from loratools.surgery.inputs import Planned

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

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return one of the words; of one that is none the error has the nearest."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            self.fail(error.message.rstrip(".") + near(str(value), self.choices), param, ctx)


Decorated = TypeVar("Decorated", bound=Callable[..., Any])

FACTORS = Words("loratools.storage.dtypes", "FACTORS")
"""The dtypes that factors are stored in."""

PATH = click.Path(path_type=Path)
"""A file or folder; the library says what is wrong with it, in its own words."""

INPUT = click.Path()
"""A text that the library takes as it is: a file or folder, here, on the Hub or in a store."""


def option(*names: str, more: str = "", **settings: Any) -> Callable[[Decorated], Decorated]:
    """Return an option of the table of `_words`: help begins with its meaning, and goes on with `more`.

    `names` are those of `click.option`, the long one of the table among them, as are `settings`.
    """
    name = next(each for each in names if each.startswith("--")).partition("/")[0]
    word = WORDS[name]
    settings.setdefault("metavar", word.metavar)
    return click.option(*names, help=f"{word.meaning} {more}".rstrip(), **settings)


def adapter_options(command: Decorated) -> Decorated:
    """Give a command the options that say how adapters are read."""
    return dialect_option(alpha_option(command))


def module_options(command: Decorated) -> Decorated:
    """Give a command the options that choose modules."""
    return include_option(exclude_option(command))


def word_option(name: str, literal: str, default: str | None, more: str = "") -> Callable[[Decorated], Decorated]:
    """Return the option whose words are a `Literal` type of `loratools.options`."""
    return option(name, type=Words("loratools.options", literal), default=default, show_default=True, more=more)


def swept(context: click.Context, _: click.Parameter, value: Path | None) -> Path | None:
    """Remove what killed runs left beside an output; its option is eager, so that no other can be wrong before."""
    if value is not None and not context.resilient_parsing:
        from loratools.storage import atomic

        atomic.sweep(value)
    return value


def dialects_begun(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """Return the dialects that begin so, for the completion of a shell."""
    from loratools import dialects

    return [name for name in dialects.names() if name.startswith(begun)]


class _Device(Words):
    """A device by its name; one of several GPUs has a number too (`cuda:1`)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name of a device."""
        from loratools.options import Options

        checked = Options()
        name = checked.device(value)
        for problem in checked.problems:
            self.fail(problem, param, ctx)
        return name


trained_on_option = option("--trained-on", type=Words("loratools.options", "TrainedOn"))
output_option = option("-o", "--output", type=PATH, required=True, is_eager=True, callback=swept)
force_option = option("--force", is_flag=True)
durable_option = option("--durable", is_flag=True)
dry_run_option = option("--dry-run", is_flag=True)
modules_option = option("--modules", is_flag=True)
include_option = option("--include", type=str, multiple=True)
exclude_option = option("--exclude", type=str, multiple=True)
model_type_option = option("--model-type", type=str)
shard_size_option = option("--max-shard-size", type=str)
base_id_option = option("--base-id", type=str)


class _Weight(click.ParamType[Any]):
    name = "weight"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Return a number as that, and a text with patterns or block weights as it is."""
        if isinstance(value, str) and any(mark in value for mark in "=,:"):
            return value
        try:
            return float(value)
        except ValueError:
            valid = "a number, PATTERN=NUMBER for some modules, or lbw: and a number for each block of an image model"
            self.fail(f"{value!r} is no weight: it is {valid}", param, ctx)


WEIGHT = _Weight()
weight_option = option("-w", "--weight", "weights", type=WEIGHT, multiple=True, more="[default: 1 for each]")
to_option = option("--to", type=str, shell_complete=dialects_begun, more="[default: the adapter's, ours for PEFT's]")
factors_option = option("--dtype", type=FACTORS, more="[default: as the factors are stored]")
threads_option = option(
    "--threads", type=click.IntRange(min=1), more="The result does not depend on it.  [default: one per core]"
)
workers_option = option("--workers", type=str, more="No byte depends on it.")
part_option = option("--part", type=str)
device_option = option("--device", type=_Device("loratools.options", "Device"), default="cpu", show_default=True)
check_base_option = word_option("--check-base", "CheckBase", "strict")
dialect_option = option("--dialect", type=str, shell_complete=dialects_begun, more="[default: by its contents]")
alpha_option = option("--alpha", type=float)
algorithm_option = option(
    "--algorithm", type=Words("loratools.storage.digest", "ALGORITHMS"), default="blake3", show_default=True
)


def several_options(*, workers: bool) -> list[click.Parameter]:
    """Return the options of a command that takes several paths; `workers` among them, unless it has its own."""
    each, jobs, who = WORDS["--each"], WORDS["--jobs"], WORDS["--workers"]
    count = f"{jobs.meaning}  [default: 1]"
    own = [click.Option(["--workers"], metavar=who.metavar, help=who.meaning)] if workers else []
    return [
        *own,
        click.Option(["--each"], multiple=True, metavar=each.metavar, type=click.Path(), help=each.meaning),
        click.Option(["-j", "--jobs"], metavar=jobs.metavar, type=click.IntRange(min=1), help=count),
    ]


def would(made: Planned, *, modules: bool = False) -> Report:
    """Return the report of a plan, for --dry-run; `modules` says that the ranks of modules were asked for too."""
    rows: list[tuple[str, str | Sequence[str] | None]] = [("would write", made.output), ("of", list(made.reads))]
    for name, value in made.facts.items():
        if value not in (None, [], {}):
            listed = [f"{key}: {each}" for key, each in value.items()] if isinstance(value, dict) else value
            rows.append((name, [str(each) for each in listed] if isinstance(listed, list) else str(value)))
    rows.append(("size", None if made.nbytes is None else f"about {size(made.nbytes)}"))
    rows.append(("free disk", size(made.free_disk)))
    unknown = "not known: ranks need the singular values, which --dry-run leaves out"
    rows.append(("per module", unknown if modules else None))
    return Report(plain(made), list(fields(*rows)))


def require_one_each(weights: Sequence[object], adapters: Sequence[str]) -> None:
    """Raise `UsageError` where weights are given, but not one for each adapter."""
    if weights and len(weights) != len(adapters):
        raise click.UsageError(
            f"{counted(len(weights), 'weight')} for {counted(len(adapters), 'adapter')}; give -w once for each"
        )
