"""loratools switch"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk

if TYPE_CHECKING:
    from loratools.options import CheckBase
    from loratools.surgery.switch import SwitchReport


@make(section="Change")
@click.argument("model", type=options.INPUT)
@click.option(
    "--out", type=options.INPUT, required=True, multiple=True, metavar="PATH",
    help="Adapter to take out; once for each.",
)  # fmt: skip
@click.option(
    "--in", "into", type=options.INPUT, required=True, multiple=True, metavar="PATH",
    help="Adapter to put in; once for each.",
)  # fmt: skip
@options.output_option
@options.weight_option
@options.check_base_option
@options.threads_option
@options.force_option
@options.durable_option
@pass_talk
def command(
    talk: Talk, model: str, out: tuple[str, ...], into: tuple[str, ...], output: Path, weights: tuple[float, ...],
    check_base: CheckBase, threads: int | None, force: bool, durable: bool,
) -> show.Report:  # fmt: skip
    """Take one adapter out of a merged model and put another in, in one pass.

    Beside the residual of `merge --keep-residual` this is exact: each tensor of the base is restored, checked, and
    merged with the new adapter, as if that were merged into the base. Without a residual the result is
    W' - dW(out) + dW(in) in float32, rounded once, which is said to be approximate. Weights are those of the adapters
    that are put in.

    \b
    Examples:
      loratools switch merged --out adapter --in other -o switched
    """
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.switch import switch

    options.require_one_each(weights, into)
    with talk.progress("switching", Checkpoint.open(model).nbytes) as advance:
        report = switch(
            model, out, into, output, weights=weights or None,
            check_base=check_base, threads=threads, force=force, durable=durable, progress=advance,
        )  # fmt: skip
    talk.note(*report.notes)
    return show.Report(show.plain(report), _lines(report))


def _lines(report: SwitchReport) -> Iterator[str]:
    how = "exactly: the residual brought every bit of the base back" if report.exact else "APPROXIMATE: no residual"
    error = f"at most {report.error_bound:.3g} in any element" if report.error_bound else "0: as merged into the base"
    kept = "not measured" if report.retention is None else f"{report.retention:.2%} of the change survives rounding"
    yield from show.fields(
        ("switched", report.output),
        ("how", how),
        ("changed", f"{report.changed} of {report.tensors} tensors"),
        ("error", error),
        ("retention", kept),
    )
