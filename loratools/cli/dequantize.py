"""loratools dequantize"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._shares import files_of, files_shared
from loratools.cli._talk import Talk, pass_talk
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.surgery.dequantize import DequantizeReport


@make(section="Change")
@click.argument("model", type=options.INPUT)
@options.output_option
@options.option(
    "--dtype", type=options.Words("loratools.storage.dtypes", "SPELLINGS"),
    more="Every float tensor has it.  [default: codes in what the model computes in]",
)  # fmt: skip
@options.option("--max-shard-size", type=str, more="[default: 5GB]")
@options.option("--verify", is_flag=True, more="Every tensor is compared with the codes.")
@options.threads_option
@options.workers_option
@options.part_option
@options.dry_run_option
@options.force_option
@options.durable_option
@pass_talk
def command(
    talk: Talk, /, model: str, output: Path, dry_run: bool, workers: str | None, part: str | None, **choices: Any
) -> show.Report:  # fmt: skip
    """Write a quantized model in 16 bit: every code as the number that it stands for, rounded once.

    bitsandbytes, FP8, MXFP4 and NVFP4, GPTQ, AWQ, compressed-tensors, MLX and others are read by their own formulas, in
    constant memory. Other tensors are copied byte for byte, and config.json no longer says that it is quantized.

    \b
    Examples:
      loratools dequantize quantized -o plain
      loratools dequantize quantized -o plain --dtype f32 --verify
    """
    from loratools.parallel.call import Call
    from loratools.storage import sources
    from loratools.storage.checkpoint import Checkpoint
    from loratools.storage.checkpoint.logical import logical
    from loratools.surgery.dequantize import PLACES, dequantize
    from loratools.surgery.inputs import plan

    call = None
    if workers or part:
        if part and (workers or dry_run or choices["verify"]):
            raise click.UsageError("--part writes one part of the output: without --workers, --verify and --dry-run")
        call = Call.of("dequantize", {"model": model, "output": output, **choices}, PLACES)
    if part and call:
        return files_of(call, part)
    opened = Checkpoint.open(sources.local(model, "header" if dry_run else "checkpoint"))
    if dry_run:
        return options.would(plan(dequantize, opened, output, **choices))
    total = sum(spec.parameters * 2 if spec.encoding else spec.nbytes for spec in logical(opened).specs.values())
    with talk.progress("dequantizing", total) as advance:
        if workers and call:
            report = files_shared(call, workers, advance)
        else:
            report = dequantize(opened, output, progress=advance, **choices)
    return gathered(report)


def gathered(report: DequantizeReport) -> show.Report:
    """Return the report of a model that is written, in one process or of parts."""
    text = show.fields(
        ("dequantized", report.output),
        ("modules", "; ".join(f"{count} of {label}" for label, count in report.schemes.items())),
        ("wrote", f"{show.size(report.bytes_written)}, from {show.size(report.bytes_before)}"),
        ("verified", None if report.verified is None else f"{counted(report.verified, 'tensor')}, root {report.root}"),
    )
    return show.Report(show.plain(report), text)
