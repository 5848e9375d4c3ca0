"""Options that choose ranks, and what becomes of them; kohya's names where it has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from loratools.linalg.ranks.allocate import Ranks

# fmt: off
_OPTIONS = (
    click.option("--rank", type=click.IntRange(min=1), metavar="R", help="The same rank for every module."),
    click.option("--energy", type=float, metavar="E", help="Least rank that keeps this share of the squared norm."),
    click.option("--sv-ratio", type=float, metavar="T", help="Keep singular values above the largest divided by T."),
    click.option("--sv-fro", type=float, metavar="T", help="Least rank that keeps this share of the norm."),
    click.option("--sv-cumulative", type=float, metavar="T",
                 help="Least rank that keeps this share of the sum of singular values."),
    click.option("--budget", metavar="SIZE",
                 help="Share out this many parameters (2M), or bytes (8MB), among all modules, "
                      "to the greatest effect."),
    click.option("--max-rank", type=click.IntRange(min=1), metavar="R", help="No module has more."),
    click.option("--multiple-of", type=click.IntRange(min=1), default=1, metavar="N",
                 help="Round ranks up to multiples of this."),
    click.option("--uniform", is_flag=True, help="Give every module the one rank that the neediest calls for."),
)
# fmt: on
_WAYS = ("rank", "energy", "sv_ratio", "sv_fro", "sv_cumulative", "budget")


def rank_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command all options that choose ranks."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def ranks_of(values: dict[str, Any], dtype: str) -> Ranks | None:
    """Return how ranks are to be chosen, None where no option says so; raise `UsageError` for what contradicts itself.

    `values` are those of all the options of `rank_options`; `dtype` is that of the result, for budgets in bytes.
    """
    chosen = [name for name in _WAYS if values[name] is not None]
    bounds = {"uniform": values["uniform"], "maximum": values["max_rank"], "multiple_of": values["multiple_of"]}
    if len(chosen) == 1:
        return build(chosen[0], values[chosen[0]], dtype, **bounds)
    if chosen:
        raise click.UsageError(f"{_listed(chosen)} contradict each other; give one")
    if bounds != {"uniform": False, "maximum": None, "multiple_of": 1}:
        raise click.UsageError(f"--max-rank, --multiple-of and --uniform need one of {_listed(_WAYS)}")
    return None


def build(way: str, value: Any, dtype: str, **bounds: Any) -> Ranks:
    """Return `Ranks` by the option of the name `way`; raise `UsageError` for a value that it cannot have."""
    from loratools.linalg.ranks import rules
    from loratools.linalg.ranks.allocate import Ranks
    from loratools.storage.dtypes import bits
    from loratools.storage.sizes import parse_budget

    named: dict[str, Callable[[Any], rules.RankRule]] = {
        "rank": rules.Fixed, "energy": rules.Energy, "ratio": rules.Ratio, "sv_ratio": rules.SvRatio,
        "sv_fro": rules.SvFro, "sv_cumulative": rules.SvCumulative,
    }  # fmt: skip
    try:
        if way == "budget":
            return Ranks(budget=parse_budget(value, bits(dtype)), **bounds)
        return Ranks(noise=True, **bounds) if way == "noise" else Ranks(named[way](value), **bounds)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _listed(names: Any) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
