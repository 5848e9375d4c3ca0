"""loratools demo"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make

if TYPE_CHECKING:
    from loratools.demo.tour import Tour


@make(section="Learn")
@options.option("--keep", type=options.PATH, is_eager=True, callback=options.swept)
def command(keep: Path | None) -> show.Report:
    """Take the guided tour, on a small real model that is part of this package.

    A byte-level language model that learned from the Bible, and a LoRA that taught it Shakespeare, are inspected,
    sealed, merged, verified and measured; then a wrong base is refused. It needs no network and takes
    under a minute.

    \b
    Examples:
      loratools demo
      loratools demo --keep tour
    """
    from loratools.demo.tour import run_demo

    made = run_demo(keep)
    document = {"seconds": made.seconds, "stops": [{"title": stop.title, **stop.measured} for stop in made.stops]}
    return show.Report(document, _lines(made))


def _lines(made: Tour) -> Iterator[str]:
    for number, stop in enumerate(made.stops, 1):
        yield f"{number}. {stop.title}"
        if stop.command:
            yield f"   $ {stop.command}"
        yield from (f"   {line}" for line in stop.lines)
        yield ""
    loss = next(stop.measured["held_out_loss"] for stop in made.stops if "held_out_loss" in stop.measured)
    yield (
        f"Measured on this machine in {made.seconds:.1f} s: the adapter takes the loss from {loss['base']:.2f} to "
        f"{loss['base + adapter']:.2f}, and the merged model keeps it ({loss['merged']:.2f})."
    )
