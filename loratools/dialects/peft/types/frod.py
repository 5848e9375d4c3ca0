"""FROD: the base's weight in a basis that modules share (kind `frod`)."""

from __future__ import annotations

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.dialects.peft.types import Field, ModuleTensors, a_switch

PARTS = {"frod_lambda_l": "lengths: (in,)", "frod_lambda_s_values": "single elements: (n,)"}
SHARED = {
    "frod_V.{word}": "basis of a group of modules: (in, in)",
    "frod_s_indices.{word}": "places of the elements: (2, n)",
    "frod_s_size.{word}": "sides of the matrix that they are in: (2,)",
}
FIELDS = {"save_projection": Field(a_switch, "a switch", True)}
REFUSED = {
    "save_projection": (
        lambda value: value is False,
        "the bases that modules share are in no file, and PEFT works them out of all their weights with signs that "
        "differ from machine to machine; save it again with save_projection=True",
    )
}
HARMLESS = {
    "frod_dropout": "training only", "progressbar": "shown or not",
    "runtime_offload_base_weight": "where it is computed",
    **dict.fromkeys(
        ("projection_prng_key", "sparse_rate", "regularization_alpha"), "how the bases were made, which the file has"
    ),
}  # fmt: skip


def update(one: ModuleTensors) -> Update:
    """Return the update, with what the modules of its group share."""
    one.has(*PARTS)
    group = _group(one.module)
    names = {"frod_V": f"frod_V.{group}", "frod_s_indices": f"frod_s_indices.{group}"}
    one.has(*names.values())
    shared = {name: one.shared[stored] for name, stored in names.items()}
    built: Update = kinds.get("frod").build({**one.parts, **shared}, 1.0, 1.0)
    return built


def _group(module: str) -> str:
    """Return which modules share a basis with this one, as PEFT calls them: by the last words of their names."""
    words = module.split(".")
    if len(words) == 1 or words[-2].isdigit():
        return words[-1]
    if words[-2:] == ["output", "dense"] and words[-3:-2] == ["attention"]:
        return "attention_output"
    return "_".join(words[-2:])
