"""The certificate of an adapter that stands for a fine-tune, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loratools.cli import _show as show
from loratools.cli._talk import Talk

if TYPE_CHECKING:
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.extract.certify import Certification
    from loratools.surgery.extract.layers import Layer

_MOST = 10  # names of one kind


def table(layers: Sequence[Layer]) -> Iterator[str]:
    """Yield certificates of layers as a table."""
    yield from show.table(
        ("module", "shape", "rank", "|W|", "|dW|", "change", "captured", "error", "<= optimum x", "noise", "stable"),
        [
            (
                one.module, " x ".join(map(str, one.shape)), str(one.rank), show.number(one.base_norm),
                show.number(one.delta_norm), f"{one.change:.2%}", f"{one.captured:.2%}", f"{one.error:.4g}",
                f"{1 + one.excess_bound:.4f}", f"{one.noise:.2%}", f"{one.stable_rank:.1f}",
            )
            for one in layers
        ],
        right=tuple(range(2, 11)),
    )  # fmt: skip


def report(talk: Talk, tuned: Checkpoint, base: str, adapter: str, seed: int, threads: int) -> show.Report:
    """Certify any adapter against a fine-tune, and return the report."""
    from loratools.surgery.extract.certify import certify

    with talk.progress("certifying", 2 * tuned.nbytes) as advance:
        found = certify(tuned, base, adapter, seed=seed, threads=threads, progress=advance)
    return show.Report(show.plain(found), lines(found))


def lines(found: Certification) -> Iterator[str]:
    """Yield the table, the sums, and what the adapter does not hold."""
    yield from table(found.layers)
    yield ""
    sums = found.total
    rows = [
        ("layers", f"{sums.layers}, {show.exact(sums.parameters)} parameters"),
        ("captured", f"{sums.captured:.2%} of the energy of these layers"),
        ("error", f"{sums.error:.4g} of the change; factors of the same ranks can be better by {_gap(sums.excess)}"),
        ("whole", f"{len(found.whole)} other changed tensors are replaced by the adapter"),
        ("uncovered", f"{len(found.uncovered)} changed tensors, {found.uncovered_energy:.2%} of the whole change"),
    ]
    rows += [("", f"{name}: |dW| = {show.number(norm)}") for name, norm in found.uncovered[:_MOST]]
    rows += [("not measured", f"{module}: its update is no product") for module in found.skipped[:_MOST]]
    yield from show.fields(rows)


def _gap(excess: float) -> str:
    return f"{max(excess, 0.0):.1e} of it"
