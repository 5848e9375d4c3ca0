"""Options that choose ranks, and what becomes of them; kohya's names where it has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.options import either

if TYPE_CHECKING:
    from loratools.linalg.ranks.allocate import Ranks

_BOUND = click.IntRange(min=1)
# fmt: off
_OPTIONS = (
    options.option("--energy", type=float),
    options.option("--ratio", type=float),
    options.option("--sv-ratio", type=float),
    options.option("--sv-fro", type=float),
    options.option("--sv-cumulative", type=float),
    options.option("--budget", type=str),
    options.option("--min-rank", type=click.IntRange(min=0), default=1, show_default=True),
    options.option("--max-rank", type=_BOUND),
    options.option("--multiple-of", type=_BOUND, default=1, show_default=True),
    options.option("--uniform", is_flag=True),
)
# fmt: on
_WAYS = ("rank", "energy", "ratio", "sv_ratio", "sv_fro", "sv_cumulative", "noise", "budget")


def rank_options(rank: str = "", *, noise: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command all options that choose ranks.

    `rank` is what the help of --rank says further; `noise` gives the command --noise, which needs a fine-tune.
    """

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        for each in reversed(_OPTIONS):
            command = each(command)
        if noise:
            command = options.option("--noise", is_flag=True)(command)
        return options.option("--rank", type=_BOUND, more=rank)(command)

    return give


def ranks_of(values: dict[str, Any], dtype: str) -> Ranks | None:
    """Return how ranks are to be chosen, None where no option says so; raise `UsageError` for what contradicts itself.

    `values` are those of all the options of `rank_options`, perhaps among others; `dtype` is that of the result, for
    budgets in bytes.
    """
    ways = [name for name in _WAYS if name in values]
    chosen = [name for name in ways if values[name] not in (None, False)]
    bounds = {
        "uniform": values["uniform"], "minimum": values["min_rank"], "maximum": values["max_rank"],
        "multiple_of": values["multiple_of"],
    }  # fmt: skip
    if len(chosen) == 1:
        return build(chosen[0], values[chosen[0]], dtype, **bounds)
    if chosen:
        raise click.UsageError(f"{' and '.join(map(_option, chosen))} are different ways to choose ranks; give one")
    if bounds != {"uniform": False, "minimum": 1, "maximum": None, "multiple_of": 1}:
        raise click.UsageError(f"--min-rank, --max-rank, --multiple-of and --uniform need one of {_listed(ways)}")
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


def _listed(names: Sequence[str]) -> str:
    return either([_option(name) for name in names])


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
