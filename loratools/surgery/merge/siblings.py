"""Modules that a runtime stores in one weight, and so in one way: q, k and v, gate and up, all experts of a layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from loratools.adapter.naming.wrappers import FUSIONS

_GROUPS = (
    *{tuple(name for part in fusion.parts for name in part) for fusion in FUSIONS},
    ("w1", "w3"),
    ("wq", "wk", "wv"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
"""Last segments of the paths of projections that vLLM fuses: those of the fused weights of other models, and more."""

_OF = {name: group for group in _GROUPS for name in group}


def with_siblings(modules: Collection[str], every: Iterable[str]) -> set[str]:
    """Return these modules of a model, and those of `every` that share a weight with one of them in a runtime."""
    shared = {_weight(path) for path in modules}
    return {path for path in every if path in modules or _weight(path) in shared}


def _weight(path: str) -> str:
    """Return what stands for the weight that a runtime stores a module in."""
    before, experts, _ = path.partition(".experts.")
    if experts:
        return before + experts
    parent, _, name = path.rpartition(".")
    return f"{parent} {' '.join(_OF.get(name, (name,)))}"
