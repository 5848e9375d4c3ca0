"""Commands by file name, and what every command has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import click

from loratools.cli._hints import placed
from loratools.cli._show import SCHEMA, Report, encode
from loratools.cli._show import line as show_line
from loratools.cli._talk import Talk
from loratools.decisions import warnings_to
from loratools.errors import LoraToolsError
from loratools.storage import sources

SECTIONS = ("Look", "Check", "Change", "Share", "Learn")
"""Headings of `loratools --help`, in order; a command names its own."""


class Command(click.Command):
    """A command whose function returns a `Report`; it has --json, -q, -v and --no-progress without asking."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section
        for option in self.params:
            if isinstance(option, click.Option):
                option.show_envvar = True
        self.common = common_options()
        self.params += self.common

    def invoke(self, ctx: click.Context) -> None:
        """Run the function, print its report, and exit with 1 where the report says so."""
        talk = ctx.find_root().ensure_object(Talk)
        with sources.session(talk.fetching) as session, talk.decisions(), warnings_to(talk.warn):
            talk.names = session.names
            try:
                report = super().invoke(ctx)
            except LoraToolsError as error:
                error.hint = error.hint and self._placed(error.hint, ctx)
                raise
        if isinstance(report, Report):
            # What a report holds is shown, whether or not its command has said it already.
            talk.warn(*report.document.get("warnings", ()))
            talk.note(*report.document.get("notes", ()))
            emit(report, talk)
            if not report.ok:
                ctx.exit(1)

    def _placed(self, hint: str, ctx: click.Context) -> str:
        """Return a hint that says whose an option is that this command has not."""
        root = ctx.find_root().command
        if "--" not in hint or not isinstance(root, Commands):
            return hint
        commands = ((name, root.get_command(ctx, name)) for name in root.list_commands(ctx))
        options = {name: [option for each in one.params for option in each.opts] for name, one in commands if one}
        return placed(hint, self.name or "", options)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the command's own options first, those of every command after them."""
        common = [*self.common, self.get_help_option(ctx)]
        own = [option for option in self.params if option not in common]
        _write_options(ctx, formatter, "Options", own)
        _write_options(ctx, formatter, "Options of every command", common)


class Commands(click.Group):
    """The group of all commands; a file is imported when its command is asked for."""

    def __init__(self, package: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.package = package

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, sorted."""
        modules = iter_modules(import_module(self.package).__path__)
        return sorted(module.name.replace("_", "-") for module in modules if not module.name.startswith("_"))

    def get_command(self, ctx: click.Context, name: str) -> Command | None:
        """Return a command by name, or None."""
        if name not in self.list_commands(ctx):
            return None
        loaded: Command = import_module(f"{self.package}.{name.replace('-', '_')}").command
        loaded.name = name
        return loaded

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands before the options."""
        self.format_commands(ctx, formatter)
        _write_options(ctx, formatter, "Options, before or after a command", [*self.params, self.get_help_option(ctx)])

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands under their headings, each with its first sentence."""
        sections: dict[str, list[tuple[str, str]]] = {section: [] for section in SECTIONS}
        for name in self.list_commands(ctx):
            if loaded := self.get_command(ctx, name):
                sections.setdefault(loaded.section, []).append((name, loaded.get_short_help_str(70)))
        for section, records in sections.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


def _write_options(
    ctx: click.Context, formatter: click.HelpFormatter, heading: str, options: Sequence[click.Parameter | None]
) -> None:
    shown = [option.get_help_record(ctx) for option in options if isinstance(option, click.Option)]
    if records := [record for record in shown if record]:
        with formatter.section(heading):
            formatter.write_dl(records)


def command(section: str) -> Callable[[Callable[..., Report | None]], Command]:
    """Make a command of a function whose docstring is its help; `section` is its heading in `loratools --help`."""
    return click.command(cls=Command, section=section)


def common_options() -> list[click.Parameter]:
    """Return the options that every command has, and that may also stand before the command."""

    def remember(ctx: click.Context, option: click.Parameter, value: Any) -> None:
        if value:  # a default must not undo what stood before the command
            setattr(ctx.find_root().ensure_object(Talk), str(option.name), value)

    def flag(*names: str, help: str, **more: Any) -> click.Option:
        variable = "LORATOOLS_" + names[-1].strip("-").upper().replace("-", "_")
        return click.Option(names, help=help, callback=remember, expose_value=False, envvar=variable, **more)

    return [
        flag("--json", help="Print the result, and any error, as one JSON document.", is_flag=True),
        flag("-q", "--quiet", help="Say nothing on stderr but warnings and errors.", is_flag=True),
        flag("-v", "--verbose", help="Say on stderr what is decided, and why.", count=True),
        flag("--no-progress", help="Draw no progress bars.", is_flag=True),
    ]


def emit(report: Report, talk: Talk) -> None:
    """Print a report to stdout: its document with --json, else its text."""
    if talk.json:
        click.echo(talk.named(encode({"schema": SCHEMA, **report.document, "warnings": talk.warnings})))
        return
    for line in [report.text] if isinstance(report.text, str) else report.text:
        click.echo(show_line(talk.named(line)))
