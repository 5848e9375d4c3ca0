"""The inputs of a verb: paths, references to the Hub and opened values alike, and what a call says of them.

opened   adapters and models, opened and checked, one where several are expected
planning what a verb would do, as far as headers tell
told     what is said of an adapter's changes: what is not measured as it acts, numbers that are none
asked    the dialect and the alpha of adapters, which of their modules count, what kind of model a base is
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratools.surgery.inputs.asked import (
    Patterns,
    as_asked,
    check_model_type,
    chosen,
    chosen_weights,
    kept,
    kept_names,
    open_asked,
    patterns_of,
    read_as,
    typed_model,
)
from loratools.surgery.inputs.opened import (
    AdapterSource,
    ModelSource,
    Weights,
    as_list,
    check_weights,
    in_a_file,
    names_of,
    open_adapters,
    open_model,
    places,
    places_of,
    tell_twice,
    under_names_of,
    weighed,
)

if TYPE_CHECKING:
    from loratools.surgery.inputs.planning import Planned, is_planning, plan, planned

__all__ = [
    "AdapterSource",
    "ModelSource",
    "Patterns",
    "Planned",
    "Weights",
    "as_asked",
    "as_list",
    "check_model_type",
    "check_weights",
    "chosen",
    "chosen_weights",
    "in_a_file",
    "is_planning",
    "kept",
    "kept_names",
    "names_of",
    "open_adapters",
    "open_asked",
    "open_model",
    "patterns_of",
    "places",
    "places_of",
    "plan",
    "planned",
    "read_as",
    "tell_twice",
    "typed_model",
    "under_names_of",
    "weighed",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Return what `planning` has: a merge makes plans of its own kind."""
    if name not in ("Planned", "is_planning", "plan", "planned"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("loratools.surgery.inputs.planning"), name)
