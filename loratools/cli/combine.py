"""loratools combine"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._ranks import rank_options, ranks_of
from loratools.cli._shares import crew, part_of
from loratools.cli._talk import Talk, pass_talk
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.adapter.model import Adapter
    from loratools.options import CheckBase
    from loratools.storage.dtypes import FloatName
    from loratools.surgery.combine import Combination
    from loratools.surgery.combine.methods._terms import Library


@make(section="Change")
@click.argument("adapters", type=options.INPUT, nargs=-1, required=True, metavar="ADAPTER...")
@options.output_option
@options.option("-w", "--weight", "weights", type=str, multiple=True, more="[default: 1 for each]")
@options.module_options
@options.adapter_options
@options.option("--method", type=str, default="linear", show_default=True)
@rank_options()
@options.option("--density", type=float)
@options.option("--gamma", type=float, more="[default: 0.01]")
@options.option("--epsilon", type=float, more="[default: 0.15 or less]")
@options.option("--seed", type=click.IntRange(min=0), more="Of a method that draws.  [default: 0]")
@options.option("--like", type=options.Words("loratools.surgery.combine.methods._terms", "Library"))
@options.option("--normalize/--no-normalize", default=None)
@options.option("--rescale/--no-rescale", default=None)
@options.option("--initial", type=options.INPUT)
@options.word_option("--check-base", "CheckBase", "strict", "Here: when the adapters belong to different base models.")
@options.to_option
@options.factors_option
@options.modules_option
@options.device_option
@options.threads_option
@options.workers_option
@options.part_option
@options.dry_run_option
@options.force_option
@pass_talk
def command(
    talk: Talk, /, adapters: tuple[str, ...], output: Path, weights: tuple[str, ...],
    include: tuple[str, ...], exclude: tuple[str, ...], dialect: str | None, alpha: float | None, method: str,
    density: float | None, gamma: float | None, epsilon: float | None, seed: int | None, like: Library | None,
    normalize: bool | None, rescale: bool | None,
    initial: str | None, check_base: CheckBase, to: str | None, dtype: FloatName | None, modules: bool,
    device: str, threads: int | None, workers: str | None, part: str | None, dry_run: bool, force: bool, **ranks: Any,
) -> show.Report:  # fmt: skip
    """Combine adapters into one, with weights, without the base model.

    The default is the weighted sum of their changes, exact for any ranks, scalings, targets and signs; with --rank,
    --energy or --budget it is the nearest there is, and the error is printed. A negative weight takes an adapter away.
    The result has the first adapter's dialect and their dtype; only PEFT's become one of ours, which PEFT reads too.
    What their headers say stays, and combined_from in the header says whose it is.

    Methods: linear; magnitude_prune, ties, dare, dare_ties, della, della_linear, breadcrumbs and sce prune or average
    single elements; knots and core_space do what ties does, in a space that the adapters share. All but linear need
    --density.

    \b
    Examples:
      loratools combine sealed -w 0.5 -o half
      loratools combine adapter other -w 0.7 -w -0.3 -o sum
      loratools combine adapter other -w q_proj=0.5,v_proj=1 -w 1 --rank 4 -o sum
      loratools combine adapter other --method ties --density 0.5 --budget 8000 -o ties
    """
    from loratools import dialects
    from loratools.storage.dtypes import ALIASES
    from loratools.surgery.combine import combine
    from loratools.surgery.combine.result import dtype_of
    from loratools.surgery.inputs import plan, read_as

    options.require_one_each(weights, adapters)
    sources = read_as([*adapters, *([initial] if initial else [])], dialect, alpha)
    opened = [dialects.open_adapter(source, initial=bool(initial)) for source in sources]
    dtype = dtype or dtype_of(opened)
    wanted, total = ranks_of(ranks, ALIASES[dtype.lower()]), size_of(opened)
    given: dict[str, Any] = {
        "weights": weights or None, "include": include or None, "exclude": exclude or None, "dialect": dialect,
        "alpha": alpha, "method": method.replace("-", "_"), "density": density, "gamma": gamma, "epsilon": epsilon,
        "seed": seed, "like": like, "normalize": normalize, "rescale": rescale, "ranks": wanted,
        "initial": initial, "check_base": check_base, "to": to,
        "dtype": dtype, "device": device, "threads": threads, "force": force,
    }  # fmt: skip
    if part and (workers or dry_run):
        raise click.UsageError("--part writes one part of the output: without --workers and --dry-run")
    call = {"adapters": list(adapters), "output": output, **given}
    if part:
        return part_of("combine", call, part)
    if dry_run:
        return options.would(plan(combine, adapters, output, **given), modules=modules)
    with talk.progress("combining", total) as bar, crew("combine", call, workers, bar):
        combination = combine(adapters, output, **given, progress=bar)
    talk.warn(*combination.warnings)
    return gathered(combination, modules=modules)


def gathered(combination: Combination, *, modules: bool = False) -> show.Report:
    """Return the report of a combination, in one process or of parts; with `modules` what each of them keeps."""
    kept = table(combination) if modules else ()
    return show.Report(show.Fields(combination), [*lines(combination, "combined"), *kept])


def size_of(adapters: Iterable[Adapter]) -> int:
    """Return the bytes of all factors."""
    return sum(
        lazy.nbytes for adapter in adapters for update in adapter.updates.values() for lazy in update.parts.values()
    )


def lines(combination: Combination, done: str, *, method: bool = True) -> Iterator[str]:
    """Yield what was written and how near it is, with the `method` where there is a choice of one."""
    ranks = sorted({share.rank for share in combination.shares})
    dropped = combination.dropped
    how = f"method {combination.method}, " if method else ""
    yield from show.fields(
        (done, f"{combination.output} ({how}{counted(len(combination.shares), 'module')})"),
        ("rank", " to ".join(dict.fromkeys(str(rank) for rank in (ranks[:1] + ranks[-1:]))) or "none"),
        ("parameters", show.exact(combination.parameters)),
        ("error", f"{combination.error:.3g} of the change ({combination.optimum:.3g} is the least at these ranks)"),
        ("digest", combination.digest),
        ("seed", None if combination.seed is None else str(combination.seed)),
        ("whole", counted(len(combination.replaced), "tensor") if combination.replaced else None),
        ("left out", f"{counted(len(dropped), 'module')}, whose change is zero" if dropped else None),
    )


def table(combination: Combination) -> Iterator[str]:
    """Yield what each module keeps."""
    from loratools.adapter.naming.compact import natural

    heading = ("module", "rank", "of", "energy kept", "error", "sigma first", "last kept")
    yield ""
    yield from show.table(
        heading,
        (
            (
                share.module, str(share.rank), str(share.true_rank), f"{share.energy:.2%}",
                f"{share.error / share.norm:.2e}", show.number(share.largest), show.number(share.smallest),
            )
            for share in sorted(combination.shares, key=lambda share: natural(share.module))
        ),
        right=range(1, len(heading)),
    )  # fmt: skip
