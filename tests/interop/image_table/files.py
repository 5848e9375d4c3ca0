"""Adapters as each trainer writes them, and bases in both namings, with the numbers that a merge must give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.adapter.naming.image import families
from tests.interop.image_table.models import PACKED, Modules, model_of_family

RANK = 2
Deltas = Mapping[str, Tensor]


@dataclass(frozen=True)
class Naming:
    """How a trainer calls the tensors of a LoRA.

    `of` whose names, `flat` whether they have `_` for `.`, `prefix` what stands before them (`{}` for the component),
    `kohya` whether the factors are called down and up, with an alpha beside them.
    """

    of: str
    prefix: str
    flat: bool = False
    kohya: bool = False


def _flattened(prefix: str, of: str = "diffusers") -> Naming:
    return Naming(of, prefix, flat=True, kohya=True)


NAMINGS: Mapping[str, Naming] = {
    "diffusers": Naming("diffusers", "{}."),
    "PEFT": Naming("diffusers", "base_model.model."),
    "bare": Naming("diffusers", ""),
    "ai-toolkit": Naming("original", "diffusion_model."),
    "kohya": _flattened("lora_unet_", "original"),
    "musubi": _flattened("lora_unet_"),
    "OneTrainer": _flattened("lora_{}_"),
    "LyCORIS": _flattened("lycoris_"),
}
"""`save_lora_weights`, PEFT's file without its config, `save_lora_adapter`, ai-toolkit and ComfyUI, sd-scripts, musubi
where it trains diffusers' modules, OneTrainer, SimpleTuner."""

_MUSUBI = ("z_image", "hunyuan_video")
"""Families that musubi-tuner trains under diffusers' names, where the original's differ: Z-Image, FramePack."""


def namings(name: str) -> list[str]:
    """Return the namings under which a family's adapters are found."""
    if name in PACKED:
        return [naming for naming, form in NAMINGS.items() if form.of == "original"]
    without = {"musubi"} - ({"musubi"} if name in _MUSUBI else set())
    if families.get(name).component != "transformer":
        without |= {"OneTrainer", "LyCORIS"}  # they flatten the original's names there, as kohya does
    return [naming for naming in NAMINGS if naming not in without]


def called(modules: Modules, naming: Naming, module: str) -> str:
    """Return what a naming calls a module."""
    prefix = naming.prefix.format(modules.family.component)
    if naming.of == "original" and naming.flat:
        prefix = modules.family.prefixes.get("kohya", prefix)
    return prefix + (module.replace(".", "_") if naming.flat else module)


def write_adapter(modules: Modules, naming: Naming, path: Path, *, probe: bool = False) -> Deltas:
    """Write a LoRA with random factors as a trainer does; return ΔW of each module under diffusers' names.

    `probe` returns ΔW·X for a few fixed vectors in its place, for models whose ΔW would not fit into memory.
    """
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for module, (out, width, *kernel) in sorted(_of(modules, naming).items()):
        a = torch.randn(RANK, width, *kernel, generator=generator)
        b = torch.randn(out, RANK, *(1 for _ in kernel), generator=generator)
        name = called(modules, naming, module)
        ends = (".lora_down.weight", ".lora_up.weight") if naming.kohya else (".lora_A.weight", ".lora_B.weight")
        tensors |= {name + ends[0]: a, name + ends[1]: b}
        if naming.kohya:
            tensors[f"{name}.alpha"] = torch.tensor(RANK / 2)
        deltas[module] = product(a, b, probe=probe) * (0.5 if naming.kohya else 1.0)
    save_file(tensors, path)
    return deltas if naming.of == "diffusers" else in_diffusers(modules, deltas)


def product(a: Tensor, b: Tensor, *, probe: bool = False) -> Tensor:
    """Return B·A in float64, as one row for each output feature; with `probe` what it makes of fixed vectors."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    if probe:
        seed = torch.Generator().manual_seed(a.shape[1])
        a = a @ torch.randn(a.shape[1], 3, generator=seed, dtype=torch.float64)
    return b @ a


def in_diffusers(modules: Modules, deltas: Deltas) -> dict[str, Tensor]:
    """Return what diffusers' modules have of weights of the original's."""
    return {module: deltas[original][order] for module, (original, order) in modules.places.items()}


def in_original(modules: Modules, deltas: Deltas) -> dict[str, Tensor]:
    """Return the original's weights, of which diffusers' modules have all rows."""
    whole = {
        name: torch.zeros(out, prod(rest), dtype=torch.float64) for name, (out, *rest) in modules.originals.items()
    }
    for module, (original, order) in modules.places.items():
        whole[original][order] = deltas[module]
    return whole


def write_bases(name: str, modules: Modules, folder: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Write the model in both namings: naming -> (where, its weights by module as rows)."""
    generator = torch.Generator().manual_seed(11)
    original = {module: torch.randn(shape, generator=generator) for module, shape in modules.originals.items()}
    ours = {
        module: original[theirs][order].reshape(modules.shapes[module])
        for module, (theirs, order) in modules.places.items()
    }
    file, component = folder / "original.safetensors", folder / "pipeline" / modules.family.component
    component.mkdir(parents=True)
    save_file({f"{module}.weight": tensor for module, tensor in original.items()}, file)
    save_file({f"{module}.weight": tensor for module, tensor in ours.items()},
              component / "diffusion_pytorch_model.safetensors")  # fmt: skip
    model = model_of_family(name)
    (component / "config.json").write_text(json.dumps({"_class_name": model.cls}))
    index = {"_class_name": model.pipeline or "DiffusionPipeline", component.name: ["diffusers", model.cls]}
    (folder / "pipeline" / "model_index.json").write_text(json.dumps(index))
    return {"original": (file, original), "diffusers": (folder / "pipeline", ours)}


def read_model(path: Path) -> dict[str, Tensor]:
    """Return a merged model's weights by module."""
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}


def read_adapter(path: Path, known: Mapping[str, str]) -> Deltas:
    """Return ΔW of a file's modules; `known` has the modules by what the file calls them."""
    with safe_open(path, "pt") as file:
        stated = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, mark, end = key.partition(".lora_")
        factors.setdefault(name if mark else key.removesuffix(".alpha"), {})[end if mark else "alpha"] = tensor
    return {known[name]: _delta(name, parts, stated) for name, parts in factors.items()}


def _delta(name: str, parts: Mapping[str, Tensor], stated: Mapping[str, Any]) -> Tensor:
    """Return ΔW of a module, with the alpha beside it or the one that diffusers' header states."""
    a = next(tensor for end, tensor in parts.items() if end in ("A.weight", "down.weight"))
    b = next(tensor for end, tensor in parts.items() if end in ("B.weight", "up.weight"))
    component, _, module = name.partition(".")
    alpha: Any = parts.get("alpha", stated.get(f"{component}.alpha_pattern", {}).get(module))
    alpha = stated.get(f"{component}.lora_alpha") if alpha is None else alpha
    return product(a, b) * (1.0 if alpha is None else float(alpha) / a.shape[0])


def _of(modules: Modules, naming: Naming) -> Mapping[str, tuple[int, ...]]:
    return modules.shapes if naming.of == "diffusers" else modules.originals
