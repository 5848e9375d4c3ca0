"""The certificate of an adapter that stands for a fine-tune, as a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

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
                layer.module, " x ".join(map(str, layer.shape)), str(layer.rank), show.number(layer.base_norm),
                show.number(layer.delta_norm), f"{layer.change:.2%}", f"{layer.captured:.2%}", f"{layer.error:.4g}",
                f"{1 + layer.excess_bound:.4f}", f"{layer.noise:.2%}", f"{layer.stable_rank:.1f}",
            )
            for layer in layers
        ],
        right=tuple(range(2, 11)),
    )  # fmt: skip


def report(talk: Talk, tuned: Checkpoint, base: str, adapter: str, **choices: Any) -> show.Report:
    """Certify any adapter against a fine-tune, and return the report."""
    from loratools.surgery.extract.certify import certify

    with talk.progress("certifying", 2 * tuned.nbytes) as advance:
        certification = certify(tuned, base, adapter, **choices, progress=advance)
    return show.Report(show.plain(certification), lines(certification))


def lines(certification: Certification) -> Iterator[str]:
    """Yield the table, the sums, and what the adapter does not hold."""
    from loratools.surgery.extract.layers import beside_optimum

    yield from table(certification.layers)
    yield ""
    sums = certification.total
    lost = certification.uncovered_energy
    yield from show.fields(
        ("layers", f"{sums.layers}, {show.exact(sums.parameters)} parameters"),
        ("captured", f"{sums.captured:.2%} of the energy of these layers"),
        ("error", f"{sums.error:.4g} of the change; {beside_optimum(sums)}"),
        ("whole", f"{len(certification.whole)} other changed tensors are replaced by the adapter"),
        ("uncovered", f"{len(certification.uncovered)} changed tensors, {lost:.2%} of the whole change"),
        *(("", f"{name}: |dW| = {show.number(norm)}") for name, norm in certification.uncovered[:_MOST]),
        *(("not measured", f"{module}: its update is no product") for module in certification.skipped[:_MOST]),
    )
