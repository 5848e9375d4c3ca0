"""What a call says of its inputs: how adapters are read, which of their modules count, what kind of model a base is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from loratools import dialects
from loratools.errors import InvalidOption, LoraToolsError
from loratools.options import is_finite
from loratools.surgery.inputs.opened import AdapterSource, ModelSource, as_list, open_model

if TYPE_CHECKING:
    from loratools.adapter.model import Adapter
    from loratools.storage.checkpoint import Checkpoint

Patterns = str | Sequence[str] | None
"""Patterns of modules, as `selection.matches` reads them: one, several, or None."""


def read_as(
    adapters: AdapterSource | Sequence[AdapterSource], dialect: str | None, alpha: float | None
) -> list[AdapterSource]:
    """Return adapters with the dialect and the alpha that a call says, for every one of them.

    Raises `UnknownKind` for a dialect that is none, `InvalidOption` for an alpha that is no number, and for either of
    an adapter that is open already.
    """
    listed = as_list(adapters)
    if dialect is not None:
        dialects.get(dialect)
    dialects.check_alpha(alpha)
    if dialect is None and alpha is None:
        return listed
    return [
        dialects.ReadAs(each, dialect, alpha)
        if isinstance(each, str | PathLike)
        else dialects.open_adapter(each, dialect=dialect, alpha=alpha)
        for each in listed
    ]


def typed_model(model: ModelSource, model_type: str | None) -> Checkpoint:
    """Return a model, open, with the kind that a call says where its config.json does not."""
    opened = open_model(model)
    return opened if model_type is None else replace(opened, config={**opened.config, "model_type": model_type})


def check_model_type(model_type: object, base: object = True) -> None:
    """Raise `InvalidOption` for a kind of model that is no name, and for one without a `base`."""
    if not isinstance(model_type, str | None):
        raise InvalidOption(f"model_type is {model_type!r}; it can be a name such as 'gpt2', or None")
    if model_type is not None and base is None:
        raise InvalidOption(f"model_type is {model_type!r}, which says what a base is, and there is none")


def patterns_of(include: Patterns, exclude: Patterns) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return patterns as they are held; raise `InvalidOption` for what is no list of texts."""
    wrong, made = [], []
    for name, value in (("include", include), ("exclude", exclude)):
        listed = [value] if isinstance(value, str) else value if value is not None else []
        if not isinstance(listed, list | tuple) or not all(isinstance(each, str) and each for each in listed):
            wrong.append(f"{name} is {value!r}; it can be a list of patterns, or None")
            listed = []
        made.append(tuple(listed))
    if wrong:
        raise InvalidOption("patterns choose modules", wrong)
    return made[0], made[1]


def chosen(weight: float | str, include: Patterns, exclude: Patterns) -> float | str:
    """Return a weight that is 0 for what is left out: a text where there are patterns.

    Raises `InvalidOption` where a weight that has patterns itself, or a pattern with a comma, cannot be said so.

    >>> chosen(0.5, ["q_proj"], ["*.0.*"]), chosen(1.0, None, ["mlp"]), chosen(1.0, None, None)
    ('0,*.0.*=0,q_proj=0.5', '1,mlp=0', 1.0)
    """
    keep, leave = patterns_of(include, exclude)
    if not keep and not leave:
        return weight
    from loratools.adapter.weights import Weight  # for patterns and lists alone: most weights are numbers

    if isinstance(weight, str) and (parsed := Weight.parse(weight)).plain:
        weight = parsed.default
    if isinstance(weight, str) and (keep or not Weight.parse(weight).patterns):
        raise InvalidOption(f"weight {weight!r} says itself which modules count; give patterns there or here")
    if commas := [pattern for pattern in (*keep, *leave) if "," in pattern]:
        raise InvalidOption(f"{', '.join(map(repr, commas))}: a pattern here has no comma; give several patterns")
    zeros = [f"{pattern}=0" for pattern in leave]
    if isinstance(weight, str):
        return ",".join([*zeros, weight])
    return ",".join(["0" if keep else f"{weight:.17g}", *zeros, *(f"{pattern}={weight:.17g}" for pattern in keep)])


def chosen_weights(count: int, weights: Any, include: Patterns, exclude: Patterns) -> Any:
    """Return the weights of adapters with what is left out, `weights` themselves where there are no patterns."""
    keep, leave = patterns_of(include, exclude)
    if not keep and not leave:
        return weights
    alone = weights is not None and (is_finite(weights) or isinstance(weights, str))
    listed = [1.0] * count if weights is None else [weights] if alone else weights
    if not isinstance(listed, Sequence):
        return weights
    return [chosen(each, keep, leave) if isinstance(each, str | int | float) else each for each in listed]


def kept(adapter: Adapter, include: Patterns, exclude: Patterns) -> Adapter:
    """Return an adapter with the modules that patterns choose; raise `LoraToolsError` for one that names none."""
    keep, leave = patterns_of(include, exclude)
    if not keep and not leave:
        return adapter
    from loratools.adapter.naming.selection import Selection  # for patterns alone

    selection = Selection(keep, leave)
    selection.check([*adapter.updates, *adapter.replacements])
    updates = {module: update for module, update in adapter.updates.items() if selection.dropped(module) is None}
    whole = {path: lazy for path, lazy in adapter.replacements.items() if selection.dropped(path) is None}
    if not updates and not whole:
        raise LoraToolsError("the patterns leave nothing of the adapter")
    return replace(adapter, updates=updates, replacements=whole)


def kept_names(names: Sequence[str], patterns: tuple[tuple[str, ...], tuple[str, ...]]) -> set[str]:
    """Return the names that patterns choose; raise `LoraToolsError` for a pattern that names none."""
    from loratools.adapter.naming.selection import Selection

    selection = Selection(*patterns)
    selection.check(names)
    return {name for name in names if selection.dropped(name) is None}


def as_asked(
    adapters: AdapterSource | Sequence[AdapterSource], weights: Any, include: Patterns, exclude: Patterns,
    dialect: str | None, alpha: float | None, model_type: str | None = None,
) -> tuple[list[AdapterSource], Any]:  # fmt: skip
    """Return the adapters and the weights of a call with all that it says of them; raise `InvalidOption` and such."""
    check_model_type(model_type)
    read = read_as(adapters, dialect, alpha)
    return read, chosen_weights(len(read), weights, include, exclude)


def open_asked(
    adapters: Sequence[AdapterSource], base: ModelSource | None, dialect: str | None, alpha: float | None,
    include: Patterns, exclude: Patterns, model_type: str | None,
) -> tuple[Checkpoint | None, list[Adapter]]:  # fmt: skip
    """Return the base of a call, as numbers, and its adapters with the modules that it chooses."""
    from loratools.storage.checkpoint.logical import logical

    check_model_type(model_type, base)
    patterns_of(include, exclude)
    read = read_as(adapters, dialect, alpha)
    model = None if base is None else logical(typed_model(base, model_type))
    return model, [kept(dialects.open_adapter(source, base=model), include, exclude) for source in read]
