"""What an adapter's file leaves open of its stacks of experts, settled by the base: which parameter, and how it lies.

PEFT's names of wrappers say neither. The shapes of all stacks of one module decide together, for they have one order
and, since their class is one, one orientation; then the class, known by its model type; what is open after that is
asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.stacked import IS_TRANSPOSED, STORED_IN_OUT, in_order, known_type
from loratools.adapter.naming.wrappers import Names
from loratools.decisions import warned

Shapes = Mapping[str, tuple[int, ...]]

PARAMETERS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "gate_proj": (("gate_proj", "w1"),),
    "up_proj": (("up_proj", "w3", "w1"),),
    "down_proj": (("down_proj", "w2"),),
}
"""Stacked parameter -> the projections in it, in order, by their names in checkpoints that store each expert."""

MODEL_TYPE = "model_type in its config.json says which model this is, or --model-type of merge"
PEFT_VERSION = "peft_version in its adapter_config.json says which PEFT trained it"

_SPELLINGS = (
    (".block_sparse_moe.", ".mlp."), (".mlp.", ".block_sparse_moe."),
    (".router.linear.", ".router."), (".mlp.router.", ".mlp.router.linear."),
)  # fmt: skip

_Choice = tuple[tuple[Update, ...], bool]
"""An update for each wrapper of a module, and whether its stacks lie (in, out); a matrix always lies (out, in)."""

_Places = Mapping[str, "Stored"]


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """Where a base has a parameter: a stack of three dimensions, or a matrix, or (`split`) tensors of each expert.

    `sides` are those of one expert; of a parameter that is split they are those of all its projections together.
    """

    tensor: str
    sides: tuple[int, int]
    experts: int = 0
    split: bool = False


def settled(
    adapter: Adapter, names: Names, shapes: Shapes, config: Mapping[str, Any]
) -> tuple[Adapter, dict[str, str]]:
    """Return the adapter with stacks that say which parameter they are for and how it lies, and module -> ambiguity.

    A stack that does not fit, or has no place, stays as it is: placing it tells what is wrong.
    """
    groups: dict[str, list[str]] = {}
    for module, update in adapter.updates.items():
        if update.readings:
            groups.setdefault(path_of(module), []).append(module)
    chosen: dict[str, Update] = {}
    ambiguous: dict[str, str] = {}
    for path, modules in groups.items():
        modules.sort(key=len, reverse=True)  # innermost first
        choice = _choose(path, [adapter.updates[module] for module in modules], names, shapes, config)
        if isinstance(choice, str):
            ambiguous |= dict.fromkeys(modules, choice)
        else:
            chosen |= dict(zip(modules, choice, strict=True))
    return (replace(adapter, updates={**adapter.updates, **chosen}) if chosen else adapter), ambiguous


def as_peft_has_it(adapter: Adapter, names: Names, shapes: Shapes, config: Mapping[str, Any]) -> Adapter:
    """Return the adapter settled, and its stacks in factors that PEFT since 0.19.1 takes for the same change.

    Only what is for a model type that is known is turned round; the numbers stay what they are.
    """
    adapter, ambiguous = settled(adapter, names, shapes, config)
    if (known := known_type(config)) is None:
        return adapter
    turned: dict[str, Update] = {}
    for module, update in adapter.updates.items():
        if module in ambiguous or not update.readings or update.shape[0] == 1:
            continue
        if update.layout["transposed"] != as_class_says(path_of(module), known, names, shapes):
            turned[module] = update.turned_round()
    return replace(adapter, updates={**adapter.updates, **turned}) if turned else adapter


def as_class_says(path: str, known: str | None, names: Names, shapes: Shapes) -> bool:
    """Tell whether PEFT since 0.19.1 takes the stacks of a module for (E, in, out), in the order of the base's files.

    It does where the class says `is_transposed`; a checkpoint may lie otherwise than its class does in memory.
    """
    lies = lies_in_out(path, names, shapes)
    otherwise = known is not None and lies is not None and lies != (known in STORED_IN_OUT)
    return (known in IS_TRANSPOSED) != otherwise


def path_of(module: str) -> str:
    """Return a module's path in the base, which knows nothing of PEFT's `base_layer`."""
    return ".".join(segment for segment in module.split(".") if segment != "base_layer")


def stored(path: str, parameter: str, names: Names, shapes: Shapes) -> Stored | None:
    """Return where the base has a parameter of a module; None where it has none, or has it more than once."""
    for spelled in spellings(path):
        tensors = [name for name in names.find(spelled, parameter) if len(shapes[name]) in (2, 3)]
        if len(tensors) > 1:
            return None
        for name in tensors:
            *count, first, second = shapes[name]
            return Stored(name, (first, second), count[0] if count else 0)
        for tensor in names.find(listed(spelled, parameter)):
            if len(shapes[tensor]) == 2:
                rows, columns = shapes[tensor]
                return Stored(tensor, (rows, columns), split=True)
        from loratools.adapter.converted.sites import block_of  # of no use where exact names serve

        if made := block_of(names, shapes, spelled, parameter):
            name, block = made
            *count, first, second = block.shape
            return Stored(name, (first, second), count[0] if count else 0)
        projections = PARAMETERS.get(parameter, ())
        for tensor in (t for known in projections[:1] for name in known for t in names.find(f"{spelled}.0.{name}")):
            if len(shapes[tensor]) == 2:
                rows, columns = shapes[tensor]
                return Stored(tensor, (len(projections) * rows, columns), split=True)
        if projections and (switch := switched(spelled, projections[0][0], names, shapes)):
            _, rows, columns = shapes[switch]
            return Stored(switch, (len(projections) * rows, columns), split=True)
    return None


def listed(stack: str, parameter: str, number: int = 0) -> str:
    """Return the module of one expert's whole parameter where each expert has a linear layer, as Unsloth names it."""
    return f"{stack}.{parameter}s.{number}"


