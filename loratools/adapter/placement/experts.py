"""Where the experts of a mixture lie: stacked in one tensor, or each in tensors of its own; by names and shapes alone.

    stacked     mlp.experts.gate_up_proj (E, 2I, H) and mlp.experts.down_proj (E, H, I), as transformers 5 computes;
                or (E, H, 2I) and (E, I, H), as gpt-oss does, with the rows of gate and up in turn
    by expert   mlp.experts.7.gate_proj, up_proj and down_proj, or block_sparse_moe.experts.7.w1, w3 and w2 (Mixtral)
    switch      mlp.switch_mlp.gate_proj, up_proj and down_proj, (E, out, in) each, as mlx-lm does
    listed      mlp.experts.gate_up_projs.7 and down_projs.7, (2I, H) and (H, I), as Unsloth has gpt-oss in 4 bits

The output of a merge has the layout of its base, whichever of these the adapter was trained in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from loratools.adapter.converted.sites import block_of, stack_sites_of
from loratools.adapter.kinds import Update
from loratools.adapter.naming.stacked import INTERLEAVED, STORED_IN_OUT, known_type
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.placement.stacks import MODEL_TYPE, PARAMETERS, Shapes, lies_in_out, listed, spellings, switched
from loratools.adapter.site import NoPlace, Site

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<name>\w+)")
_LISTED = re.compile(r"(?P<stack>.+\.experts)\.(?P<parameter>\w+_proj)s\.(?P<number>\d+)")


def stack_sites(module: str, update: Update, names: Names, shapes: Shapes) -> list[tuple[int, Site]]:
    """Return each expert of a stack, by number, with its site: in the stacked tensor, or in those of the experts.

    Returns [] where the base has neither. Raises `NoPlace` for shapes that do not fit.
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
        transposed = _orientation(update, (first, second), tensor)
        matrix, out = (count * first, second), update.shape[1]
        return [
            (e, Site(tensor, matrix, (e * first, (e + 1) * first, 1), (0, second, 1), (0, out), transposed))
            for e in range(count)
        ]
    if made := block_of(names, shapes, module, parameter):
        name, block = made
        turned = _orientation(update, block.shape[1:], name)
        return list(stack_sites_of(block, name, update, turned, shapes))
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
    if listed := _LISTED.fullmatch(module):
        return _listed_site(listed, update, names, shapes, config)
    match = _EXPERT.fullmatch(module)
    if match is None or len(update.shape) != 2:
        return None
    for parameter, projections in PARAMETERS.items():
        position = next((i for i, known in enumerate(projections) if match["name"] in known), None)
        tensors = (tensor for path in spellings(match["stack"]) for tensor in names.find(path, parameter))
        if position is not None and (tensor := next((name for name in tensors if len(shapes[name]) == 3), None)):
            place = int(match["number"]), position, len(projections)
            lies = lies_in_out(match["stack"], names, shapes)
            return _in_stack(tensor, shapes[tensor], update.shape, place, known_type(config), lies)
    projection = next((name for name, known in _PROJECTIONS.items() if match["name"] in known), "")
    if tensor := _switch(match["stack"], projection, names, shapes):
        return _in_switch(tensor, shapes[tensor], update.shape, int(match["number"]))
    return None


def _listed_site(
    match: re.Match[str], update: Update, names: Names, shapes: Shapes, config: Mapping[str, Any]
) -> Site | None:
    """Return the site of a whole parameter of one expert (`…experts.gate_up_projs.7`) in the stack of it, or None."""
    for tensor in names.find(match["stack"], match["parameter"]):
        if len(shapes[tensor]) == 3 and len(update.shape) == 2:
            lies = lies_in_out(match["stack"], names, shapes)
            # Rows of gate and up lie in turn on both sides.
            place = int(match["number"]), 0, 1
            return _in_stack(tensor, shapes[tensor], update.shape, place, known_type(config), lies)
    return None


_PROJECTIONS = {name: PARAMETERS[name][0][:2] for name in ("gate_proj", "up_proj", "down_proj")}
"""The projections of an expert by mlx-lm's name, with their names where each expert has its own tensors."""


def _switch(stack: str, projection: str, names: Names, shapes: Shapes) -> str | None:
    """Return mlx-lm's tensor of one projection of all experts, or None."""
    each = (switched(path, projection, names, shapes) for path in spellings(stack))
    return next((tensor for tensor in each if tensor), None)


