"""loratools gather"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make


@make(section="Change")
@click.argument("output", type=options.PATH)
def command(output: Path) -> show.Report:
    """Make an output of its parts, which a command with --part wrote, each in a process of its own.

    The parts lie in hidden folders beside OUTPUT. Every part must be there, complete, of one call and of one
    arithmetic, and each file must have the digest that was taken down when it was written. The output has the bytes
    that one process would have written.

    \b
    Examples:
      loratools gather gathered
    """
    from loratools.surgery.sharing.parts import gather, verb_of

    of = import_module(f"loratools.cli.{verb_of(output).replace('-', '_')}")
    report: show.Report = of.gathered(gather(output))
    return report
