"""loratools report"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk


def _renamed(name: str, _file: bool, _values: Mapping[str, Any]) -> str:
    """Return the name of a page: the input's, with the ending of a page."""
    return f"{name}.html"


@make(section="Look", each="inputs", renamed=_renamed, together=True)
@click.argument("inputs", type=options.INPUT)
@options.output_option
@options.option("--base", type=options.INPUT, more="For |dW|/|W|, Table 7, and changes that depend on it.")
@options.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True,
    more="The control of a comparison, the probes of a merge.",
)  # fmt: skip
@options.force_option
@pass_talk
def command(
    talk: Talk, inputs: str | tuple[str, ...], output: Path, base: str | None, seed: int, force: bool
) -> show.Report:
    """Write a page of figures about adapters or a merge: one HTML file that needs no network and no script.

    What the page shows follows from what the inputs are. An adapter: where it changes the model, its singular values,
    and what a smaller rank keeps; with --base each change stands beside the weight that it changes. Two adapters or
    more: cosines, the directions that they share beside those of chance (Figures 3 and 4 of the LoRA paper), and with
    --base its Table 7. A merged model with --base, and its adapters: what changed, and how much of each module's
    change survived. An adapter of extract-svd: error, rank and class of every tensor. A folder of adapters: who
    resembles whom, and which are the same. Every figure has a table of its numbers below it. Equal inputs give equal
    bytes, and no path of this machine is in them. --each FOLDER makes a page of every adapter in it, below the folder
    that -o names.

    \b
    Examples:
      loratools report adapter -o page.html
      loratools report adapter --base base -o page.html
      loratools report adapter other --base base -o page.html
      loratools report merged adapter --base base -o page.html
      loratools report hf://lab/adapter -o page.html
    """
    from loratools.reports import report

    with talk.progress("reading", 0) as advance:
        made = report(inputs, output, base=base, seed=seed, force=force, progress=advance)
    lines = show.fields(
        ("wrote", f"{made.output}, {show.size(made.nbytes)}"), ("page", made.kind), (made.kind, made.lead)
    )
    return show.Report(show.plain(made), lines, line=f"wrote {made.output} ({made.kind}, {show.size(made.nbytes)})")
