"""What is said of an adapter's changes by its name: what is not measured as it acts, and numbers that are none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from loratools.adapter.naming.compact import compact
from loratools.decisions import warned
from loratools.errors import IncompatibleAdapter, counted

if TYPE_CHECKING:
    from loratools.linalg.delta import Delta


def tell(name: str, in_part: Mapping[str, str], left_out: Mapping[str, str]) -> None:
    """Warn of the modules of an adapter that are measured in part, or left out, by the reasons."""
    for reasons, verb in ((in_part, "measured"), (left_out, "left out")):
        by_reason: dict[str, list[str]] = defaultdict(list)
        for module, reason in reasons.items():
            by_reason[reason].append(module)
        for reason, modules in by_reason.items():
            targets = compact(modules)
            shown = ", ".join(targets[:3]) + (", …" if len(targets) > 3 else "")
            warned("%s: %s %s %s: %s", name, counted(len(modules), "module"), verb, reason, shown)


def finite(place: str, load: Callable[[], Delta]) -> Callable[[], Delta]:
    """Return a function that loads a change, and raises `IncompatibleAdapter` with its place for NaN or infinity."""
    return partial(_finite, place, load)


def _finite(place: str, load: Callable[[], Delta]) -> Delta:
    try:
        delta = load()
        if not math.isfinite(delta.terms2()):
            delta.norm2()  # which says what it holds
        return delta
    except ValueError as error:
        hint = "The training diverged, or the file is damaged: an earlier checkpoint may be sound."
        raise IncompatibleAdapter(f"{place}: {error}", hint=hint) from None
