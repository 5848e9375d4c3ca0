"""The config.json of each component of a pipeline, which says how that component is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.engine.plan import MergePlan
from loratools.storage import codecs
from loratools.storage.codecs import schemes
from loratools.storage.codecs.state import statement, with_statement


def restated(plan: MergePlan) -> dict[str, dict[str, Any]]:
    """Return the new config.json, by path, of the components of which a merge writes codes in 16 bit."""
    base = plan.base  # shows as weights what is written so, and as stored what stays codes
    if not base.configs or any(change.recoded for change in plan.changes.values()):
        return {}
    stored = base.stored or base
    before, after = (schemes.find(model.specs, {}) for model in (stored, base))
    new: dict[str, dict[str, Any]] = {}
    for component, config in base.configs.items():
        stated, start = statement(config), f"{component}."
        modules = [path for path in before.modules if path.startswith(start) and path not in after.modules]
        if not stated or not modules:
            continue
        codec = before.codecs[modules[0]]
        fields: Mapping[str, Any] = {}
        dropped: tuple[str, ...] = ()
        if not any(path.startswith(start) for path in after.modules):
            fields, dropped = with_statement(config, None)
        elif codec is not None:
            names = sorted(path.removeprefix(start) for path in modules)
            fields, dropped = with_statement(config, codecs.get(codec).plain(stated, names))
        kept = {key: value for key, value in config.items() if key not in dropped}
        new[f"{component}/config.json"] = {**kept, **fields}
    return new
