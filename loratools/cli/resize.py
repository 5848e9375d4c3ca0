"""loratools resize"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._batch import named_for
from loratools.cli._group import command as make
from loratools.cli._ranks import rank_options, ranks_of
from loratools.cli._shares import crew, part_of
from loratools.cli._talk import Talk, pass_talk
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.storage.dtypes import FloatName
    from loratools.surgery.combine import Combination


def _renamed(name: str, file: bool, values: Mapping[str, Any]) -> str:
    """Return an output's name: the input's, or a file of the dialect that it is written in."""
    return named_for(name, values["to"]) if file and values["to"] else name


@make(section="Change", each="adapter", renamed=_renamed)
@click.argument("adapter", type=options.INPUT)
@options.output_option
@rank_options()
@options.include_option
@options.option("--exclude", type=str, multiple=True, more="They are not in the result.")
@options.to_option
@options.modules_option
@options.factors_option
@options.adapter_options
@options.device_option
@options.threads_option
@options.workers_option
@options.part_option
@options.dry_run_option
@options.force_option
@pass_talk
def command(
    talk: Talk, /, adapter: str, output: Path, to: str | None, dtype: FloatName | None, dialect: str | None,
    alpha: float | None,
    include: tuple[str, ...], exclude: tuple[str, ...], device: str, threads: int | None, workers: str | None,
    part: str | None, modules: bool, dry_run: bool, force: bool, **ranks: Any,
) -> show.Report:  # fmt: skip
    """Give an adapter other ranks, with the least error there is; --modules prints what each module keeps.

    The singular values of every change are found in factor space, in float64. --sv-ratio, --sv-fro and --sv-cumulative
    are kohya's rules, with the ranks of its script (older ones keep one more); --energy E is --sv-fro of the root of E.
    --budget shares one number of parameters out among all modules. A rank above the true one changes nothing. The
    result is of the adapter's own dialect and dtype; only a PEFT adapter becomes one of ours, which PEFT reads too.

    \b
    Examples:
      loratools resize adapter --rank 2 -o small
      loratools resize adapter --energy 0.9 -o small
      loratools resize adapter --budget 2000 -o small
      loratools resize adapter --rank 4 --exclude '*.layers.0.*' -o small
    """
    from loratools import dialects
    from loratools.cli.combine import size_of
    from loratools.storage.dtypes import ALIASES
    from loratools.surgery.combine.result import dtype_of
    from loratools.surgery.inputs import plan
    from loratools.surgery.resize import resize

    source = dialects.open_adapter(adapter, dialect=dialect, alpha=alpha)
    dtype = dtype or dtype_of([source])
    wanted = ranks_of(ranks, ALIASES[dtype.lower()])
    if wanted is None:
        raise click.UsageError(
            "say how ranks are chosen: --rank, --energy, --ratio, --budget, --sv-ratio, --sv-fro or --sv-cumulative"
        )
    given: dict[str, Any] = {
        "include": include or None, "exclude": exclude or None, "to": to, "dtype": dtype, "device": device,
        "threads": threads, "force": force,
    }  # fmt: skip
    call = {
        "adapter": adapter, "output": output, "ranks": wanted, "dialect": dialect, "alpha": alpha, **given,
    }  # fmt: skip
    if part and (workers or dry_run):
        raise click.UsageError("--part writes one part of the output: without --workers and --dry-run")
    if part:
        return part_of("resize", call, part)
    if dry_run:
        return options.would(
            plan(resize, adapter, output, wanted, dialect=dialect, alpha=alpha, **given), modules=modules
        )
    with talk.progress("resizing", size_of([source])) as bar, crew("resize", call, workers, bar):
        resized = resize(adapter, output, wanted, dialect=dialect, alpha=alpha, **given, progress=bar)
    return gathered(resized, modules=modules)


def gathered(resized: Combination, *, modules: bool = False) -> show.Report:
    """Return the report of a resize, in one process or of parts; with `modules` what each of them keeps."""
    from loratools.cli.combine import lines, table

    changed = counted(len(resized.shares), "module")
    line = f"wrote {resized.output} ({changed}, error {resized.error:.3g} of the change)"
    kept = table(resized) if modules else ()
    return show.Report(show.Fields(resized), [*lines(resized, "resized", method=False), *kept], line=line)
