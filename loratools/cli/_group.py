"""Commands by file name, and what every command has in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _spelling as spelling
from loratools.cli._options import several_options
from loratools.cli._show import SCHEMA, Report, fitted, room
from loratools.cli._show import line as show_line
from loratools.cli._spelling import long_name
from loratools.cli._talk import Talk
from loratools.cli._words import GROUPS, WORDS
from loratools.decisions import warnings_to
from loratools.errors import LoraToolsError
from loratools.options import modules_in

if TYPE_CHECKING:
    from loratools.cli._batch import Renamed

SECTIONS = ("Look", "Check", "Change", "Share", "Learn")
"""Headings of `loratools --help`, in order; a command names its own."""

_MANY = 8  # options that stand under headings


class Command(click.Command):
    """A command whose function returns a `Report`; it has --json, -q, -v and --no-progress without asking.

    `each` is its argument of which there may be several, `renamed` makes the names of their outputs, and `together`
    tells that several without --each are one input.
    """

    def __init__(
        self, *args: Any, section: str, each: str | None = None, renamed: Renamed | None = None,
        together: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.section, self.each, self.renamed, self.together = section, each, renamed, together
        for argument in self.params if each else ():
            if argument.name == each:
                argument.nargs, argument.required = -1, False
                argument.metavar = argument.metavar or f"{each.upper()}..."
        self.shares = any(option.name == "workers" for option in self.params)
        self.params += several_options(workers=not self.shares) if each else []
        self.common = [*common_options(), schema_option()]
        self.params += self.common

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse a command line with the defaults that the environment sets; old spellings work, with a warning."""
        name = self.name or ""
        args, renamed = spelling.current(name, args)
        own = [option for option in self.params if isinstance(option, click.Option)]
        values, old = spelling.defaults(name, own, os.environ)
        if parent and not extra.get("resilient_parsing"):
            parent.find_root().ensure_object(Talk).warn(*renamed, *old)
        return super().make_context(info_name, args, parent, **{"default_map": values, **extra})

    def invoke(self, ctx: click.Context) -> None:
        """Run the function on the path, or on each of several; print its reports, and exit with 1 where one says so."""
        talk = ctx.find_root().ensure_object(Talk)
        if self.each and not self.takes_one(ctx, self.each):
            from loratools.cli import _batch, _each

            batch = _batch.batch_of(ctx, self.each, self.renamed)
            if self.shares:  # each path is the work of one process
                ctx.params["workers"] = None
            root = ctx.find_root().command
            package = root.package if isinstance(root, Commands) else __package__
            load = partial(_loaded, package, str(ctx.info_name))
            if not _each.run(_each.Work(load, self.each, ctx.params, talk, apart=False), batch, ctx):
                ctx.exit(1)
            return
        report = self.report(ctx, talk)
        if isinstance(report, Report):
            emit(report, talk)
            if not report.ok:
                ctx.exit(1)

    def takes_one(self, ctx: click.Context, argument: str) -> bool:
        """Tell whether a command line has one input, and give its parameters to the context then."""
        paths = ctx.params[argument]
        if ctx.params["each"] or not paths or not (self.together or len(paths) == 1):
            return False
        del ctx.params["each"], ctx.params["jobs"]
        if not self.shares:  # one input of such a command is the work of one process
            del ctx.params["workers"]
        ctx.params[argument] = paths if self.together else paths[0]
        return True

    def report(self, ctx: click.Context, talk: Talk) -> Report | None:
        """Run the function on one path, and return its report."""
        from loratools.storage import sources  # not needed for a help page
        from loratools.storage.beside.making import making

        with sources.session(talk.fetching) as session, talk.decisions(), warnings_to(talk.warn):
            talk.names = session.names
            try:
                with nullcontext() if ctx.params.get("dry_run") else making(partial(_account, self.name or "", ctx)):
                    report = super().invoke(ctx)
            except LoraToolsError as error:
                hint = error.hint and self._placed(error.hint, ctx)
                error.hint = " ".join(filter(None, (hint, *spelling.givers(ctx, error)))) or None
                raise
        if not isinstance(report, Report):
            return None
        talk.warn(*report.document.get("warnings", ()))
        talk.note(*report.document.get("notes", ()))
        talk.count()
        return report

    def _placed(self, hint: str, ctx: click.Context) -> str:
        """Return a hint that says whose an option is that this command has not."""
        from loratools.cli._hints import placed

        root = ctx.find_root().command
        return placed(hint, self.name or "", root.options(ctx)) if isinstance(root, Commands) else hint

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the command's own options first, many under the headings of the table, those of every command last."""
        common = [*self.common, self.get_help_option(ctx)]
        own = [option for option in self.params if option not in common and isinstance(option, click.Option)]
        if len(own) < _MANY:
            _write_options(ctx, formatter, "Options", own)
        else:
            groups = {option: word.group for option in own if (word := WORDS.get(long_name(option)))}
            for group in GROUPS:
                _write_options(ctx, formatter, group, [option for option in own if groups.get(option) == group])
            _write_options(ctx, formatter, "Others", [option for option in own if option not in groups])
        _write_options(ctx, formatter, "Options of every command", common)


