"""loratools find"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._facts import why_apart
from loratools.cli._group import command as make
from loratools.cli._pieces import fields_of
from loratools.cli._talk import Talk, pass_talk

if TYPE_CHECKING:
    from loratools.surgery.find import Findings, FoundAdapter

_LEAST = 8  # columns of a name, however narrow the terminal is
_DIGITS = 12  # of a digest


@make(section="Look")
@click.argument("folder", type=options.INPUT)
@options.option("--base", type=options.INPUT, more="Only its adapters; its name on the Hub will do.")
@options.option("--similar", type=click.FloatRange(min=0, max=1, min_open=True), default=0.9, show_default=True)
@pass_talk
def command(talk: Talk, folder: str, base: str | None, similar: float) -> show.Report:
    """List the adapters below a folder: which are the same, by what they do, and which nearly.

    Folders and single files in every dialect. Two adapters are the same when their dW = scaling B A are, but for
    rounding: in another dialect or dtype, sealed or not, with the scaling folded in, with factors in another basis. For
    that a sketch of 256 numbers is made of each adapter, in one pass over its factors; where two sketches are near, the
    cosine of the two dW is computed exactly. Each adapter is measured against the 8 nearest. What DoRA, OFT, (IA)3 or a
    tensor trained whole does depends on the base; such adapters are the same when their parameters are.

    \b
    Examples:
      loratools find .
      loratools find . --base org/model --similar 0.99
      loratools find . --json
    """
    from loratools.surgery.find import find

    with talk.progress("reading", 0) as advance:
        found = find(folder, base=base, similar=similar, progress=advance)
    return show.Report(fields_of(found), _lines(found), ok=not found.failed)


def _lines(found: Findings) -> Iterator[str]:
    group = {path: str(number) for number, same in enumerate(found.duplicates, 1) for path in same.paths}
    if found.adapters:
        yield from _table(found, group)
        yield ""
    for number, same in enumerate(found.duplicates, 1):
        how = "the same parameters" if same.by_parameters else "the same dW" if same.norm else "dW = 0"
        off = max(same.distances)
        yield f"same {number}: {how}{f', up to {off:.1g} of it' if off > 0 else ''}: {', '.join(same.paths)}"
    for pair in found.near:
        size = "" if abs(pair.ratio - 1) < 0.005 else f", {pair.ratio:.3g} times as large"
        yield f"near: cosine {pair.cosine:.4f}{size}: {pair.first}, {pair.second}"
    if found.unlisted:
        yield f"… and up to {found.unlisted} more pairs as near, not measured: each adapter was against the 8 nearest"
    if found.duplicates or found.near:
        yield ""
    apart = [adapter.by_parameters for adapter in found.adapters if adapter.by_parameters]
    yield from show.fields(
        ("adapters", f"{len(found.adapters)}, {show.size(sum(adapter.nbytes for adapter in found.adapters))}"),
        ("of another base", str(found.unselected) if found.unselected else None),
        ("by parameters", f"{len(apart)}, for {why_apart(apart)}" if apart else None),
        ("no adapters", f"{found.others} models or other files" if found.others else None),
        ("not read", f"{len(found.failed)}, as warned" if found.failed else None),
    )


def _table(found: Findings, group: dict[str, str]) -> Iterator[str]:
    """Yield the table; names are cut so that a line fits the terminal, where the output is one."""
    heading = ["adapter", "base", "kind", "rank", "size", "digest", "dialect", *(["same"] if group else [])]
    rows = [[*_cells(adapter), *([group.get(adapter.path, "")] if group else [])] for adapter in found.adapters]
    widths = [max(len(row[column]) for row in [heading, *rows]) for column in range(len(heading))]
    if sys.stdout is None or not sys.stdout.isatty():
        yield from show.table(heading, rows, right=(3, 4))
        return
    width = shutil.get_terminal_size((sum(widths) + 2 * len(widths), 0)).columns
    over = sum(widths) + 2 * (len(widths) - 1) - width
    for column in (1, 0):  # the base's name gives way first
        least = min(widths[column], max(_LEAST, widths[column] - over))
        over -= widths[column] - least
        shown = shortened([row[column] for row in rows], least)
        for row, name in zip(rows, shown, strict=True):
            row[column] = name
    yield from show.table(heading, rows, right=(3, 4))


def _cells(adapter: FoundAdapter) -> list[str]:
    least, most = adapter.ranks
    kinds = [*adapter.kinds, *(["whole"] if adapter.replacements else [])]
    digest = adapter.digest.partition(":")[2][:_DIGITS]
    rank = "" if not most else str(most) if least == most else f"{least}-{most}"
    shown = " ".join(kinds[:2]) + (" …" if len(kinds) > 2 else "")
    return [adapter.path, adapter.base or "", shown, rank, show.size(adapter.nbytes), digest, adapter.dialect]


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Return names of at most so many columns: without the ending that all share, and cut in the middle.

    >>> shortened(["woman.safetensors", "armor.safetensors"], 8)
    ['woman', 'armor']
    """
    if all(len(name) <= width for name in names):
        return list(names)
    endings = {Path(name).suffix for name in names if name}
    ending = endings.pop() if len(endings) == 1 else ""
    return [_cut(name.removesuffix(ending), width) for name in names]


def _cut(text: str, width: int) -> str:
    """Return both ends of a text, with a sign of what is left out between them."""
    if len(text) <= width:
        return text
    begin = width // 2
    return f"{text[:begin]}…{text[begin + 1 - width :]}"