def switched(stack: str, projection: str, names: Names, shapes: Shapes) -> str | None:
    """Return mlx-lm's tensor (E, out, in) of one projection of all experts, by its name; None where there is none."""
    found = names.find(f"{stack.removesuffix('experts')}switch_mlp.{projection}") if stack.endswith("experts") else []
    return next((tensor for tensor in found if len(shapes[tensor]) == 3), None)


def spellings(module: str) -> Iterator[str]:
    """Yield a module's path, and the paths that it has before or after the renaming of transformers 5 and Unsloth."""
    yield module
    for old, new in _SPELLINGS:
        if old in f".{module}.":
            yield f".{module}.".replace(old, new).strip(".")


def lies_in_out(path: str, names: Names, shapes: Shapes) -> bool | None:
    """Tell by shapes whether the base stores the experts of a module (E, in, out): gate_up_proj (2I, H) feeds down_proj
    (H, I). None where it has not both, or they say nothing."""
    up, down = (stored(path, parameter, names, shapes) for parameter in ("gate_up_proj", "down_proj"))
    if not (up and down and up.experts and down.experts):
        return None
    (a, b), (c, d) = up.sides, down.sides
    straight, turned = b == c and a == 2 * d, a == d and b == 2 * c
    return turned if straight != turned else None


