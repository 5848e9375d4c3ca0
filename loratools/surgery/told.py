"""What is said of the changes of an adapter by its name: what is not measured as it acts, and numbers that are none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from loratools.adapter.naming.compact import compact
from loratools.decisions import warned
from loratools.errors import IncompatibleAdapter, counted

if TYPE_CHECKING:
    from loratools.linalg.delta import Delta
    from loratools.surgery.change import Changes


def told(name: str, changes: Changes) -> Changes:
    """Warn of what is not measured as it acts, and return changes whose faults name the adapter and the module.

    Loading one of them raises `IncompatibleAdapter` where it holds NaN or infinity.
    """
    for reasons, verb in ((changes.in_part, "measured"), (changes.left_out, "left out")):
        by_reason: dict[str, list[str]] = defaultdict(list)
        for module, reason in reasons.items():
            by_reason[reason].append(module)
        for reason, modules in by_reason.items():
            targets = compact(modules)
            shown = ", ".join(targets[:3]) + (", …" if len(targets) > 3 else "")
            warned("%s: %s %s %s: %s", name, counted(len(modules), "module"), verb, reason, shown)
    named = {
        module: replace(change, load=partial(_loaded, f"{name}: {module}", change.load))
        for module, change in changes.modules.items()
    }
    return replace(changes, modules=named)


def _loaded(place: str, load: Callable[[], Delta]) -> Delta:
    from loratools.linalg.delta import Product
    from loratools.linalg.factored import check

    try:
        delta = load()
        if isinstance(delta, Product):
            check(delta.B, delta.A)
        return delta
    except ValueError as error:
        hint = "The training diverged, or the file is damaged: an earlier checkpoint may be sound."
        raise IncompatibleAdapter(f"{place}: {error}", hint=hint) from None
