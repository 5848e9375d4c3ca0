"""loratools demo"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk


@make(section="Learn")
@click.option(
    "--keep", type=options.PATH, metavar="PATH", help="Make everything in this new folder, and leave it there."
)
@pass_talk
def command(talk: Talk, keep: Path | None) -> show.Report:
    """Take the guided tour, on a small real model that is part of this package.

    A byte-level language model that learned from the Bible, and a LoRA that taught it Shakespeare, are inspected,
    sealed, merged, verified and measured; then a wrong base is refused. It needs no network and a few seconds.

    \b
    Examples:
      loratools demo
      loratools demo --keep tour
    """
    from loratools.storage.atomic import new_folder

    if keep is not None:
        with new_folder(keep) as folder:
            return _run(folder, talk)
    with TemporaryDirectory(prefix="loratools-demo-") as name:
        return _run(Path(name), talk)


def _run(folder: Path, talk: Talk) -> show.Report:
    from loratools.demo.tour import tour

    begun = time.monotonic()
    stops = list(tour(folder))
    seconds = time.monotonic() - begun

    def lines() -> Iterator[str]:
        for number, stop in enumerate(stops, 1):
            yield f"{number}. {stop.title}"
            if stop.command:
                yield f"   $ {stop.command}"
            yield from (f"   {line}" for line in stop.lines)
            yield ""
        loss = next(stop.measured["held_out_loss"] for stop in stops if "held_out_loss" in stop.measured)
        yield (
            f"Measured on this machine in {seconds:.1f} s: the adapter takes the loss from {loss['base']:.2f} to "
            f"{loss['base + adapter']:.2f}, and the merged model keeps it ({loss['merged']:.2f})."
        )

    document = {"seconds": seconds, "stops": [{"title": stop.title, **stop.measured} for stop in stops]}
    return show.Report(document, list(lines()))
