"""The image model inside a base, and what is said first where an adapter is given the base of another one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from loratools.adapter.naming.image import readings
from loratools.adapter.naming.image.components import COMPONENTS, component
from loratools.adapter.naming.image.groups import ORIGINAL

Shapes = Mapping[str, tuple[int, ...]]

ROOTS = ("model.diffusion_model.", f"{ORIGINAL}.", "net.", "model.model.", "")
"""What stands before the names of an image model in one file; the last is nothing."""

MODELS = tuple(sorted(f"{name}." for name in COMPONENTS if not name.startswith("text_encoder")))
"""What stands before them in a pipeline."""

_MOST = 3
"""How many modules without a place are still named: that the model is another one is why."""

_CERTAIN = 0.9
"""Which share of a base's modules a family must have for the base to be called by its name."""


def inside(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """Return the modules of the base's image model without what stands before them."""
    weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    roots = (*(root for root in ROOTS if root), prefix, *MODELS, "")
    root = next(root for root in roots if any(module.startswith(root) for module in weights) or not root)
    return {module.removeprefix(root): shape for module, shape in weights.items() if module.startswith(root)}


def explained(problems: Sequence[str], modules: Iterable[str], shapes: Shapes) -> list[str]:
    """Return what keeps an adapter from a base: whose each is, and the first problems, where their families differ.

    `modules` are the adapter's names, `shapes` the base's tensors. Without image models, where the names may be those
    of the base's family, or where the base's family is not sure, the problems are returned as they are.

    >>> explained(["m.0.q: not in the base"], ["m.0.q"], {"m.1.q.weight": (2, 2)})
    ['m.0.q: not in the base']
    """
    found = _families(modules, shapes)
    if found is None:
        return list(problems)
    own, its = found
    rest = len(problems) - _MOST
    more = [f"and {rest} more, as is to be expected of another model"] if rest > 0 else []
    return [f"this is an adapter of {own}, and the base model is {its}", *problems[:_MOST], *more]


def _families(modules: Iterable[str], shapes: Shapes) -> tuple[str, str] | None:
    """Return the adapter's families and the base's, in words; None where they may be the same, or are not known."""
    roots = [root for root in (*ROOTS, *MODELS) if root]
    heads = {module: next((root for root in roots if module.startswith(root)), "") for module in modules}
    bare = {module.removeprefix(root) for module, root in heads.items() if root or not any(heads.values())}
    fits = readings.fitting(name for name in bare if not component(name).startswith("text_encoder"))
    if not fits:
        return None
    base = inside(shapes, ROOTS[0])
    count, best = readings.most(base)
    if count < _CERTAIN * len(base) or {_kin(reading) for reading in fits} & {_kin(reading) for reading in best}:
        return None
    return _words(fits), _words(best)


def _words(found: Iterable[readings.Reading]) -> str:
    """Return families in words, each once."""
    return " or ".join(dict.fromkeys(reading.family.summary for reading in found))


def _kin(reading: readings.Reading) -> str:
    """Return what families of the same models have in common."""
    return reading.family.like or reading.name
