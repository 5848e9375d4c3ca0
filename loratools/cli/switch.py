"""loratools switch"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.surgery.switch import SwitchReport


@make(section="Change")
@click.argument("model", type=options.INPUT)
@options.option("--take", type=options.INPUT, required=True, multiple=True)
@options.option("--put", type=options.INPUT, required=True, multiple=True)
@options.output_option
@options.weight_option
@options.option("--include", type=str, multiple=True, more="Of the adapters that are put in.")
@options.option("--exclude", type=str, multiple=True, more="Of the adapters that are put in.")
@options.adapter_options
@options.model_type_option
@options.option("--tied", type=options.Words("loratools.options", "Tied"), more="[default: as at the merge]")
@options.check_base_option
@options.option(
    "--keep-residual/--no-keep-residual", default=None,
    more="So the next switch is exact too.  [default: where it was kept]",
)  # fmt: skip
@options.threads_option
@options.dry_run_option
@options.force_option
@options.durable_option
@pass_talk
def command(
    talk: Talk, /, model: str, take: tuple[str, ...], put: tuple[str, ...], output: Path,
    weights: tuple[float | str, ...], include: tuple[str, ...], exclude: tuple[str, ...], dry_run: bool, **choices: Any,
) -> show.Report:  # fmt: skip
    """Take one adapter out of a merged model and put another in, in one pass.

    Beside the residual of `merge --keep-residual` this is exact: each tensor of the base is restored, checked, and
    merged with the new adapter, as if that were merged into the base; a residual is kept again, for the next switch.
    Without a residual the result is W' - dW(taken) + dW(put) in float32, rounded once, which is said to be approximate,
    and how far it can be from the merge. Weights are those of the adapters that are put in.

    \b
    Examples:
      loratools switch merged --take adapter --put other -o switched
    """
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.inputs import plan
    from loratools.surgery.switch import switch

    options.require_one_each(weights, put)
    choices |= {"weights": weights or None, "include": include or None, "exclude": exclude or None}
    if dry_run:
        return options.would(plan(switch, model, take, put, output, **choices))
    with talk.progress("switching", Checkpoint.open(model).nbytes) as advance:
        report = switch(model, take, put, output, **choices, progress=advance)
    return show.Report(show.plain(report), _lines(report))


def _lines(report: SwitchReport) -> Iterator[str]:
    how = "exactly: the residual brought every bit of the base back" if report.exact else "APPROXIMATE: no residual"
    error = f"at most {report.error_bound:.3g} in any element" if report.error_bound else "0: as merged into the base"
    left = report.residual
    kept = (
        "not measured" if report.retention is None else f"about {report.retention:.2%} of the change survives rounding"
    )
    yield from show.fields(
        ("switched", report.output),
        ("how", how),
        ("changed", f"{report.changed} of {counted(report.tensors, 'tensor')}"),
        ("error", error),
        ("retention", kept),
        ("residual", show.size(left.nbytes) if left else None),
    )
