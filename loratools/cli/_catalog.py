"""The commands as recipes see them (`recipe/catalog.py`), from the commands alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._account import SENDS, account_of, is_recorded, long_name, role_of
from loratools.cli._batch import batch_of
from loratools.cli._group import Command, Commands
from loratools.cli._options import several_options
from loratools.cli._talk import Talk
from loratools.errors import InvalidOption
from loratools.recipe import catalog
from loratools.storage.beside.making import making

if TYPE_CHECKING:
    from loratools.recipe.catalog import Key

_CHECKS = ("validate", "verify")
_OF_RUN = {
    "force": "`loratools run --force` replaces outputs", "dry-run": "`loratools run --dry-run` plans every step",
    "resume": "`loratools run` goes on with the step that was interrupted",
    "durable": "say it in the call of a single command",
    "part": "a recipe makes whole outputs",
}  # fmt: skip
_NOT_HERE = {
    "push": "a recipe sends nothing to the Hub; `loratools push` does",
    "run": "a recipe runs no other recipe",
}


class Catalog:
    """The commands of a root, for recipes."""

    def __init__(self, root: Commands, talk: Talk) -> None:
        self.root, self.talk = root, talk
        self.context = click.Context(root, info_name="loratools", obj=talk)  # without variables of the environment

    @cache  # noqa: B019  (one catalog lives as long as one run)
    def names(self) -> Sequence[str]:
        """Return the names of the commands that write an output, or only check."""
        return tuple(name for name in self.root.list_commands(self.context) if self._fits(name))

    def _fits(self, name: str) -> bool:
        command = self.root.get_command(self.context, name)
        writes = command is not None and any(long_name(option) == "output" for option in command.params)
        return (writes or name in _CHECKS) and name not in _NOT_HERE

    def why_not(self, name: str) -> str | None:
        """Return why a recipe does not run a command that there is."""
        if name in self.names() or name not in self.root.list_commands(self.context):
            return None
        return _NOT_HERE.get(name, f"{name} writes no file that a later step could take")

    @cache  # noqa: B019
    def get(self, name: str) -> catalog.Command:
        """Return a command's keys: what it takes, but where its output goes, and how a run goes."""
        command = self._command(name)
        several = [long_name(option) for option in several_options(workers=not command.shares)] if command.each else []
        keys, refused, known = dict[str, catalog.Key](), dict[str, str](), set[str]()
        for option in command.params:
            long = long_name(option)
            known.add(long)
            if not option.expose_value or long == "output" or getattr(option, "hidden", False):
                continue
            if long in _OF_RUN:
                refused[long] = _OF_RUN[long]
            elif long in SENDS.get(name, ()):
                refused[long] = "a recipe sends nothing to the Hub"
            elif option.type is options.PATH:
                refused[long] = "it writes a file of its own, and a step has one output"
            elif long in several:
                refused[long] = "a step takes one input; give each its own step"
            else:
                keys[long] = key_of(option, name, single=option.name == command.each)
        return catalog.Command(name, keys, refused, "output" in known, "dry-run" in known, "force" in known)

    def check(self, name: str, arguments: Sequence[str]) -> None:
        """Raise `InvalidOption` unless click takes the arguments."""
        self._parsed(name, arguments)

    def run(self, name: str, arguments: Sequence[str]) -> catalog.Result:
        """Run a command in this process, and return what it found; raise what it raises."""
        command = self._command(name)
        context = self._parsed(name, arguments)
        if command.each and not command.takes_one(context, command.each):
            batch_of(context, command.each, command.renamed)  # which raises where there is none
            raise InvalidOption(f"{command.each}: several paths, and a step takes one")
        try:
            with making(lambda: account_of(name, context)), context:
                report = click.Command.invoke(command, context)
        except click.UsageError as error:
            raise InvalidOption(error.format_message()) from None
        if not isinstance(report, show.Report):
            return catalog.Result({})
        lines = [report.text] if isinstance(report.text, str) else report.text
        return catalog.Result(report.document, tuple(lines), report.ok)

    def _command(self, name: str) -> Command:
        command = self.root.get_command(self.context, name)
        assert command is not None
        return command

    def _parsed(self, name: str, arguments: Sequence[str]) -> click.Context:
        try:
            return self._command(name).make_context(name, list(arguments), self.context, default_map={})
        except click.UsageError as error:
            raise InvalidOption(" ".join(error.format_message().split()).rstrip(".")) from None


def key_of(option: click.Parameter, command: str, *, single: bool = False) -> Key:
    """Return the key of a recipe that an option or an argument is; `single` is the path of a `command` on many.

    On the command line that argument stands for one or several.
    """
    positional = isinstance(option, click.Argument)
    takes: Any = "value"
    if isinstance(option, click.Option) and option.is_flag:
        takes = "switch" if option.secondary_opts else "flag"
    return catalog.Key(
        long_name(option), takes, (option.multiple or option.nargs != 1) and not single, role_of(option), positional,
        option.required or single, is_recorded(option, command),
    )  # fmt: skip


def catalog_of(talk: Talk | None = None) -> Catalog:
    """Return the catalog of all commands; without a `talk` they say nothing but warnings."""
    from loratools.cli._run import group

    return Catalog(group(), talk or Talk(quiet=True, no_progress=True))
