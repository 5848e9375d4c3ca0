"""Fused projections that adapters have one by one: OpenCLIP's q, k and v, which one file holds as `in_proj_weight`.

    ….attn.in_proj_weight (3·n, m)    ….attn.q_proj.weight, ….attn.k_proj.weight, ….attn.v_proj.weight (n, m) each

A merge puts the three into the rows of the one again (`placement/image.py`). Other fused weights of image models
(Flux', Stable Diffusion 3's `qkv`) are one module for programs too, and stay one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from loratools.adapter.naming.image import one_file
from loratools.adapter.naming.selection import Selection, matches
from loratools.storage import dtypes
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec

_FUSED = "in_proj_weight"


def apart(base: Checkpoint, tuned: Checkpoint, selection: Selection) -> tuple[Checkpoint, Checkpoint, Selection]:
    """Return views of both models in which q, k and v of OpenCLIP's layers are tensors of their own, to be factored.

    What is dropped or saved whole by the name of the fused tensor, or of a part of it, stays in one. The selection that
    comes back includes the three parts where it included the fused tensor by its name.
    """

    def is_factored(name: str) -> bool:
        every = [name, *_names(name)]
        named = any(matches(pattern, each) for pattern in selection.save for each in every)
        excluded = any(matches(pattern, name) for pattern in selection.exclude)
        return "linear" in selection.kinds and not named and not excluded

    names = {name for name in tuned.specs if _is_fused(name, base, tuned) and is_factored(name)}
    if not names:
        return base, tuned, selection
    views = _view(base, names), _view(tuned, names)
    return *views, _included(selection, names, views[1].specs)


def _included(selection: Selection, names: Collection[str], others: Collection[str]) -> Selection:
    """Return a selection whose patterns that name a fused tensor name its parts; `others` are all names there are."""
    named = {pattern: [name for name in names if matches(pattern, name)] for pattern in selection.include}
    include: list[str] = []
    for pattern, found in named.items():
        if not found or any(matches(pattern, other) for other in others):
            include.append(pattern)
        include += [part for name in sorted(found) for part in _names(name)]
    return replace(selection, include=tuple(dict.fromkeys(include)))


def _is_fused(name: str, base: Checkpoint, tuned: Checkpoint) -> bool:
    """Tell whether both models have the same fused q, k and v, as plain numbers, and no part by its own name."""
    if not name.endswith(_FUSED) or len(one_file.named(name)) != 3 or name not in base.specs:
        return False
    old, new = base.specs[name], tuned.specs[name]
    plain = all(spec.encoding is None and spec.dtype in dtypes.FLOATS for spec in (old, new))
    free = not any(part in model.specs for part in _names(name) for model in (base, tuned))
    return plain and free and old.shape == new.shape and len(new.shape) == 2 and not new.shape[0] % 3


def _names(name: str) -> list[str]:
    return [f"{name.removesuffix(_FUSED)}{part}_proj.weight" for part in "qkv"]


def _view(model: Checkpoint, names: Collection[str]) -> Checkpoint:
    """Return a model with its fused tensors of these names in three: consecutive rows, and so consecutive bytes."""
    specs: dict[str, TensorSpec] = {}
    origins: dict[str, str] = {}
    for name, spec in model.specs.items():
        if name not in names:
            specs[name] = spec
            continue
        size, shape = spec.nbytes // 3, (spec.shape[0] // 3, spec.shape[1])
        for at, part in enumerate(_names(name)):
            start = spec.start + at * size
            specs[part] = TensorSpec(spec.dtype, shape, spec.file, start, start + size)
            origins[part] = name
    return replace(model, specs=specs, stored=model.stored or model, origins=origins)
