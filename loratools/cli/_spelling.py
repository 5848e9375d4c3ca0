"""How an option is spelled: old names that still work, and environment variables that are defaults of options."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

from loratools.cli._words import COMMON, MEANT, MEANT_OPTIONS, RENAMED, WORDS
from loratools.errors import InvalidOption, LoraToolsError
from loratools.options import either, near

PREFIX = "LORATOOLS_"
ELSEWHERE = ("DEBUG", "REAL_MODELS", "LLAMA_CPP", "LLAMA_CPP_LOG", "TRANSFORMERS_4")
"""Variables that are no options: of the whole command line, and of the checkout's tests."""


def current(command: str, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return arguments with the new spelling of every old option, and a warning for each.

    >>> current("switch", ["m", "--out", "a", "--", "--in"])
    (['m', '--take', 'a', '--', '--in'], ['--out is now --take; the old name goes away in the next version'])
    """
    renamed, after = RENAMED.get(command, {}), list(arguments)
    warnings: dict[str, str] = {}
    for place, argument in enumerate(arguments):
        if argument == "--":
            break
        old, equals, value = argument.partition("=")
        if new := renamed.get(old):
            after[place] = f"{new}{equals}{value}"
            warnings[old] = f"{old} is now {new}; the old name goes away in the next version"
    return after, list(warnings.values())


def variable(option: str, command: str | None = None) -> str:
    """Return the environment variable of an option, of one command or of all that have it.

    >>> variable("--max-rank", "extract-svd"), variable("--threads")
    ('LORATOOLS_EXTRACT_SVD_MAX_RANK', 'LORATOOLS_THREADS')
    """
    return PREFIX + "_".join(filter(None, (command, option.strip("-")))).upper().replace("-", "_")


def is_on(variable: str) -> bool:
    """Tell whether an environment variable is set to something other than no."""
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off", "n", "f")


def long_name(option: click.Parameter) -> str:
    """Return the name of an option in the table of words."""
    return next((name for name in option.opts if name.startswith("--")), option.opts[0])


def defaults(
    command: str, options: Iterable[click.Option], environment: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Return parameter -> value for the options that the environment sets, and warnings of old spellings.

    A variable of the command goes before one of all commands. Values of an option that may be given more than once are
    separated as a shell separates words. An empty variable is none.
    """
    values: dict[str, Any] = {}
    warnings = []
    for option in options:
        found = default_of(command, option, environment)
        if found is None or option.name is None:
            continue
        value = values[option.name] = environment[found]
        if option.multiple:
            import shlex

            values[option.name] = shlex.split(value)
        if found not in (new := variable(long_name(option), command), variable(long_name(option))):
            warnings.append(f"{found} is now {new}; the old name goes away in the next version")
    return values, warnings


def default_of(command: str, option: click.Option, environment: Mapping[str, str]) -> str | None:
    """Return the variable that sets an option of a command; None where none does."""
    name = long_name(option)
    old = [before for before, new in RENAMED.get(command, {}).items() if new.partition("=")[0] == name]
    names = [variable(name, command), *(variable(each, command) for each in old), variable(name)]
    return next((each for each in names if environment.get(each)), None)


def giver(context: click.Context, option: click.Parameter) -> str | None:
    """Return the environment variable from which an option has its value; None where it has it from elsewhere."""
    source = context.get_parameter_source(option.name or "")
    if not isinstance(option, click.Option):
        return None
    if source is click.core.ParameterSource.ENVIRONMENT and isinstance(option.envvar, str):
        return option.envvar
    from_map = source is click.core.ParameterSource.DEFAULT_MAP
    return default_of(context.command.name or "", option, os.environ) if from_map else None


def givers(context: click.Context, error: LoraToolsError) -> list[str]:
    """Return a sentence for each environment variable whose value is in what is said of a wrong option."""
    text = "\n".join((error.message, *error.problems)) if isinstance(error, InvalidOption) else ""
    by_name = {long_name(option): giver(context, option) for option in context.command.params}
    return [f"{option} is set by {name} in the environment." for option, name in by_name.items()
            if name and repr(os.environ[name]) in text]  # fmt: skip


def unknown(names: Sequence[str], options: Callable[[], Mapping[str, Iterable[str]]]) -> list[str]:
    """Return a warning for each variable that begins as ours do and is none, with the nearest that is one.

    `options` returns the options of every command; it is called only where the table of words does not know a name.
    """
    known = {PREFIX + name for name in ELSEWHERE} | {variable(name) for name in (*COMMON, *WORDS)}
    if known.issuperset(names):
        return []
    for command, of_command in options().items():
        known |= {variable(option, command) for option in of_command if option.startswith("--")}
        known |= {variable(option, command) for option in RENAMED.get(command, {})}
    return [f"{name} is no variable of loratools{near(name, known)}" for name in sorted(set(names) - known)]


def commands_like(name: str, names: Sequence[str]) -> str:
    """Return the commands that someone may have meant, as "'a' or 'b'", or nothing.

    >>> commands_like("mrge", ["hash", "merge", "unmerge"]), commands_like("seal", ["convert", "merge"])
    ("'merge' or 'unmerge'", "'convert … --base BASE'")
    """
    from difflib import get_close_matches

    meant = MEANT.get(name, "")
    calls = [meant] if " --" in meant else [other for other in meant.split() if other in names]
    like = [*get_close_matches(name, names), *(other for other in names if len(name) > 2 and name in other)]
    return either([repr(other) for other in calls or dict.fromkeys(like)])


def topics_like(name: str, topics: Sequence[str], commands: Sequence[str]) -> str:
    """Return the topic or command that someone may have meant, quoted, or nothing.

    >>> topics_like("quantisation", ["merging", "quantized"], []), topics_like("undo", ["undoing"], ["unmerge"])
    ("'quantized'", "'undoing'")
    """
    from difflib import get_close_matches

    names = [*topics, *commands]
    begun = [other for other in names if len(name) > 3 and other.startswith(name[:4])]
    like = get_close_matches(name, begun, 1, 0) or get_close_matches(name, names, 1)
    return repr(like[0]) if like else commands_like(name, commands)


def meant(option: str) -> str | None:
    """Return what an option of another tool is called here; None for one that is not known.

    >>> meant("--save_to"), meant("--dim"), meant("--qqq")
    ('--output', '--rank', None)
    """
    return MEANT_OPTIONS.get(option.replace("_", "-"))


def options_like(option: str, options: Sequence[str]) -> str:
    """Return the options that someone may have meant, as "'--a' or '--b'", or nothing.

    >>> options_like("--scale", ["--include", "-w"]), options_like("--outp", ["--output", "--quiet"])
    ("'-w'", "'--output'")
    >>> options_like("--modles", ["--modules", "--include"]), options_like("--qqq", ["--modules"])
    ("'--modules'", '')
    """
    from difflib import get_close_matches

    known = [name for name in (meant(option),) if name in options]
    begun = [name for name in options if len(option) > 3 and name.startswith(option)]
    close = get_close_matches(option, list(dict.fromkeys(options)), 3, 0.75)
    return either([repr(name) for name in known or begun or close])