def _choose(
    path: str, updates: Sequence[Update], names: Names, shapes: Shapes, config: Mapping[str, Any]
) -> Sequence[Update] | str:
    """Return an update for each wrapper of one module, or why it is ambiguous."""
    parameters = {reading.layout["parameter"] for update in updates for reading in update.readings}
    all_places = {parameter: stored(path, parameter, names, shapes) for parameter in parameters}
    places = {parameter: place for parameter, place in all_places.items() if place is not None}
    fitting = list(_fitting(updates, places))
    if not fitting:
        return updates
    known = known_type(config)
    named = [[update.layout["parameter"] for update in choice] for choice, _ in fitting]
    if known and (own := [choice for choice, each in zip(fitting, named, strict=True) if in_order(each) == each]):
        fitting = own
    if len({turned for _, turned in fitting}) > 1:
        expected = _expected(path, updates, known, names, shapes)
        fitting = [choice for choice in fitting if choice[1] == expected] or fitting
        if len(fitting) == 1 and known in IS_TRANSPOSED and updates[0].stored_in_out(None) is None:
            warned(
                "%s: square in each expert, and taken as PEFT does with transformers 5; with transformers 4 it takes "
                "the experts of %s for the transpose", path, known,
            )  # fmt: skip
    if len(fitting) > 1:
        return _ambiguity(fitting, places, updates, config)
    ((chosen, turned),) = fitting
    split = [places[update.layout["parameter"]].split for update in chosen]
    return [update.turned_round() if turned and apart else update for update, apart in zip(chosen, split, strict=True)]


def _fitting(updates: Sequence[Update], places: _Places) -> Iterator[_Choice]:
    """Yield each way to read the wrappers of one module by which every shape fits."""
    each = [
        {(reading.layout["parameter"], reading.layout["transposed"]): reading for reading in update.readings}
        for update in updates
    ]
    for order in product(*(dict.fromkeys(parameter for parameter, _ in readings) for readings in each)):
        if len(set(order)) < len(order) or not places.keys() >= set(order):
            continue
        stacks = any(_is_stack(places[parameter]) for parameter in order)
        for turned in (False, True) if stacks else (False,):
            of = [(parameter, turned and _is_stack(places[parameter])) for parameter in order]
            chosen = tuple(reading for readings, key in zip(each, of, strict=True) if (reading := readings.get(key)))
            if len(chosen) == len(order) and all(_fits(reading, places) for reading in chosen):
                yield chosen, turned


def _is_stack(place: Stored) -> bool:
    return place.experts > 0 or place.split


def _fits(update: Update, places: _Places) -> bool:
    """Tell whether an update has the shape of its parameter in the base."""
    place, (experts, *sides) = places[update.layout["parameter"]], update.shape
    count = experts if place.split else place.experts or 1
    return count == experts and place.sides == tuple(sides[::-1] if update.layout["transposed"] else sides)


def _expected(path: str, updates: Sequence[Update], known: str | None, names: Names, shapes: Shapes) -> bool | None:
    """Return whether stacks lie (in, out) by their file and their class; None where that is not known."""
    update = max(updates, key=lambda update: update.shape[0])  # a matrix beside stacks says nothing of them
    lies = lies_in_out(path, names, shapes)
    if known is None:
        # A class that computes with (E, out, in) does not say is_transposed; of the others some do.
        return update.stored_in_out(False if lies is False else None)
    turned = update.stored_in_out(known in IS_TRANSPOSED)
    # A checkpoint may lie otherwise than its class does in memory.
    otherwise = lies is not None and lies != (known in STORED_IN_OUT)
    return None if turned is None else turned != otherwise


def _ambiguity(
    fitting: Sequence[_Choice], places: _Places, updates: Sequence[Update], config: Mapping[str, Any]
) -> str:
    """Return which readings of a module's wrappers are left, and what would tell them apart."""
    model_type = config.get("model_type")
    says = f"model_type {model_type!r} does not tell" if model_type else "no config.json tells"
    orders = sorted({", ".join(update.layout["parameter"] for update in choice) for choice, _ in fitting})
    if len(orders) > 1:
        return f"ambiguous: {says} in which order its class registers {orders[0]}; {MODEL_TYPE}"
    tensors = " and ".join(sorted(places[update.layout["parameter"]].tensor for update in fitting[0][0]))
    update = max(updates, key=lambda update: update.shape[0])
    if update.stored_in_out(False) is None:
        wrote = "and which PEFT wrote the adapter is not known"
        return f"ambiguous: {tensors} is square in each expert, {wrote}; {PEFT_VERSION}"
    return f"ambiguous: {tensors} is square in each expert, and {says} how it lies; {MODEL_TYPE}"
