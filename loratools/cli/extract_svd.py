"""loratools extract-svd"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._certificate import table
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk

if TYPE_CHECKING:
    from loratools.linalg.ranks.allocate import Ranks
    from loratools.surgery.extract import Extraction
    from loratools.surgery.extract.pairs import Pairing

_DEFAULT_RANK = 32
_SHOWN = 8  # patterns of one class in the text


@make(section="Change")
@click.argument("base", type=options.INPUT)
@click.argument("tuned", type=options.INPUT)
@options.output_option
@click.option("--rank", type=click.IntRange(min=1), metavar="R", help="The same rank everywhere.  [default: 32]")
@click.option("--energy", type=float, metavar="SHARE", help="Per layer, the least rank that keeps this share of ΔW².")
@click.option("--ratio", type=float, metavar="SHARE", help="Per layer, singular values above this share of the first.")
@click.option("--noise", is_flag=True, help="Per layer, what stands above the rounding of the fine-tune's dtype.")
@click.option(
    "--budget", metavar="AMOUNT",
    help="Parameters (20M) or bytes (64MB) for all layers together, shared out so that the most is captured.",
)  # fmt: skip
@click.option("--min-rank", type=click.IntRange(min=0), default=1, show_default=True, metavar="R", help="Lower bound.")
@click.option("--max-rank", type=click.IntRange(min=1), metavar="R", help="Upper bound.")
@click.option("--multiple-of", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Round up.")
@click.option("--uniform", is_flag=True, help="One rank for all layers: the largest needed, or that the budget allows.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only these modules: q_proj, layers.*.mlp.*, re:….")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Not these; their change is lost, and reported.")
@click.option("--save-module", "save", multiple=True, metavar="PATTERN", help="Keep these whole, not factored.")
@click.option(
    "--kind", "kinds", multiple=True, type=options.Words("loratools.adapter.naming.selection", "KINDS"),
    help="Kinds of modules that are factored; others are saved whole.  [default: linear, conv, experts]",
)  # fmt: skip
@click.option("--drop-whole", is_flag=True, help="Leave out what is not factored, for servers that take only factors.")
@click.option("--dtype", type=options.FACTORS, default="f32", show_default=True, help="Dtype of the factors.")
@click.option("--tight", is_flag=True, help="Spend as much again on far tighter bounds.")
@click.option("--tolerance", type=float, default=6e-4, show_default=True, help="Excess over the optimal error², about.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the sketches.")
@click.option("--base-id", metavar="NAME", help="Name of the base model to record, such as org/model.")
@click.option("--layers", is_flag=True, help="Print the certificate of every layer, not only the total.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads to work with; another number may change the last bits of factors.  [default: one per core]",
)
@options.dry_run_option
@options.force_option
@pass_talk
def command(talk: Talk, /, base: str, tuned: str, output: Path, **given: Any) -> show.Report:
    """Extract the difference of a fine-tune and its base as an adapter.

    Every changed weight W' - W becomes factors B A near the best of their rank, in float32, with alpha = rank; what has
    no factors (norms, biases, embeddings) is saved whole, so that base + adapter is the fine-tune but for the printed
    error. A layer's error is exact, and a bound says how far from the optimum it can be. The result is a PEFT adapter,
    sealed with the base's hash. A PATTERN is a name (q_proj), a glob (layers.*.mlp.*), or re: and a regular expression.

    \b
    Examples:
      loratools extract-svd base tuned -o extracted
      loratools extract-svd base tuned -o small --energy 0.9 --max-rank 64 --layers
      loratools extract-svd base tuned -o served --budget 64MB --uniform --drop-whole
      loratools extract-svd base tuned -o extracted --dry-run
    """
    from loratools.adapter.naming.selection import Selection
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.extract import extract, plan

    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    kinds = {"kinds": frozenset(given["kinds"])} if given["kinds"] else {}
    selection = Selection(given["include"], given["exclude"], given["save"], drop_whole=given["drop_whole"], **kinds)
    if given["dry_run"]:
        return _dry(plan(before, after, selection), before, after)
    dtype = given["dtype"].upper()
    ranks = _ranks(given, dtype)
    with talk.progress("extracting", before.nbytes + after.nbytes) as advance:
        found = extract(
            before, after, output, ranks, selection=selection, dtype=dtype, seed=given["seed"],
            tolerance=given["tolerance"], tight=given["tight"], base_id=given["base_id"], threads=given["threads"],
            force=given["force"], progress=advance,
        )  # fmt: skip
    for note in found.notes:
        talk.note(note)
    if found.dropped_energy > 0:
        talk.warn(f"{found.dropped_energy:.2%} of the change was left out on request")
    return show.Report(document(found), _lines(found, given["layers"]))


def document(found: Extraction) -> dict[str, Any]:
    """Return an extraction as data: the account of every tensor, and the certificate."""
    plain: dict[str, Any] = show.plain(found)
    plain["tensors"] = [
        {
            "name": one.pair.name, "base": one.pair.base, "path": one.pair.path, "class": one.outcome, "why": one.why,
            "kind": one.pair.kind, "dtype": one.dtype, "shape": list(one.shape), "change_norm": one.norm2**0.5,
            "changed_rows": one.rows or None,
        }
        for one in found.outcomes
    ]  # fmt: skip
    plain["layers"] = [show.plain(one.layer) | {"change": one.layer.change} for one in found.outcomes if one.layer]
    del plain["outcomes"]
    return plain


def _ranks(given: dict[str, Any], dtype: str) -> Ranks:
    from loratools.linalg.ranks.allocate import Ranks
    from loratools.linalg.ranks.rules import Energy, Fixed, Ratio
    from loratools.storage.dtypes import bits
    from loratools.storage.sizes import parse_budget

    asked = [name for name in ("rank", "energy", "ratio", "noise", "budget") if given[name] not in (None, False)]
    if len(asked) > 1:
        raise click.UsageError(f"--{' and --'.join(asked)} are different ways to choose ranks; give one")
    bounds = (given["uniform"], given["min_rank"], given["max_rank"], given["multiple_of"])
    try:
        if given["budget"]:
            return Ranks(None, False, parse_budget(given["budget"], bits(dtype)), *bounds)
        if given["noise"]:
            return Ranks(None, True, None, *bounds)
        if given["energy"] is not None:
            return Ranks(Energy(given["energy"]), False, None, *bounds)
        rule = Ratio(given["ratio"]) if given["ratio"] is not None else Fixed(given["rank"] or _DEFAULT_RANK)
        return Ranks(rule, False, None, *bounds)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _dry(pairing: Pairing, before: Any, after: Any) -> show.Report:
    """Report what would become of every tensor if it had changed."""
    rows = defaultdict(list)
    for one in pairing.pairs:
        rows[one.plan, one.kind, one.why].append(one.path)
    data = {
        "dry_run": True, "base": before.path, "tuned": after.path, "missing": pairing.missing, "notes": pairing.notes,
        "tensors": [show.plain(one) for one in pairing.pairs],
    }  # fmt: skip
    return show.Report(data, _classes({f"{p} {k}": {w: paths} for (p, k, w), paths in rows.items()}, pairing.missing))


def _lines(found: Extraction, every: bool) -> Iterator[str]:
    layers = [one.layer for one in found.outcomes if one.layer]
    if every:
        yield from table(layers)
        yield ""
    classes: dict[str, dict[str, list[str]]] = {
        name: {} for name in ("factored", "rows", "whole", "unchanged", "dropped")
    }
    for one in found.outcomes:
        classes[one.outcome].setdefault(one.why, []).append(one.pair.path)
    yield from _classes(classes, found.missing)
    yield ""
    sums, ranks = found.total, sorted(one.rank for one in layers)
    spread = (
        f"rank {ranks[0]}"
        if ranks and ranks[0] == ranks[-1]
        else f"ranks {min(ranks, default=0)} to {max(ranks, default=0)}"
    )
    yield from show.fields(
        [
            ("wrote", f"{found.output}, {show.size(found.nbytes)}, {show.exact(found.parameters)} parameters"),
            ("factors", f"{sums.layers} layers, {spread}, {show.exact(sums.parameters)} parameters, {found.dtype}"),
            ("change", f"{sums.delta_norm / sums.base_norm:.3%} of the weights they change" if sums.base_norm else "-"),
            ("captured", f"{sums.captured:.2%} of the energy of the factored layers"),
            (
                "error",
                f"{sums.error:.4g} of the change; the optimum is lower by about {sums.excess:.1e} of it, certainly "
                f"by no more than a factor of {1 + sums.excess_bound:.4f}",
            ),
            ("noise", f"{sums.noise:.2%} of the energy is what rounding to the fine-tune's dtype leaves"),
            ("dropped", f"{found.dropped_energy:.2%} of the whole change"),
            ("base hash", found.base),
            ("tuned hash", found.tuned),
        ]
    )


def _classes(classes: dict[str, dict[str, list[str]]], missing: tuple[str, ...]) -> Iterator[str]:
    """Yield the names in each class, many in few lines."""
    from loratools.adapter.naming.compact import compact

    for name, reasons in {
        **classes,
        **({"missing": {"the fine-tune lacks it": list(missing)}} if missing else {}),
    }.items():
        yield f"{name}: {sum(map(len, reasons.values()))}"
        for why, paths in reasons.items():
            shown = compact(paths)
            rest = f" and {len(shown) - _SHOWN} more patterns" if len(shown) > _SHOWN else ""
            yield from (f"  {one}{f'  ({why})' if why else ''}" for one in shown[:_SHOWN])
            if rest:
                yield f"  …{rest}"
