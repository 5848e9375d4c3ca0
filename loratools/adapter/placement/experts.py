"""Where the experts of a mixture lie: stacked in one tensor, or each in tensors of its own; by names and shapes alone.

    stacked     mlp.experts.gate_up_proj (E, 2I, H) and mlp.experts.down_proj (E, H, I), as transformers 5 computes;
                or (E, H, 2I) and (E, I, H), as gpt-oss does, with the rows of gate and up in turn
    by expert   mlp.experts.7.gate_proj, up_proj and down_proj, or block_sparse_moe.experts.7.w1, w3 and w2 (Mixtral)

The output of a merge has the layout of its base, whichever of these the adapter was trained in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from loratools.adapter.kinds import Update
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.site import Site

Shapes = Mapping[str, tuple[int, ...]]

# stacked parameter -> the projections in it, in order, by their names in checkpoints that store each expert
PARAMETERS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}

TRANSPOSED = frozenset({"gpt_oss", "openai_privacy_filter", "aria"})
"""Model types whose experts are stacked (E, in, out) in memory; PEFT asks the model, here its type tells."""

INTERLEAVED = frozenset({"gpt_oss"})
"""Model types that store the rows of gate and up in turn: g₀, u₀, g₁, u₁, …"""

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<name>\w+)")
HINT = "--model-type says which model this is"


class NoPlace(Exception):
    """Why a module has no certain place, and what would decide it; becomes a line of the resolver's error."""


def stack_sites(
    module: str, update: Update, names: Names, shapes: Shapes, config: Mapping[str, Any]
) -> list[tuple[int, Site]]:
    """Return each expert of a stack, by number, with its site: in the stacked tensor, or in those of the experts.

    Returns [] where the base has neither. Raises `NoPlace` for shapes that do not fit, or fit in two ways.
    """
    parameter, experts = update.layout["parameter"], len(update.members)
    stacks = [name for name in names.find(module, parameter) if len(shapes[name]) == 3]
    if len(stacks) > 1:
        raise NoPlace(f"ambiguous: {parameter} could be any of {', '.join(stacks)}")
    if experts == 1 and (tensor := _single(module, update, names, shapes)):
        # PEFT takes a parameter of two dimensions for (out, in) whatever its module does with it.
        rows, columns = shapes[tensor]
        return [(0, Site.whole(tensor, (rows, columns)))]
    if stacks:
        tensor, (count, first, second) = stacks[0], shapes[stacks[0]]
        if count != experts:
            raise NoPlace(f"it is for {experts} experts, {tensor} has {count}")
        transposed = _orientation(update, (first, second), tensor, config)
        matrix, out = (count * first, second), update.shape[1]
        return [
            (e, Site(tensor, matrix, (e * first, (e + 1) * first, 1), (0, second, 1), (0, out), transposed))
            for e in range(count)
        ]
    return [pair for e in range(experts) for pair in _by_expert(module, update, e, names, shapes)]


def _single(module: str, update: Update, names: Names, shapes: Shapes) -> str | None:
    """Return the one parameter of two dimensions that a stack of one stands for, such as a router's weight."""
    parameter, sides = update.layout["parameter"], update.shape[1:]
    tensors = [name for name in names.find(module, parameter) if len(shapes[name]) == 2]
    if len(tensors) > 1:
        raise NoPlace(f"ambiguous: {parameter} could be any of {', '.join(tensors)}")
    if tensors and shapes[tensors[0]] != sides:
        raise NoPlace(f"its delta weight has shape {sides}, {tensors[0]} has {shapes[tensors[0]]}")
    return tensors[0] if tensors else None


def expert_site(module: str, update: Update, names: Names, shapes: Shapes, config: Mapping[str, Any]) -> Site | None:
    """Return the site of a single expert's projection (`…experts.7.up_proj`) in a base that stacks them, or None."""
    match = _EXPERT.fullmatch(module)
    if match is None or len(update.shape) != 2:
        return None
    for parameter, projections in PARAMETERS.items():
        position = next((i for i, known in enumerate(projections) if match["name"] in known), None)
        tensors = (tensor for path in spellings(match["stack"]) for tensor in names.find(path, parameter))
        if position is not None and (tensor := next((name for name in tensors if len(shapes[name]) == 3), None)):
            place = int(match["number"]), position, len(projections)
            return _in_stack(tensor, shapes[tensor], update.shape, place, config.get("model_type"))
    return None


