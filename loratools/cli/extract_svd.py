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
from loratools.cli._ranks import rank_options, ranks_of
from loratools.cli._shares import crew, part_of
from loratools.cli._talk import Talk, pass_talk
from loratools.errors import counted

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
@rank_options("[default: 32]", noise=True)
@options.include_option
@options.option("--exclude", type=str, multiple=True, more="Their change is lost, and reported.")
@options.option("--save-module", "save", type=str, multiple=True)
@options.option(
    "--kind", "kinds", multiple=True, type=options.Words("loratools.adapter.naming.selection", "KINDS"),
    more="[default: linear, conv, experts]",
)  # fmt: skip
@options.option("--drop-whole", is_flag=True)
@options.option("--dtype", type=options.FACTORS, default="f32", show_default=True, more="Here: of the factors.")
@options.option("--tight", is_flag=True)
@options.option("--tolerance", type=float, default=6e-4, show_default=True)
@options.option(
    "--arithmetic", type=options.Words("loratools.options", "Arithmetic"), default="auto",
    show_default=True,
)  # fmt: skip
@options.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, more="Of the sketches.")
@options.device_option
@options.base_id_option
@options.option("--modules", is_flag=True, more="Here: its certificate.")
@options.option("--threads", type=click.IntRange(min=1), more="[default: one per core]")
@options.workers_option
@options.part_option
@options.dry_run_option
@options.force_option
@pass_talk
def command(talk: Talk, /, base: str, tuned: str, output: Path, **values: Any) -> show.Report:
    """Extract the difference of a fine-tune and its base as an adapter.

    Every changed weight W' - W becomes factors B A near the best of their rank, in float32, with alpha = rank; what has
    no factors (norms, biases, embeddings) is saved whole, so that base + adapter is the fine-tune but for the printed
    error. A layer's error is exact, and a bound says how far from the optimum it can be: it may be far above the truth,
    and --tight spends as much work again on a nearer one. The result is a PEFT adapter,
    sealed with the base's hash; where the output's name ends in .safetensors it is one file, that of an image model in
    the layout of kohya or ComfyUI. A PATTERN is a name (q_proj), a glob (layers.*.mlp.*), or re: and a regular
    expression.

    \b
    Examples:
      loratools extract-svd base tuned -o extracted
      loratools extract-svd base tuned -o small --energy 0.9 --max-rank 64 --modules
      loratools extract-svd base tuned -o served --budget 64MB --uniform --drop-whole
      loratools extract-svd base tuned -o extracted.safetensors
      loratools extract-svd base tuned -o extracted --dry-run
    """
    from loratools.adapter.naming.selection import Selection
    from loratools.storage.checkpoint import Checkpoint

    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    kinds = {"kinds": frozenset(values["kinds"])} if values["kinds"] else {}
    selection = Selection(
        values["include"], values["exclude"], values["save"], drop_whole=values["drop_whole"], **kinds
    )
    if values["dry_run"]:
        from loratools.surgery.extract import plan

        return _dry(plan(before, after, selection), before, after)
    dtype = values["dtype"].upper()
    names = ("seed", "tolerance", "tight", "arithmetic", "device", "base_id", "threads", "force")
    if values["part"] and values["workers"]:
        raise click.UsageError("--part writes one part of the output: without --workers")
    from loratools.surgery.extract import extract

    given: dict[str, Any] = {
        "output": output, "ranks": _ranks(values, dtype), "selection": selection, "dtype": dtype,
        **{name: values[name] for name in names},
    }  # fmt: skip
    call, sizes = {"base": base, "tuned": tuned, **given}, before.nbytes + after.nbytes
    if values["part"]:
        return part_of("extract-svd", call, values["part"])
    with talk.progress("extracting", sizes) as advance, crew("extract-svd", call, values["workers"], advance):
        extraction = extract(before, after, **given, progress=advance)
    if extraction.dropped > 0:
        talk.warn(f"{extraction.dropped:.4g} of the change was left out: the error is {extraction.error:.4g} of it")
    return gathered(extraction, every=values["modules"], tight=values["tight"])


def gathered(extraction: Extraction, *, every: bool = False, tight: bool = False) -> show.Report:
    """Return the report of an extraction, in one process or of parts."""
    return show.Report(document(extraction), _lines(extraction, every, tight))


