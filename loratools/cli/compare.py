"""loratools compare"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._facts import why_apart
from loratools.cli._group import command as make
from loratools.cli._pieces import fields_of
from loratools.cli._talk import Talk, pass_talk
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.surgery.compare import Comparison, ModuleComparison
    from loratools.surgery.find import Pairs

_MOST = 10  # modules shown unless all are asked for
_TABLE, _SHOWN_PAIRS = 12, 20  # adapters whose table fits a line; pairs that are shown of more


@make(section="Look")
@click.argument("first", type=options.INPUT, required=False)
@click.argument("second", type=options.INPUT, required=False)
@options.option("--all", "every", type=options.PATH)
@options.option("--base", type=options.INPUT, more="For changes that depend on it, and for amplification.")
@options.module_options
@options.adapter_options
@options.model_type_option
@options.modules_option
@options.option("--grid", type=str)
@options.option("--paper", is_flag=True)
@options.option("--seed", type=click.IntRange(min=0), more="For --paper.  [default: 0]")
@options.option("--similar", type=float, more="With --all.  [default: 0.9]")
@options.option("--most", type=click.IntRange(min=1))
@options.threads_option
@pass_talk
def command(
    talk: Talk, first: str | None, second: str | None, every: Path | None, base: str | None, similar: float | None,
    most: int | None, modules: bool, grid: str | None, paper: bool, seed: int | None, include: tuple[str, ...],
    exclude: tuple[str, ...],
    dialect: str | None, alpha: float | None, model_type: str | None, threads: int | None,
) -> show.Report:  # fmt: skip
    """Tell how alike two adapters are: the angle between their changes, and the subspaces they use.

    The cosine is that of the two dW = scaling B A, computed from the factors. What a change of DoRA, (IA)3, OFT, GLoRA
    or a tensor trained whole is depends on the base: with --base it is W' - W. The input (output) overlap is the
    normalized subspace similarity of the LoRA paper, section 7.2, between the right (left) singular vectors at full
    rank: 1 when one subspace contains the other; random ones would reach what stands beside it as chance. With --base
    the amplification factor of section 7.3 says how much an adapter strengthens directions that the base hardly uses.
    The paper takes the singular vectors of A alone, where these are of dW: the same subspace at full rank, in another
    order. --paper gives both, the similarity of two random Gaussian matrices as control, and with --base Table 7: how
    strong the base is, |U'WV|, in the directions of dW, in its own leading ones, and in random ones.

    \b
    Examples:
      loratools compare adapter other
      loratools compare adapter other --base base --modules
      loratools compare adapter other --grid model.layers.0.self_attn.q_proj
      loratools compare adapter other --base base --paper
      loratools compare --all .
    """
    from loratools.surgery.compare import compare

    if every is not None:
        more = (first, modules, grid, paper, include, exclude, dialect, alpha, model_type, threads)
        if any(more):
            raise click.UsageError(
                "--all compares whole adapters below a folder: only --base, --similar and --most go with it"
            )
        return _all(talk, every, base, 0.9 if similar is None else similar, most)
    if similar is not None or most is not None:
        raise click.UsageError(f"{'--most' if similar is None else '--similar'} goes with --all FOLDER")
    if first is None or second is None:
        raise click.UsageError("missing argument 'SECOND'" if first else "missing argument 'FIRST', or --all FOLDER")

    if seed is not None and not paper:
        raise click.UsageError("--seed draws what --paper compares with; without it nothing is random")
    comparison = compare(
        first, second, base, paper=paper, seed=seed or 0, include=include or None, exclude=exclude or None,
        dialect=dialect, alpha=alpha, model_type=model_type, threads=threads,
    )  # fmt: skip
    document = show.Fields(comparison, modules=lambda: [_module(module) for module in comparison.modules])
    if grid is None:
        return show.Report(document, [*_lines(comparison, modules), *_paper(comparison, modules)])
    chosen = [module for module in comparison.modules if module.module == grid]
    if not chosen:
        raise click.UsageError(f"--grid: the adapters do not both change {grid}")
    return show.Report(document, _grid(chosen[0]))


def _module(module: ModuleComparison) -> dict[str, Any]:
    """Return the document of a module: what it holds, and what follows of it."""
    document: dict[str, Any] = show.plain(module)
    return document | {"input_overlap": module.input_overlap, "output_overlap": module.output_overlap}


def _all(talk: Talk, folder: Path, base: str | None, similar: float, most: int | None) -> show.Report:
    """Compare every two adapters below a folder."""
    from loratools.surgery.find import compare_all

    with talk.progress("reading", 0) as advance:
        pairs = compare_all(folder, base=base, similar=similar, most=most, progress=advance)
    return show.Report(fields_of(pairs), _pairs(pairs), ok=not pairs.failed)


def _pairs(pairs: Pairs) -> Iterator[str]:
    """Yield the table of all cosines where it is small, else the pairs that are most alike; then what they are."""
    count, apart = len(pairs.adapters), len(pairs.by_parameters)
    exact = set(pairs.exact)
    if 0 < count <= _TABLE and pairs.most is None:
        rows = [
            [
                name,
                str(i + 1),
                *(_cosine(value, i == j or (min(i, j), max(i, j)) in exact) for j, value in enumerate(row)),
            ]
            for i, (name, row) in enumerate(zip(pairs.adapters, pairs.cosines, strict=True))
        ]
        yield from show.table(["adapter", "", *map(str, range(1, count + 1))], rows, right=range(1, count + 2))
        yield ""
    elif count:
        rows = [[_cosine(row["cosine"], row["exact"]), row["first"], row["second"]] for row in pairs.rows(_SHOWN_PAIRS)]
        yield from show.table(["cosine", "first", "second"], rows, right=(0,))
        every = count * (count - 1) // 2
        known = every if pairs.most is None else len(pairs.listed)
        left = f", and of {every - known} others only that they are less alike" if known < every else ""
        yield f"… and {known - len(rows)} more, less alike; --json has them{left}"
        yield ""
    yield from show.fields(
        ("adapters", str(count)),
        ("listed", f"the {pairs.most} nearest of each" if pairs.most else None),
        ("exact", f"{counted(len(pairs.exact), 'pair')}, by the factors: the nearest, from {pairs.similar:g} on"),
        ("others (~)", f"by sketches: a cosine c is off by (1 - c^2) {pairs.standard_error:.3f} (one standard error)"),
        ("by parameters", f"{apart} left out, for {why_apart(pairs.by_parameters.values())}" if apart else None),
        ("of another base", str(pairs.unselected) if pairs.unselected else None),
        ("no adapters", f"{pairs.others} models or other files" if pairs.others else None),
        ("not read", f"{len(pairs.failed)}, as warned" if pairs.failed else None),
    )


def _cosine(value: float, exact: bool) -> str:
    return f"{value:+.4f}" if exact else f"~{value:+.2f}"


def _lines(comparison: Comparison, every: bool) -> Iterator[str]:
    by_likeness = sorted(comparison.modules, key=lambda module: abs(module.cosine))
    shown = comparison.modules if every else by_likeness[:_MOST]
    amplified = any(value is not None for module in comparison.modules for value in module.amplification)
    heading = ["module", "ranks", "|dW| first", "second", "cosine", "input", "chance", "output", "chance"]
    yield from show.table(
        [*heading, *(("amplified", "second") if amplified else ())],
        [
            [
                module.module, f"{module.ranks[0]} {module.ranks[1]}", *map(show.number, module.norms),
                f"{module.cosine:+.4f}", f"{module.input_overlap:.4f}",
                f"{module.chance[0]:.4f}", f"{module.output_overlap:.4f}",
                f"{module.chance[1]:.4f}", *(map(_optional, module.amplification) if amplified else ()),
            ]
            for module in shown
        ],
        right=tuple(range(2, 11 if amplified else 9)),
    )  # fmt: skip
    if len(shown) < len(comparison.modules):
        yield f"… and {len(comparison.modules) - len(shown)} more, alike at least as much; --modules shows all"
    yield ""
    yield from show.fields(
        ("cosine", f"{comparison.cosine:+.4f}"),
        ("distance", f"{comparison.distance:.4g} of the first adapter's change"),
        ("norms", " and ".join(map(show.number, comparison.norms))),
        (
            "modules",
            f"{len(comparison.modules)} shared, {len(comparison.only[0])} only in the first, "
            f"{len(comparison.only[1])} only in the second",
        ),
        *(
            (heading, f"{len(modules)} of the {which}, as warned" if modules else None)
            for heading, sides in (("in part", comparison.in_part), ("left out", comparison.left_out))
            for which, modules in zip(("first", "second"), sides, strict=True)
        ),
    )


def _paper(comparison: Comparison, every: bool) -> Iterator[str]:
    """Yield what the paper shows beside, where it was measured: phi of A with its control, and Table 7."""
    measured = [(module, module.paper) for module in comparison.modules if module.paper is not None]
    shown = measured if every else measured[:_MOST]
    if not shown:
        return
    yield ""
    yield "phi of A alone, as in section 7.2: (1, 1), at full ranks, and the same of two random Gaussian matrices"
    heading = ("module", "A (1, 1)", "A", "random (1, 1)", "random")
    rows = [[module.module, *_corners(beside.factor_similarity), *_corners(beside.control)] for module, beside in shown]
    yield from show.table(heading, rows, right=range(1, len(heading)))
    table = [
        [
            module.module, which, str(row.rank), *map(show.number, (row.weight_norm, row.update_norm)),
            *map(show.number, (row.of_update, row.of_weight, row.of_random, row.amplification)),
        ]
        for module, beside in shown
        for which, row in zip(("first", "second"), beside.projections, strict=True)
        if row is not None
    ]  # fmt: skip
    if table:
        yield ""
        yield "|U'WV| with the leading singular vectors U, V of dW, of W, and of a random matrix, as in Table 7"
        columns = ("module", "adapter", "rank", "|W|", "|dW|", "of dW", "of W", "random", "amplified")
        yield from show.table(columns, table, right=range(2, len(columns)))
    if len(shown) < len(measured):
        yield f"… and {len(measured) - len(shown)} more; --modules shows all"


def _corners(grid: Sequence[Sequence[float]]) -> tuple[str, str]:
    return (f"{grid[0][0]:.4f}", f"{grid[-1][-1]:.4f}") if grid else ("-", "-")


def _optional(value: float | None) -> str:
    return "-" if value is None else show.number(value)


def _grid(module: ModuleComparison) -> Iterator[str]:
    grids = [("input side", module.input_similarity), ("output side", module.output_similarity)]
    if module.paper is not None:
        grids += [("A alone", module.paper.factor_similarity), ("random control", module.paper.control)]
    for side, values in grids:
        yield f"{side} of {module.module}: phi(i, j), i along the first adapter (down), j along the second"
        columns = range(1, len(values[0]) + 1 if values else 1)
        rows = [[str(i), *(f"{value:.3f}" for value in line)] for i, line in enumerate(values, 1)]
        yield from show.table(["i \\ j", *map(str, columns)], rows, right=tuple(range(len(columns) + 1)))
        yield ""