def spellings(module: str) -> Iterator[str]:
    """Yield a module's path, and the path that it has before or after the renaming of transformers 5."""
    yield module
    for old, new in ((".block_sparse_moe.", ".mlp."), (".mlp.", ".block_sparse_moe.")):
        if old in f".{module}.":
            yield f".{module}.".replace(old, new).strip(".")


def _orientation(update: Update, sides: tuple[int, int], tensor: str, config: Mapping[str, Any]) -> bool:
    """Tell whether each expert is stored transposed, (in, out)."""
    out, inner = update.shape[1:]
    fits = [transposed for transposed, wanted in ((False, (out, inner)), (True, (inner, out))) if wanted == sides]
    if (stated := update.layout["transposed"]) is not None:
        fits = [transposed for transposed in fits if transposed == stated]
    if not fits:
        raise NoPlace(f"its delta weight has shape {(out, inner)} for each expert, {tensor} has {sides}")
    if len(fits) == 1:
        return fits[0]
    if not (model_type := config.get("model_type")):
        raise NoPlace(f"ambiguous: {tensor} is square in each expert, and no config.json tells how it lies; {HINT}")
    return model_type in TRANSPOSED


def _by_expert(module: str, update: Update, number: int, names: Names, shapes: Shapes) -> Iterator[tuple[int, Site]]:
    """Yield the sites of one expert in the tensors that are its own: half of gate_up_proj is gate_proj."""
    projections = PARAMETERS.get(update.layout["parameter"], ())
    count, (out, inner) = len(projections), update.shape[1:]
    for i, known in enumerate(projections):
        paths = [f"{path}.{number}.{name}" for path in spellings(module) for name in known]
        if not (tensors := [tensor for path in paths for tensor in names.find(path)]):
            return
        tensor = tensors[0]
        straight = shapes[tensor] == (out // count, inner)
        # PEFT before 0.19 took stacks for (E, in, out), so its factors are those of the transpose.
        turned = shapes[tensor] == (inner // count, out) and (update.layout["transposed"] is True or not straight)
        if not straight and not turned:
            raise NoPlace(f"its delta weight has shape {(out, inner)}, and {tensor} has {shapes[tensor]}")
        if turned and (straight or count > 1):
            raise NoPlace(
                f"ambiguous: trained by an old PEFT on stacked experts, while the base stores {tensor}; "
                "load it in PEFT 0.19 or later with its model, and save it again"
            )
        rows = shapes[tensor][0]
        part = (0, out) if turned else (i * rows, (i + 1) * rows)
        matrix = (rows, shapes[tensor][1])
        yield number, Site(tensor, matrix, (0, rows, 1), (0, matrix[1], 1), part, turned)


def _in_stack(
    tensor: str, stored: tuple[int, ...], shape: tuple[int, ...], place: tuple[int, int, int], model_type: str | None
) -> Site:
    """Return the site of a projection (out, in). Its `place`: expert, position in the parameter, projections there."""
    (experts, first, second), (out, inner), (number, position, count) = stored, shape, place
    if number >= experts:
        raise NoPlace(f"{tensor} has {experts} experts")
    wanted = (count * out, inner)
    straight, turned = wanted == (first, second), wanted == (second, first)
    if not straight and not turned:
        raise NoPlace(f"its delta weight has shape {shape}, and {tensor} has {(first, second)} for each expert")
    if (straight and turned) or (turned and count > 1):
        # gate and up side by side, or in turn: only the model knows.
        if not model_type:
            raise NoPlace(f"ambiguous: no config.json tells how {tensor} with {(first, second)} lies; {HINT}")
        turned = model_type in TRANSPOSED if straight and turned else turned
    interleaved = model_type in INTERLEAVED and count > 1
    begin, end, step = (position, count * out, count) if interleaved else (position * out, (position + 1) * out, 1)
    matrix, row = (experts * first, second), number * first
    if turned:
        return Site(tensor, matrix, (row, row + first, 1), (begin, end, step), (0, out), True)
    return Site(tensor, matrix, (row + begin, row + end, step), (0, second, 1), (0, out))
