"""Proves the data of a family of image models against diffusers: its models' names, and its converters' rows.

A model is built on the meta device, and the original's weights are made for it from the family's data. Every number in
them says which module and which row it is, so what diffusers' converter makes of them shows where each row went.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loratools.adapter.naming.image.families import Family, Fused

Shapes = Mapping[str, tuple[int, ...]]
Rows = Mapping[str, tuple[str, list[int]]]
Convert = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]

_ROWS = 2**20
"""More than a weight has rows: number = module * _ROWS + row."""

TARGETS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.Embedding)
"""The layers that PEFT puts a LoRA on."""


def regex(pattern: str) -> str:
    """Return the regular expression of a pattern's modules."""
    return re.escape(pattern).replace(re.escape("{}"), r"\d+")


def model_of(cls: type[nn.Module], **config: Any) -> nn.Module:
    """Return a model without numbers."""
    with torch.device("meta"):
        return cls(**config)


def shapes_of(model: nn.Module, only: tuple[type[nn.Module], ...] = (nn.Module,)) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a model's layers of these kinds, by module."""
    parameters = dict(model.named_parameters())
    layers = {f"{name}.weight": name for name, layer in model.named_modules() if isinstance(layer, only)}
    return {layers[name]: tuple(weight.shape) for name, weight in parameters.items() if name in layers}


