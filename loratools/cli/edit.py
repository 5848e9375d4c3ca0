"""loratools edit"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._facts import entry_lines, fact_lines
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.surgery.edit import Edit
    from loratools.surgery.edit.changing import Change

_CLIP = 200
"""Characters of a value that a line shows; an entry can be a picture."""

_MOST = 1000
"""Characters of the keys in the line of one of several adapters."""


@make(section="Change", each="adapter")
@click.argument("adapter", type=options.INPUT)
@options.option("-o", "--output", type=options.PATH, more="[default: the adapter is changed in place]")
@options.option("--trigger")
@options.option("--title")
@options.option("--tags")
@options.option("--base-id", "--base", "base")
@options.option("--description")
@options.option("--author")
@options.option("--license")
@options.option("--thumbnail", type=options.PATH)
@options.option("--set", "entries", multiple=True)
@options.option("--unset", multiple=True)
@options.option("--strip", is_flag=True)
@options.dry_run_option
@options.dialect_option
@options.force_option
@pass_talk
def command(
    talk: Talk, /, adapter: str, output: Path | None, trigger: str | None, title: str | None, tags: str | None,
    base: str | None, description: str | None, author: str | None, license: str | None, thumbnail: Path | None,
    entries: tuple[str, ...], unset: tuple[str, ...], strip: bool, dry_run: bool, dialect: str | None, force: bool,
) -> show.Report:  # fmt: skip
    """Show what an adapter's files say about it, or change it; no tensor is touched.

    Without an option to change something it lists the facts and every entry. A fact is written where the adapter's
    layout keeps it: kohya's and ComfyUI's in the header, PEFT's base in adapter_config.json, that of a sealed adapter
    in its manifest; and wherever the files have it already, so that header, config and README.md agree. The seal holds
    after an edit. In place, a reader finds the old file or the new one, also after a kill. Of a file of 64 MiB or more
    the header alone is written over, which takes a moment and not a copy's time; a power cut in that moment is made
    good by the next edit. What decides the result (alpha, rank, module names) is no metadata and stays.

    \b
    Examples:
      loratools edit adapter
      loratools edit adapter --title 'A pirate' --tags 'style, pirate'
      loratools edit adapter --base org/base-model --license apache-2.0
      loratools edit adapter --strip --dry-run
      loratools edit adapter --strip -o public
      loratools edit adapter --set comment='rank 8 is enough' --unset 'ss_*'
    """
    from loratools.surgery.edit import edit

    result = edit(
        adapter, output, trigger=trigger, title=title, tags=tags, base=base, description=description, author=author,
        license=license, thumbnail=thumbnail, entries=_pairs(entries), unset=unset, strip=strip, dialect=dialect,
        force=force, dry_run=dry_run,
    )  # fmt: skip
    asked = any(value is not None for value in (trigger, title, tags, base, description, author, license, thumbnail))
    changed = asked or bool(entries or unset or strip)
    made = f"{'; dry run' if dry_run else ''}{f', written to {result.output}' if result.output else ''}"
    keys = ", ".join(f"{each.key} ({each.why})" if each.why else each.key for each in result.changes)
    what = f"{counted(len(result.changes), 'change')}{made}{': ' if keys else ''}{show.clipped(keys, _MOST)}"
    line = what if changed else None
    return show.Report(show.plain(result), _lines(result, changed), line=line)


def _pairs(entries: Sequence[str]) -> Mapping[str, str]:
    pairs = [entry.partition("=") for entry in entries]
    if wrong := [key for key, equals, _ in pairs if not (key and equals)]:
        raise click.UsageError(f"--set {wrong[0]}: give a key and a value, as --set key=value")
    return {key: value for key, _, value in pairs}


def _lines(result: Edit, changed: bool) -> Iterator[str]:
    if not changed:
        yield from show.fields(("adapter", result.path), ("layout", result.dialect), *fact_lines(result.facts))
        yield ""
        yield from entry_lines(result.entries)
        return
    for change in result.changes:
        yield _line(change)
    where = result.output or result.path
    if result.dry_run:
        yield f"{counted(len(result.changes), 'change')} to {result.path}; nothing was written"
    elif not result.changes and not result.output:
        yield f"{where}: nothing to change"
    else:
        yield f"{where}: {counted(len(result.changes), 'change')}"


def _line(change: Change) -> str:
    why = f" ({change.why})" if change.why else ""
    key = f"{change.where}: {change.key}"
    if change.new is None:
        return f"- {key} = {show.entry(change.old or '', _CLIP)}{why}"
    if change.old is None:
        return f"+ {key} = {show.entry(change.new, _CLIP)}{why}"
    if change.key == "text":
        return f"~ {key}{why}"
    return f"~ {key} = {show.entry(change.old or '', _CLIP)} -> {show.entry(change.new, _CLIP)}{why}"