class Commands(click.Group):
    """The group of all commands; a file is imported when its command is asked for."""

    def __init__(self, package: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.package = package

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, sorted."""
        return [name.replace("_", "-") for name in _files(self.package)]

    def options(self, ctx: click.Context) -> dict[str, list[str]]:
        """Return the spellings of the options of every command; every file is imported for it."""
        commands = ((name, self.get_command(ctx, name)) for name in self.list_commands(ctx))
        return {
            name: [
                spelled
                for option in loaded.params
                if isinstance(option, click.Option)
                for spelled in (*option.opts, *option.secondary_opts)
            ]
            for name, loaded in commands
            if loaded
        }

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command of a name; one that is none gets the nearest as a suggestion."""
        names, name = self.list_commands(ctx), args[0]
        if name in names or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        listed = spelling.commands_like(name, names)
        raise click.UsageError(f"No such command {name!r}" + (f"; did you mean {listed}?" if listed else "."), ctx)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for; an environment variable that looks like ours and is none is told."""
        if odd := [name for name in os.environ if name.startswith(spelling.PREFIX)]:
            ctx.ensure_object(Talk).warn(*spelling.unknown(odd, lambda: self.options(ctx)))
        return super().invoke(ctx)

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
                sections.setdefault(loaded.section, []).append((name, loaded.get_short_help_str(1000)))
        for section, records in sections.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


@cache
def _files(package: str) -> list[str]:
    """Return the names of the files of commands, sorted: the folder is listed once, and not by `pkgutil`."""
    return modules_in(import_module(package).__path__)


def _account(name: str, ctx: click.Context) -> dict[str, Any]:
    from loratools.cli._account import account_of  # only what is written needs it

    return account_of(name, ctx)


def _write_options(
    ctx: click.Context, formatter: click.HelpFormatter, heading: str, options: Sequence[click.Parameter | None]
) -> None:
    shown = [option.get_help_record(ctx) for option in options if isinstance(option, click.Option)]
    if records := [record for record in shown if record]:
        with formatter.section(heading):
            formatter.write_dl(records)


@cache
def _loaded(package: str, name: str) -> tuple[Commands, Command]:
    """Return the group of all commands and one of them, once in a process."""
    root = Commands(package, name="loratools")
    loaded = root.get_command(click.Context(root), name)
    assert loaded is not None
    return root, loaded


def command(
    section: str, *, each: str | None = None, renamed: Renamed | None = None, together: bool = False
) -> Callable[[Callable[..., Report | None]], Command]:
    """Make a command of a function whose docstring is its help; `section` is its heading in `loratools --help`.

    `each` names an argument of which the command line may have several, or all in a folder; the function is called with
    one of them. `renamed` makes the names of their outputs below `-o FOLDER`. Default: those of the inputs. `together`
    says that several without `--each` are one input: the function is called with a tuple of them then.
    """
    return click.command(cls=Command, section=section, each=each, renamed=renamed, together=together)


@cache
def common_options() -> tuple[click.Parameter, ...]:
    """Return the options that every command has, the same objects; they may also stand before the command."""

    def remember(ctx: click.Context, option: click.Parameter, value: Any) -> None:
        if value:  # a default must not undo what stood before the command
            setattr(ctx.find_root().ensure_object(Talk), str(option.name), value)

    def flag(*names: str, help: str, **more: Any) -> click.Option:
        variable = spelling.variable(names[-1])
        return click.Option(names, help=help, callback=remember, expose_value=False, envvar=variable, **more)

    return (
        flag("--json", help="Print the result, and any error, as one JSON document.", is_flag=True),
        flag("-q", "--quiet", help="Say nothing on stderr but warnings and errors.", is_flag=True),
        flag("-v", "--verbose", help="Say on stderr what is decided, and why.", count=True),
        flag("--no-progress", help="Draw no progress bars.", is_flag=True),
    )


@cache
def schema_option() -> click.Option:
    """Return the option that prints the JSON Schema of a command's documents."""

    def show(ctx: click.Context, option: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            path = Path(__file__).parent / "schemas" / f"{ctx.command.name}.json"
            click.echo(path.read_text(encoding="utf-8"), nl=False)
            ctx.exit()

    return click.Option(
        ["--json-schema"], help="Print the JSON Schema of what --json prints.", is_flag=True, is_eager=True,
        expose_value=False, callback=show,
    )  # fmt: skip


def emit(report: Report, talk: Talk) -> None:
    """Print a report to stdout: its document with --json, else its text."""
    if talk.json:
        document = {"schema": SCHEMA} | dict(report.document) | {"schema": SCHEMA, "warnings": talk.warnings}
        from loratools.cli._pieces import encoded

        for piece in encoded(document):
            click.echo(talk.named(piece), nl=False)
        click.echo()
        return
    for line in [report.text] if isinstance(report.text, str) else report.text:
        for part in fitted(show_line(talk.named(line)), None if report.verbatim else room()):
            click.echo(part)
