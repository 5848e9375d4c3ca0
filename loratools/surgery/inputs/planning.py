"""What a verb would do: it runs as far as headers lead, says so, and stops before it reads numbers or writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

from loratools.adapter.input import AdapterInput
from loratools.storage import atomic
from loratools.storage.sources import Location

_PLANNING: ContextVar[bool] = ContextVar("planning", default=False)
Parameters = ParamSpec("Parameters")


@dataclass(frozen=True, slots=True)
class Planned:
    """What a verb would write, and of what: `nbytes` is about how much, None where only the numbers tell.

    `facts` are what was decided, by names of its own for each verb; `free_disk` is the space where the output goes.
    """

    operation: str
    output: str
    reads: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    nbytes: int | None = None
    free_disk: int = 0
    dry_run: bool = True


class _Stop(BaseException):
    """Carries a plan from the verb that made it to who asked; it is no error, so nothing may take it for one."""

    def __init__(self, planned: Planned) -> None:
        super().__init__()
        self.planned = planned


def plan(verb: Callable[Parameters, object], *args: Parameters.args, **options: Parameters.kwargs) -> Planned:
    """Return what a verb would do, with everything checked that headers tell; nothing is written.

    Args:
        verb: `combine`, `convert`, `dequantize`, `resize`, `switch` or `unmerge`.
        args: Its inputs.
        options: Its options.

    Raises:
        LoraToolsError: What the verb raises for these inputs before it writes.
        TypeError: The verb makes no plan.

    Example:
        >>> from loratools import unmerge
        >>> plan(unmerge, "merged", "adapter", "unmerged").facts["from"]
        "W' − ΔW, for there is no residual and no base"
    """
    token = _PLANNING.set(True)
    try:
        verb(*args, **options)
    except _Stop as stop:
        return stop.planned
    finally:
        _PLANNING.reset(token)
    raise TypeError(f"{getattr(verb, '__name__', verb)} makes no plan")


def is_planning() -> bool:
    """Tell whether a plan was asked for: what only the numbers tell is left out then."""
    return _PLANNING.get()


def _place(read: object) -> str:
    return str(read.path or read.digest) if isinstance(read, AdapterInput) else str(read)


def planned(
    operation: str, output: Location, reads: Sequence[object], *, nbytes: int | None = None, **facts: Any
) -> None:
    """Stop here with a plan, where one was asked for; go on where not."""
    if _PLANNING.get():
        free = atomic.free_space(Path(output))
        raise _Stop(Planned(operation, atomic.spelled(output), tuple(map(_place, reads)), facts, nbytes, free))
