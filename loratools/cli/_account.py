"""What a command line makes an output of: its options that are no default, and its inputs, for the output's record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options

if TYPE_CHECKING:
    from loratools.recipe.catalog import Role

_MODELS = frozenset({"base", "tuned", "model", "original", "onto"})
_NOT_RECORDED = frozenset({
    "output", "keep", "force", "dry-run", "resume", "durable", "threads", "verify", "modules", "workers", "part",
})  # fmt: skip
"""Options that no byte of the result depends on: how a run goes, and what it prints."""
SENDS = {"merge": frozenset({"push", "no-local", "private", "base-model", "license"})}
"""Command -> its options that send the result elsewhere too."""
_THREADS = frozenset({"extract-svd"})
"""Commands whose last bits depend on the number of threads."""


def long_name(option: click.Parameter) -> str:
    """Return the long name of an option, or the name of an argument, with hyphens."""
    long = next((name for name in option.opts if name.startswith("--")), option.name or "")
    return long.lstrip("-").replace("_", "-")


def role_of(option: click.Parameter) -> Role | None:
    """Return what an input is, an adapter or a model; None for what is no input."""
    if option.type is not options.INPUT:
        return None
    return "model" if long_name(option) in _MODELS else "adapter"


def is_recorded(option: click.Parameter, command: str) -> bool:
    """Tell whether the result of a command depends on an option that is no input."""
    return long_name(option) not in _NOT_RECORDED | SENDS.get(command, frozenset())


def account_of(name: str, context: click.Context) -> dict[str, Any]:
    """Return the account of the command that runs in a context, its inputs by digest."""
    from loratools.parallel import cores
    from loratools.recipe.account import describe

    chosen: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    roles: dict[str, Role] = {}
    without = click.Context(context.command)  # whose defaults are those of the command, not of the environment
    for option in context.command.params:
        value = context.params.get(str(option.name))
        long = long_name(option)
        if role := role_of(option):
            if value not in (None, ()):
                inputs[long], roles[long] = value, role
        elif option.expose_value and is_recorded(option, name) and value != option.get_default(without):
            chosen[long] = _plain(value)
    if name in _THREADS:
        chosen["threads"] = context.params.get("threads") or cores()
    chosen = {long: value for long, value in chosen.items() if value not in (None, [])}
    output = context.params.get("output")
    return describe(name, chosen, inputs, roles, output.suffix if isinstance(output, Path) else "")


def _plain(value: Any) -> Any:
    """Return an option's value as JSON has it."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Path):  # a place on this machine means nothing elsewhere
        from loratools.recipe.identity import files_of

        return files_of(value) if value.is_file() else None
    return value
