"""TINYLORA: few numbers between the base's singular vectors, which the file has (kind `tinylora`)."""

from __future__ import annotations

from functools import lru_cache

from loratools.adapter import kinds
from loratools.adapter.kinds import DType, Tensor, Update
from loratools.adapter.kinds.tinylora import A, B, P, V, matrices
from loratools.dialects.peft.types import Field, ModuleTensors, a_switch, count, number, rank

PARTS = {A: "right vectors: (r, in)", B: "left vectors: (out, r)", P: "random matrices: (u, r, r)"}
SHARED = {"tinylora_v.{n}": "what is trained, for a group of modules: (u,)"}
FIELDS = {
    "r": rank(2), "u": rank(64), "weight_tying": number(0.0), "projection_seed": count(42),
    "save_projection": Field(a_switch, "a switch", True),
}  # fmt: skip
HARMLESS = {"tinylora_dropout": "training only", "init_v_bound": "how training was initialized"}

_WHY = "its random matrices are not in the file, and PEFT draws those of all modules in turn"
_TELLS = 16  # so many numbers of random matrices


def update(one: ModuleTensors) -> Update:
    """Return the update, with the numbers of the module's group."""
    one.has(A, B)
    groups = {int(name.rpartition(".")[2]): lazy for name, lazy in one.shared.items()}
    if not groups:
        raise ValueError("no base_model.tinylora_v.0, what is trained")
    drawn = P not in one.parts
    place = _place(one) if drawn or len(groups) > 1 else 0
    group = _group(place, len(one.modules), one["weight_tying"]) if len(groups) > 1 else 0
    if group not in groups:
        raise ValueError(f"no base_model.tinylora_v.{group}, what is trained for its group")
    layout = {"seed": one["projection_seed"] + place} if drawn else {}
    built: Update = kinds.get("tinylora").build({**one.parts, V: groups[group]}, 1.0, 1.0, layout=layout)
    return built


def _group(place: int, count: int, tying: float) -> int:
    """Return the group of a module by its place in the model's code, among `count`."""
    groups = max(1, round(count * (1.0 - tying)))
    return min(place // max(1, count // groups), groups - 1)


def _place(one: ModuleTensors) -> int:
    """Return the place of a module in the model's code: its random matrices are of the seed `projection_seed` + it."""
    if P not in one.parts:
        modules = list(one.order(_WHY).shapes)
        if one.module not in modules:
            raise ValueError("the base's class has no such module, so its place among the others is not known")
        return modules.index(one.module)
    stored = one.parts[P].load()
    places = _places(one["projection_seed"], len(one.modules), tuple(stored.shape), stored.dtype)
    place = places.get(_key(stored))
    if place is None:
        raise ValueError(f"its random matrices are of none of the seeds {one['projection_seed']} and following")
    return place


@lru_cache(maxsize=16)
def _places(seed: int, count: int, shape: tuple[int, ...], dtype: DType) -> dict[tuple[float, ...], int]:
    """Return by the random matrices of a place in the model its number; they are rounded to the base's dtype."""
    import torch

    drawn: dict[tuple[float, ...], int] = {}
    for place in range(count):
        P = matrices(seed + place, shape)
        drawn |= {_key(P.to(base).to(dtype)): place for base in (torch.float32, torch.bfloat16, torch.float16)}
    return drawn


def _key(P: Tensor) -> tuple[float, ...]:
    """Return enough of random matrices to tell them from others."""
    return tuple(P.flatten()[:_TELLS].tolist())
