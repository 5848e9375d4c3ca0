"""loratools estimate"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make

if TYPE_CHECKING:
    from loratools.live.cost import Estimate


@make(section="Look")
@click.argument("model", type=options.INPUT)
@options.option("--rank", type=click.IntRange(min=1), more="[default: 8]")
@options.option("--targets", type=str, default="all-linear", show_default=True)
@options.option("--budget", type=str, more="Here: find the largest rank for so much.")
@options.option("--dtype", type=options.FACTORS, default="bf16", show_default=True, more="Here: of stored adapters.")
@options.option("--tasks", type=click.IntRange(min=1), default=100, show_default=True)
def command(model: str, rank: int | None, targets: str, budget: str | None, dtype: str, tasks: int) -> show.Report:
    """Tell what a LoRA would cost, before it exists: parameters, bytes, optimizer state, many tasks.

    Only headers are read, of a model on the Hub too; config.json alone does where transformers is installed.

    \b
    Examples:
      loratools estimate base --rank 8 --targets q_proj,v_proj
      loratools estimate base --targets q_proj,k_proj,v_proj,o_proj --budget 10000
    """
    from loratools.errors import InvalidOption
    from loratools.live.cost import estimate
    from loratools.storage.dtypes import bits, parse_float
    from loratools.storage.sizes import parse_budget

    try:
        most = None if budget is None else parse_budget(budget, bits(parse_float(dtype)))
    except ValueError as error:
        raise InvalidOption(f"--budget: {error}") from None
    names = [name.strip() for name in targets.split(",") if name.strip()]
    found = estimate(model, rank, targets if targets == "all-linear" else names, budget=most, dtype=dtype, tasks=tasks)
    return show.Report(show.plain(found), _lines(found))


def _lines(found: Estimate) -> Iterator[str]:
    sizes = ", ".join(f"{show.size(nbytes)} in {dtype}" for dtype, nbytes in found.nbytes.items())
    yield from show.fields(
        ("model", f"{found.model}, {found.base_parameters:,} parameters, {show.size(found.base_nbytes)}"),
        ("LoRA", f"rank {found.rank} on {found.modules} modules ({', '.join(found.targets)})"),
        ("parameters", f"{found.parameters:,}, {found.share:.4%} of the model's"),
        ("adapter", sizes),
        ("Adam", f"{show.size(found.optimizer)}, of full fine-tuning {show.size(found.base_optimizer)}"),
        (f"{found.tasks} tasks", f"{show.size(found.tasks_with)}, without LoRA {show.size(found.tasks_without)}"),
    )
