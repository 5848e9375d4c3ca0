"""loratools report"""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make


@make(section="Look")
@click.argument("inputs", type=options.INPUT, nargs=-1, required=True)
@options.output_option
@click.option(
    "--base", type=options.INPUT, metavar="PATH",
    help="Base model: for |dW|/|W|, Table 7 of the paper, and changes that depend on it.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
    help="Seed of what is random on the page: the control of a comparison, the probes of a merge.",
)  # fmt: skip
@options.force_option
def command(inputs: tuple[str, ...], output: Path, base: str | None, seed: int, force: bool) -> show.Report:
    """Write a page of figures about adapters or a merge: one HTML file, offline, without a script.

    What it shows follows from what the inputs are. One adapter: where it changes the model, its singular values, and
    what a smaller rank would keep. With --base each change is also shown beside the weight that it changes. Every
    figure has its numbers in a table below it.

    \b
    Examples:
      loratools report adapter -o page.html
      loratools report adapter --base base -o page.html
    """
    from loratools.reports import report

    made = report(inputs, output, base=base, seed=seed, force=force)
    lines = show.fields(
        ("wrote", f"{made.output}, {show.size(made.nbytes)}"), ("page", made.kind), (made.kind, made.lead)
    )
    return show.Report(show.plain(made), lines)
