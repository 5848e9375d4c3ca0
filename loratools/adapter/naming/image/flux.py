"""Flux.1: the original's module names (Black Forest Labs) and diffusers', and which of them are fused.

The original keeps q, k, v in one weight, and q, k, v and the MLP's first layer in one in the single blocks. Its last
modulation has shift before scale, diffusers' has scale before shift.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from loratools.adapter.naming.image import architectures

_DOUBLE = {
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
}  # fmt: skip
_SINGLE = {"linear2": "proj_out", "modulation.lin": "norm.linear"}
_PLAIN = {
    **{f"double_blocks.{{}}.{theirs}": f"transformer_blocks.{{}}.{ours}" for theirs, ours in _DOUBLE.items()},
    **{f"single_blocks.{{}}.{theirs}": f"single_transformer_blocks.{{}}.{ours}" for theirs, ours in _SINGLE.items()},
    **{
        f"{theirs}_in.{layer}_layer": f"time_text_embed.{ours}_embedder.linear_{number}"
        for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for layer, number in (("in", 1), ("out", 2))
    },
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip
_FUSED = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{name}" for name in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{name}_proj" for name in "qkv"),
    "single_blocks.{}.linear1": tuple(
        f"single_transformer_blocks.{{}}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ),
}
SWAPPED = ("final_layer.adaLN_modulation.1", "norm_out.linear")
"""The one module whose output features stand in another order, in both namings."""

MLP_RATIO = 4
"""Features of the MLP for each of the hidden ones, in every Flux.1."""

_NUMBER = re.compile(r"(?<=_blocks\.)\d+")


def sizes(names: Sequence[str], width: int) -> tuple[int, ...]:
    """Return the output features of the parts of a fused weight, for input features `width`."""
    return (width, width, width, MLP_RATIO * width)[: len(names)]


def is_original(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Tell whether modules with the original's names are Flux.1's: known names, and its proportions.

    Flux.2 has the same names with other MLPs, and diffusers calls those otherwise.
    """
    known = set(architectures.get("flux-original").by_flat.values())
    return all(module in known and _fits(module, shape) for module, shape in shapes.items())


def is_diffusers(modules: Iterable[str], base: str) -> bool:
    """Tell whether modules with diffusers' names are Flux.1's, and not of another model with the same names.

    HunyuanVideo has them all and a few more blocks; Stable Diffusion 3 and Qwen-Image have those of the double blocks.
    So Flux's last block must be there, or the base's name say it.
    """
    modules = set(modules)
    if not modules <= set(architectures.get("flux").by_flat.values()):
        return False
    last = ("single_transformer_blocks.37.", "single_transformer_blocks.36.")
    return "flux.1" in base.lower() or "flux1" in base.lower() or any(module.startswith(last) for module in modules)


def to_diffusers(module: str) -> tuple[str, ...]:
    """Return diffusers' name of a module of the original, or the names of its parts; () where there is none.

    >>> to_diffusers("single_blocks.7.modulation.lin")
    ('single_transformer_blocks.7.norm.linear',)
    """
    pattern, number = _pattern(module)
    names = (_PLAIN[pattern],) if pattern in _PLAIN else _FUSED.get(pattern, ())
    return tuple(name.format(number) for name in names)


def to_original(module: str) -> tuple[str, int | None] | None:
    """Return the original's name of a module of diffusers, and which part of a fused weight it is."""
    pattern, number = _pattern(module)
    if pattern in _PLAIN_BACK:
        return _PLAIN_BACK[pattern].format(number), None
    if pattern in _FUSED_BACK:
        fused, part = _FUSED_BACK[pattern]
        return fused.format(number), part
    return None


def _fits(module: str, shape: tuple[int, ...]) -> bool:
    """Tell whether (out, in) has Flux.1's proportions, where they tell anything."""
    if len(shape) != 2:
        return True
    proportions = {"qkv": (3, 1), "mlp.0": (MLP_RATIO, 1), "mlp.2": (1, MLP_RATIO), "linear1": (3 + MLP_RATIO, 1),
                   "linear2": (1, 1 + MLP_RATIO)}  # fmt: skip
    return all(shape[0] * b == shape[1] * a for end, (a, b) in proportions.items() if module.endswith(end))


def _pattern(module: str) -> tuple[str, str]:
    match = _NUMBER.search(module)
    return (module[: match.start()] + "{}" + module[match.end() :], match[0]) if match else (module, "")


_PLAIN_BACK = {ours: theirs for theirs, ours in _PLAIN.items()}
_FUSED_BACK = {name: (fused, part) for fused, names in _FUSED.items() for part, name in enumerate(names)}
