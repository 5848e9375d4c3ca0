"""Flux.1: the original's module names (Black Forest Labs) and diffusers', and which of them are fused.

The original keeps q, k, v in one weight, and q, k, v and the MLP's first layer in one in the single blocks. Its last
modulation has shift before scale, diffusers' has scale before shift.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from loratools.adapter.naming.image import architectures

_PLAIN = {
    "double_blocks.{}.img_attn.proj": "transformer_blocks.{}.attn.to_out.0",
    "double_blocks.{}.txt_attn.proj": "transformer_blocks.{}.attn.to_add_out",
    "double_blocks.{}.img_mlp.0": "transformer_blocks.{}.ff.net.0.proj",
    "double_blocks.{}.img_mlp.2": "transformer_blocks.{}.ff.net.2",
    "double_blocks.{}.txt_mlp.0": "transformer_blocks.{}.ff_context.net.0.proj",
    "double_blocks.{}.txt_mlp.2": "transformer_blocks.{}.ff_context.net.2",
    "double_blocks.{}.img_mod.lin": "transformer_blocks.{}.norm1.linear",
    "double_blocks.{}.txt_mod.lin": "transformer_blocks.{}.norm1_context.linear",
    "single_blocks.{}.linear2": "single_transformer_blocks.{}.proj_out",
    "single_blocks.{}.modulation.lin": "single_transformer_blocks.{}.norm.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_FUSED = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{name}" for name in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{name}_proj" for name in "qkv"),
    "single_blocks.{}.linear1": (
        *(f"single_transformer_blocks.{{}}.attn.to_{name}" for name in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ),
}
SWAPPED = ("final_layer.adaLN_modulation.1", "norm_out.linear")
"""The one module whose output features stand in another order, in both namings."""

MLP_RATIO = 4
"""Features of the MLP for each of the hidden ones, in every Flux.1."""

_NUMBER = re.compile(r"(?<=_blocks\.)\d+")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module is in the other naming: its name there, or the names of the parts of a fused weight."""

    names: tuple[str, ...]

    def sizes(self, width: int) -> tuple[int, ...]:
        """Return the output features of the parts, for input features `width`."""
        return (width, width, width, MLP_RATIO * width)[: len(self.names)]


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


def to_diffusers(module: str) -> Place | None:
    """Return where diffusers has a module of the original.

    >>> to_diffusers("single_blocks.7.modulation.lin")
    Place(names=('single_transformer_blocks.7.norm.linear',))
    """
    pattern, number = _pattern(module)
    if pattern in _PLAIN:
        return Place((_PLAIN[pattern].format(number),))
    return Place(tuple(name.format(number) for name in _FUSED[pattern])) if pattern in _FUSED else None


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


def _parts() -> Iterator[tuple[str, tuple[str, int]]]:
    for fused, names in _FUSED.items():
        for part, name in enumerate(names):
            yield name, (fused, part)


_PLAIN_BACK = {ours: theirs for theirs, ours in _PLAIN.items()}
_FUSED_BACK = dict(_parts())