def originals(family: Family, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the original's modules with the shapes of their weights, for diffusers' modules with theirs."""
    parts = {module: sum(shapes[part][0] for part in fused) for module, fused in _fused(family, shapes).items()}
    whole = {}
    for module, (original, part) in _places(family, shapes).items():
        out = parts.get(original, shapes[module][0]) if part is not None else shapes[module][0]
        whole[original] = (out, *shapes[module][1:])
    return whole


def rows(family: Family, shapes: Shapes) -> dict[str, tuple[str, list[int]]]:
    """Return, for each of diffusers' modules, the original's module and its rows there, in order.

    Also holds the sizes of fused weights' parts, in multiples of the input features, against the model's.
    """
    fused = _fused(family, shapes)
    found: dict[str, tuple[str, list[int]]] = {}
    for module, (original, part) in _places(family, shapes).items():
        out = shapes[module][0]
        if part is None:
            swapped = _pattern(original, family.swapped) or _swapped_here(family, original, shapes[module])
            order = list(range(out))
            found[module] = original, order[out // 2 :] + order[: out // 2] if swapped else order
            continue
        names = fused[original]
        start = sum(shapes[name][0] for name in names[:part])
        found[module] = original, list(range(start, start + out))
        pattern = _pattern(original, family.fused)
        assert pattern, original
        sizes, width = family.fused[pattern].shares, shapes[module][1]
        given = [size * width if size else None for size in sizes]
        outs = [shapes[name][0] for name in names]
        rest = [out for out, size in zip(outs, given, strict=True) if size is None]
        assert all(size in (None, out) for out, size in zip(outs, given, strict=True)), (original, outs, sizes)
        assert len(set(rest)) <= 1, (original, outs, sizes)
    return found


def numbered(shapes: Shapes, biases: Iterable[str] = ()) -> dict[str, Tensor]:
    """Return weights of one column in which every number says its module and its row; biases of some modules."""
    number = {module: i * _ROWS for i, module in enumerate(sorted(shapes), 1)}
    column = {module: number[module] + torch.arange(shape[0], dtype=torch.float64) for module, shape in shapes.items()}
    weights = {f"{module}.weight": column[module].reshape(-1, *(1,) * (len(shapes[module]) - 1)) for module in shapes}
    return weights | {f"{module}.bias": column[module].clone() for module in biases}


def prove(
    family: Family, model: nn.Module, convert: Convert, *, also: Mapping[str, Tensor] | None = None, prefix: str = "",
    without: Sequence[str] = (),
) -> None:  # fmt: skip
    """Assert that diffusers' converter makes of the original's weights what the family's data say.

    `convert` takes the original's tensors, before whose names `prefix` stands, with `also` for what only it needs;
    `without` are beginnings of modules that the converter does not know.
    """
    shapes = {module: shape for module, shape in shapes_of(model).items() if not module.startswith(tuple(without))}
    expected, whole = rows(family, shapes), originals(family, shapes)
    biased = {name.removesuffix(".bias") for name, _ in model.named_parameters() if name.endswith(".bias")}
    originally = {original for module, (original, _) in expected.items() if module in biased}
    tensors, tables = numbered(whole, originally), _tables(family, model)
    raw = {where: torch.full(shape, number + 0.5) for number, (where, shape) in enumerate(tables.values())}
    converted = convert({f"{prefix}{name}": tensor for name, tensor in (tensors | raw).items()} | dict(also or {}))
    for name, (where, _) in tables.items():
        assert torch.equal(converted[name], raw[where]), f"{name} does not come of {where}"
    assert shapes.keys() == expected.keys(), f"no names for {sorted(shapes.keys() - expected.keys())}"
    for module, (original, order) in expected.items():
        for kind in ("weight", "bias") if module in biased else ("weight",):
            theirs = converted.get(f"{module}.{kind}")
            assert theirs is not None, f"{module} does not come of {original}"
            ours = tensors[f"{original}.{kind}"].flatten()[order]
            assert torch.equal(theirs.flatten(), ours), f"{module} has other rows of {original}"


def lora(shapes: Shapes, rank: int = 2, prefix: str = "diffusion_model.", kohya: bool = False) -> dict[str, Tensor]:
    """Return a LoRA of random factors for modules with these shapes, as one file has it.

    `kohya` flattens names and has an alpha beside each; otherwise the names are ComfyUI's with PEFT's endings.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for module, (out, width, *kernel) in sorted(shapes.items()):
        name = prefix + (module.replace(".", "_") if kohya else module)
        a, b = (".lora_down.weight", ".lora_up.weight") if kohya else (".lora_A.weight", ".lora_B.weight")
        tensors[name + a] = torch.randn(rank, width, *kernel, generator=generator)
        tensors[name + b] = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
        if kohya:
            tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    return tensors


def _tables(family: Family, model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the parameters of a model that are no layer's and that a family names: original names and shapes."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()
              if not name.endswith((".weight", ".bias"))}  # fmt: skip
    return {name: (where, shapes[name]) for name, (where, _) in _places(family, shapes).items()}


def _places(family: Family, shapes: Shapes) -> dict[str, tuple[str, int | None]]:
    """Return the original's module of each of diffusers', and which part of a fused weight it is."""
    table: dict[str, tuple[str, int | None]] = {ours: (theirs, None) for theirs, ours in family.renames.items()}
    table |= {part: (theirs, i) for theirs, fused in family.fused.items() for i, part in enumerate(fused.parts)}
    found = {}
    for module in shapes:
        pattern = _pattern(module, table)
        if pattern:
            original, part = table[pattern]
            found[module] = _filled(original, pattern, module), part
    return found


def _fused(family: Family, shapes: Shapes) -> dict[str, list[str]]:
    """Return the modules of diffusers that the original fuses, by the original's module, in order."""
    found: dict[str, list[str]] = {}
    for module, (original, part) in _places(family, shapes).items():
        pattern = _pattern(original, family.fused) if part is not None else None
        if pattern:
            fused: Fused = family.fused[pattern]
            found[original] = [_filled(name, fused.parts[part or 0], module) for name in fused.parts]
    return found


def _swapped_here(family: Family, original: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a module's proportion is one at which its halves change places."""
    pattern = _pattern(original, family.swapped_if)
    out, width = family.swapped_if[pattern] if pattern else (0, 0)
    return bool(pattern) and shape[0] * width == shape[1] * out


def _pattern(module: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if _numbers(pattern, module) is not None), None)


def _filled(to: str, pattern: str, module: str) -> str:
    """Return the module of pattern `to` with the numbers that a module has where its own pattern has `{}`."""
    numbers = _numbers(pattern, module)
    assert numbers is not None, (pattern, module)
    return to.format(*numbers)


def _numbers(pattern: str, module: str) -> tuple[str, ...] | None:
    """Return the numbers that stand in a module for a pattern's `{}`; None where it has another name."""
    match = re.fullmatch(re.escape(pattern).replace(re.escape("{}"), r"(\d+)"), module)
    return match.groups() if match else None
