"""The spectrum of an adapter for `loratools inspect --spectrum`: numbers, and small bars."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from loratools.cli import _show as show

if TYPE_CHECKING:
    from loratools.surgery.inspect import AdapterSummary, CheckpointSummary
    from loratools.surgery.spectrum import AdapterSpectrum

_BARS = " ▁▂▃▄▅▆▇█"
_DECADES = 3  # a bar is full at σ₁ and empty at σ₁/1000
_WIDTH = 32


def report(path: str, dialect: str | None, summary: AdapterSummary | CheckpointSummary) -> show.Report:
    """Return the report on an adapter's spectrum; raise `click.UsageError` for a model, which has none."""
    from loratools.surgery.spectrum import spectrum

    if summary.type != "adapter":
        raise click.UsageError(f"--spectrum: {path} is a model; it describes adapters")
    measured = spectrum(path, dialect)
    return show.Report(show.plain(summary) | {"spectrum": show.plain(measured)}, lines(measured))


def lines(measured: AdapterSpectrum) -> Iterator[str]:
    """Yield a line for each module, and what the adapter could be shrunk to."""
    yield from show.table(
        ("module", "rank", "|dW|", "stable", "effective", "99%", "99.9%", "singular values"),
        [
            (
                module.module, str(module.rank), show.number(module.norm), f"{module.stable_rank:.2f}",
                f"{module.effective_rank:.2f}", *map(str, module.needed), bars(module.sigma),
            )
            for module in measured.modules
        ],
        right=range(1, 7),
    )  # fmt: skip
    yield ""
    rows = [("norm", show.number(measured.norm)), ("parameters", show.exact(measured.parameters))]
    for share, parameters, rank in zip(
        ("99 %", "99.9 %"), measured.needed_parameters, measured.uniform_rank, strict=True
    ):
        part = f"{parameters / measured.parameters:.0%} of them" if measured.parameters else "none"
        rows.append((share, f"of the energy needs {show.exact(parameters)} parameters, {part}; at most rank {rank}"))
    rows += [("no factors", ", ".join(measured.skipped))] if measured.skipped else []
    yield from show.fields(rows)


def bars(sigma: Sequence[float]) -> str:
    """Return one bar for each singular value, or for each of at most 32 groups of them (the first of a group).

    Logarithmic: full at the largest, empty at a thousandth of it.

    >>> bars([1.0, 0.1, 0.01, 0.0])
    '█▆▃ '
    """
    if not sigma or sigma[0] <= 0:
        return ""
    step = math.ceil(len(sigma) / _WIDTH)
    heights = (1 + math.log10(value / sigma[0]) / _DECADES if value > 0 else 0.0 for value in sigma[::step])
    return "".join(_BARS[math.ceil(max(0.0, height) * (len(_BARS) - 1) - 1e-9)] for height in heights)
