"""Inputs: a path, or hf://org/name[@revision][/file], fetched once the whole command line is known to be right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from loratools.cli._talk import Talk
from loratools.storage.sources import Need, is_reference


class Source(click.Path):
    """An input file or folder, here or on the Hub; the command's function gets a local path either way.

    `need` is what the command reads of it: an adapter's files, a model's, or headers alone; or a function that tells
    it from the command's parameters.
    """

    def __init__(self, need: Need | Callable[[Mapping[str, Any]], Need]) -> None:
        super().__init__(path_type=Path)
        self.need = need

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Keep a reference to the Hub as the text that it is; an existing local path always wins."""
        if is_reference(value):
            return value
        return super().convert(value, param, ctx)


def fetch(ctx: click.Context) -> None:
    """Put local paths in the place of references to the Hub, in the parameters of a command that is about to run."""
    for option in ctx.command.params:
        source, name = option.type, option.name
        if isinstance(source, Source) and name is not None and (given := ctx.params.get(name)):
            need = source.need if isinstance(source.need, str) else source.need(ctx.params)
            several = isinstance(given, tuple)
            paths = tuple(_local(one, need, ctx) for one in (given if several else (given,)))
            ctx.params[name] = paths if several else paths[0]


def _local(given: str | Path, need: Need, ctx: click.Context) -> Path:
    if not isinstance(given, str):
        return given
    from loratools.storage.sources import local, session

    talk = ctx.find_root().ensure_object(Talk)
    current = ctx.with_resource(session(lambda name, total: talk.progress(f"fetching {name}", total)))
    talk.names = current.names  # a folder that goes away with this process tells nobody anything
    return local(given, need)