def _in_switch(
    tensor: str, stored: tuple[int, ...], shape: tuple[int, ...], number: int, part: tuple[int, int] | None = None
) -> Site:
    """Return the site of a projection (out, in), rows `part` of an update, in a stack (E, out, in)."""
    experts, first, second = stored
    if number >= experts:
        raise NoPlace(f"{tensor} has {experts} experts")
    if shape != (first, second):
        raise NoPlace(f"its delta weight has shape {shape}, and {tensor} has {(first, second)} for each expert")
    rows = (number * first, (number + 1) * first, 1)
    return Site(tensor, (experts * first, second), rows, (0, second, 1), part or (0, first))


def _orientation(update: Update, sides: tuple[int, ...], tensor: str) -> bool:
    """Tell whether each expert is stored transposed, (in, out), as shapes and what is settled tell."""
    out, inner = update.shape[1:]
    fits = [transposed for transposed, wanted in ((False, (out, inner)), (True, (inner, out))) if wanted == sides]
    if (stated := update.layout["transposed"]) is not None:
        fits = [transposed for transposed in fits if transposed == stated]
    if len(fits) == 1:
        return fits[0]
    stored = "" if stated is None else f", stored {'(in, out)' if stated else '(out, in)'}"
    raise NoPlace(f"its delta weight has shape {(out, inner)} for each expert{stored}, {tensor} has {sides}")


def _by_expert(module: str, update: Update, number: int, names: Names, shapes: Shapes) -> Iterator[tuple[int, Site]]:
    """Yield the sites of one expert in the tensors that are its own: half of gate_up_proj is gate_proj."""
    projections = PARAMETERS.get(update.layout["parameter"], ())
    count, (out, inner) = len(projections), update.shape[1:]
    for tensor in names.find(listed(module, update.layout["parameter"], number)):
        if shapes[tensor] != (out, inner):
            raise NoPlace(f"its delta weight has shape {(out, inner)}, and {tensor} has {shapes[tensor]}")
        yield number, Site.whole(tensor, (out, inner))
        return
    for i, known in enumerate(projections):
        paths = [f"{path}.{number}.{name}" for path in spellings(module) for name in known]
        part = (i * (out // count), (i + 1) * (out // count))
        if switch := _switch(module, known[0], names, shapes):
            yield number, _in_switch(switch, shapes[switch], (out // count, inner), number, part)
            continue
        if not (tensors := [tensor for path in paths for tensor in names.find(path)]):
            return
        tensor = tensors[0]
        if shapes[tensor] != (out // count, inner):
            raise NoPlace(f"its delta weight has shape {(out, inner)}, and {tensor} has {shapes[tensor]}")
        rows = out // count
        yield number, Site(tensor, (rows, inner), (0, rows, 1), (0, inner, 1), part)


def _in_stack(
    tensor: str, stored: tuple[int, ...], shape: tuple[int, ...], place: tuple[int, int, int], known: str | None,
    lies: bool | None,
) -> Site:  # fmt: skip
    """Return the site of a projection (out, in). Its `place`: expert, position in the parameter, projections there.

    `known` is the model type, `lies` whether the stack beside it shows these experts to be stored (in, out).
    """
    (experts, first, second), (out, inner), (number, position, count) = stored, shape, place
    if number >= experts:
        raise NoPlace(f"{tensor} has {experts} experts")
    wanted = (count * out, inner)
    straight, turned = wanted == (first, second), wanted == (second, first)
    if not straight and not turned:
        raise NoPlace(f"its delta weight has shape {shape}, and {tensor} has {(first, second)} for each expert")
    if straight and turned and (lies is not None or known):
        turned = known in STORED_IN_OUT if lies is None else lies
        straight = not turned
    if known is None and turned and (straight or count > 1):
        # gate and up side by side, or in turn: only the model knows.
        raise NoPlace(
            f"ambiguous: no model type that is known tells how {tensor} with {(first, second)} lies; {MODEL_TYPE}"
        )
    interleaved = known in INTERLEAVED and count > 1
    begin, end, step = (position, count * out, count) if interleaved else (position * out, (position + 1) * out, 1)
    matrix, row = (experts * first, second), number * first
    if turned:
        return Site(tensor, matrix, (row, row + first, 1), (begin, end, step), (0, out), True)
    return Site(tensor, matrix, (row + begin, row + end, step), (0, second, 1), (0, out))