def document(extraction: Extraction) -> dict[str, Any]:
    """Return an extraction as data: the account of every tensor, and the certificate."""
    plain: dict[str, Any] = show.plain(extraction)
    plain["tensors"] = [
        {
            "name": outcome.pair.name, "base": outcome.pair.base, "path": outcome.pair.path,
            "class": outcome.outcome, "why": outcome.why, "kind": outcome.pair.kind, "dtype": outcome.dtype,
            "shape": list(outcome.shape), "change_norm": outcome.norm2**0.5, "changed_rows": outcome.rows or None,
        }
        for outcome in extraction.outcomes
    ]  # fmt: skip
    layers = [outcome.layer for outcome in extraction.outcomes if outcome.layer]
    plain["layers"] = [show.plain(layer) | {"change": layer.change} for layer in layers]
    del plain["outcomes"]
    return plain


def _ranks(values: dict[str, Any], dtype: str) -> Ranks:
    ways = ("rank", "energy", "ratio", "sv_ratio", "sv_fro", "sv_cumulative", "noise", "budget")
    asked = any(values[way] not in (None, False) for way in ways)
    ranks = ranks_of(values if asked else {**values, "rank": _DEFAULT_RANK}, dtype)
    assert ranks is not None
    return ranks


def _dry(pairing: Pairing, before: Any, after: Any) -> show.Report:
    """Report what would become of every tensor if it had changed."""
    rows = defaultdict(list)
    for pair in pairing.pairs:
        rows[pair.plan, pair.kind, pair.why].append(pair.path)
    data = {
        "dry_run": True, "base": before.path, "tuned": after.path, "missing": pairing.missing, "notes": pairing.notes,
        "tensors": [show.plain(pair) for pair in pairing.pairs],
    }  # fmt: skip
    return show.Report(data, _classes({f"{p} {k}": {w: paths} for (p, k, w), paths in rows.items()}, pairing.missing))


def _lines(extraction: Extraction, every: bool, tight: bool) -> Iterator[str]:
    from loratools.surgery.extract.layers import beside_optimum

    layers = [outcome.layer for outcome in extraction.outcomes if outcome.layer]
    if every:
        yield from table(layers)
        yield ""
    names = ("factored", "rows", "whole", "unchanged", "dropped")
    classes: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    for outcome in extraction.outcomes:
        classes[outcome.outcome].setdefault(outcome.why, []).append(outcome.pair.path)
    yield from _classes(classes, extraction.missing)
    yield ""
    sums, ranks = extraction.total, sorted(outcome.rank for outcome in layers) or [0, 0]
    spread = f"rank {ranks[0]}" if layers and ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    closer = "" if tight else " (--tight gives a closer bound)"
    lost = f"; what was left out is {extraction.dropped:.4g} of it" if extraction.dropped else ""
    wrote = f"{extraction.output}, {show.size(extraction.nbytes)}"
    factored = counted(sums.layers, "layer")
    yield from show.fields(
        ("wrote", f"{wrote}, {show.exact(extraction.parameters)} parameters"),
        ("factors", f"{factored}, {spread}, {show.exact(sums.parameters)} parameters, {extraction.dtype}"),
        ("change", f"{sums.delta_norm / sums.base_norm:.3%} of the weights they change" if sums.base_norm else "-"),
        ("captured", f"{sums.captured:.2%} of the energy of the factored layers"),
        ("error", f"{extraction.error:.4g} of the whole change{lost}"),
        ("in factors", f"{sums.error:.4g} of the change in the factored layers; {beside_optimum(sums, closer)}"),
        ("noise", f"{sums.noise:.2%} of the energy is what rounding to the fine-tune's dtype leaves"),
        ("base hash", extraction.base),
        ("tuned hash", extraction.tuned),
    )  # fmt: skip


def _classes(classes: dict[str, dict[str, list[str]]], missing: tuple[str, ...]) -> Iterator[str]:
    """Yield the names in each class, many in few lines."""
    from loratools.adapter.naming.compact import compact

    if missing:
        classes = {**classes, "missing": {"the fine-tune lacks it": list(missing)}}
    for name, reasons in classes.items():
        yield f"{name}: {sum(map(len, reasons.values()))}"
        for why, paths in reasons.items():
            shown = compact(paths)
            yield from (f"  {pattern}{f'  ({why})' if why else ''}" for pattern in shown[:_SHOWN])
            if len(shown) > _SHOWN:
                yield f"  … and {len(shown) - _SHOWN} more patterns"
