"""loratools unmerge"""

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
    from loratools.surgery.unmerge import UnmergeReport

_WAYS = {
    "base": "copied from the base",
    "residual": "restored from the merged model and its residual, bit for bit",
    "approximate": "APPROXIMATE: W' − ΔW, without what rounding destroyed",
}


@make(section="Change")
@click.argument("model", type=options.INPUT)
@click.argument("adapters", type=options.INPUT, nargs=-1, required=True, metavar="ADAPTER...")
@options.output_option
@options.option("--base", type=options.INPUT, more="Where it is at hand.")
@options.weight_option
@options.module_options
@options.adapter_options
@options.model_type_option
@options.option(
    "--tied", type=options.Words("loratools.options", "Tied"), more="[default: as at the merge, both without a record]"
)
@options.threads_option
@options.dry_run_option
@options.force_option
@options.durable_option
@pass_talk
def command(
    talk: Talk, /, model: str, adapters: tuple[str, ...], output: Path, base: str | None,
    weights: tuple[float | str, ...], include: tuple[str, ...], exclude: tuple[str, ...], dry_run: bool, **choices: Any,
) -> show.Report:  # fmt: skip
    """Take adapters out of a merged model again.

    With --base, the base is copied and held against what the merge recorded of it. With the residual that `merge
    --keep-residual` left beside the model, every bit is restored from the model and the adapters alone, and the result
    is proved by the hash of the base that was recorded at the merge. With neither, the result is W' - ΔW in float32,
    rounded once: it is said to be approximate, and how far it can be from the base.

    \b
    Examples:
      loratools unmerge merged adapter -o unmerged --base base
      loratools unmerge merged adapter -o unmerged
    """
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.inputs import plan
    from loratools.surgery.unmerge import unmerge

    options.require_one_each(weights, adapters)
    choices |= {"base": base, "weights": weights or None, "include": include or None, "exclude": exclude or None}
    if dry_run:
        return options.would(plan(unmerge, model, adapters, output, **choices))
    with talk.progress("unmerging", Checkpoint.open(base or model).nbytes) as advance:
        report = unmerge(model, adapters, output, **choices, progress=advance)
    return show.Report(show.plain(report), _lines(report))


def _lines(report: UnmergeReport) -> Iterator[str]:
    exact = "0: every bit is the base's"
    yield from show.fields(
        ("unmerged", report.output),
        ("how", _WAYS[report.method]),
        ("restored", f"{report.restored} of {counted(report.tensors, 'tensor')}"),
        ("proved by", report.proved or "nothing"),
        ("root hash", report.root or None),
        ("error", f"at most {report.error_bound:.3g} in any element" if report.error_bound else exact),
    )
