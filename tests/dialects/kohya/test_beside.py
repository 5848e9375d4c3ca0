"""Parts beside factors, of norms, of parameters: each is merged as its formula says, in kohya's and ComfyUI's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools import dialects
from loratools.decisions import warnings_to
from loratools.errors import IncompatibleAdapter, LoraToolsError

Tensors = dict[str, torch.Tensor]
N, R = 32, 4
Q, NORM, PATCH, CONV = "blocks.0.self_attn.q", "blocks.0.norm3", "patch_embedding", "conv"
BASE_SHAPES = {
    f"{Q}.weight": (N, N), f"{Q}.bias": (N,), f"{NORM}.weight": (N,), f"{NORM}.bias": (N,),
    "blocks.0.modulation": (1, 6, N), "head.modulation": (1, 2, N), f"{PATCH}.weight": (N, 4, 1, 2, 2),
    f"{PATCH}.bias": (N,), f"{CONV}.weight": (16, 8, 3, 3), f"{CONV}.bias": (16,),
}  # fmt: skip
NAMINGS: dict[str, Callable[[str], str]] = {
    "comfy": lambda module: f"diffusion_model.{module}",
    "kohya": lambda module: "lora_unet_" + module.replace(".", "_"),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def base() -> Tensors:
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(BASE_SHAPES.items(), 100)}


def factors(rows: int, *columns: int) -> Tensors:
    ones = (1,) * (len(columns) - 1)
    return {"lora_down.weight": random(R, *columns), "lora_up.weight": random(rows, R, *ones, seed=1)}


def product(parts: Tensors) -> torch.Tensor:
    return parts["lora_up.weight"].double().flatten(1) @ parts["lora_down.weight"].double().flatten(1)


def tucker(parts: Tensors) -> torch.Tensor:
    up, mid, down = (parts[f"lora_{name}.weight"].double() for name in ("up", "mid", "down"))
    return torch.einsum("om,mnkl,ni->oikl", up.flatten(1), mid, down.flatten(1))


LINEAR, SUM = factors(N, N), random(N, N, seed=5)
MID = {"lora_mid.weight": random(R, R, 3, 3)}
CORE = {"lora_down.weight": random(R, 8), "lora_up.weight": random(16, R)} | MID
WIDE = {name: tensor[..., None, None] for name, tensor in CORE.items() if name not in MID} | MID
FLAT_PATCH, FLAT_CONV = factors(N, 16), factors(16, 72)
BIAS, VECTOR, MAGNITUDE = random(N, seed=2), random(N, seed=3), random(N, seed=4).abs()


def decomposed(W: torch.Tensor) -> torch.Tensor:
    W = W.double() + product(LINEAR)
    return W * (MAGNITUDE.double() / W.norm(dim=1))[:, None]


# module -> its parts; parameter -> what it becomes
CASES: dict[str, tuple[dict[str, Tensors], dict[str, Callable[[torch.Tensor], torch.Tensor]]]] = {
    "diff_b beside factors": (
        {Q: LINEAR | {"diff_b": BIAS}}, {f"{Q}.weight": lambda W: W + product(LINEAR), f"{Q}.bias": lambda b: b + BIAS}
    ),
    "diff beside factors": ({Q: LINEAR | {"diff": SUM}}, {f"{Q}.weight": lambda W: W + product(LINEAR) + SUM}),
    "diff and diff_b beside factors": (
        {Q: LINEAR | {"diff": SUM, "diff_b": BIAS}},
        {f"{Q}.weight": lambda W: W + product(LINEAR) + SUM, f"{Q}.bias": lambda b: b + BIAS},
    ),
    "diff of a norm": (
        {NORM: {"diff": VECTOR, "diff_b": BIAS}},
        {f"{NORM}.weight": lambda w: w + VECTOR, f"{NORM}.bias": lambda b: b + BIAS},
    ),
    "w_norm and b_norm": (
        {NORM: {"w_norm": VECTOR, "b_norm": BIAS}},
        {f"{NORM}.weight": lambda w: w + VECTOR, f"{NORM}.bias": lambda b: b + BIAS},
    ),
    "b_norm alone": ({NORM: {"b_norm": BIAS}}, {f"{NORM}.bias": lambda b: b + BIAS}),
    "diff_m": (
        {"blocks.0": {"diff_m": random(1, 6, N)}, "head": {"diff_m": random(1, 2, N)}},
        {"blocks.0.modulation": lambda p: p + random(1, 6, N), "head.modulation": lambda p: p + random(1, 2, N)},
    ),
    "diff of a modulation": (
        {"blocks.0.modulation": {"diff": random(1, 6, N)}}, {"blocks.0.modulation": lambda p: p + random(1, 6, N)}
    ),
    "diff of a convolution": (
        {PATCH: {"diff": random(N, 4, 1, 2, 2), "diff_b": BIAS}},
        {f"{PATCH}.weight": lambda W: W + random(N, 4, 1, 2, 2), f"{PATCH}.bias": lambda b: b + BIAS},
    ),
    "flat factors of a 3-D convolution": (
        {PATCH: FLAT_PATCH}, {f"{PATCH}.weight": lambda W: W + product(FLAT_PATCH).reshape(W.shape)}
    ),
    "flat factors of a convolution": (
        {CONV: FLAT_CONV}, {f"{CONV}.weight": lambda W: W + product(FLAT_CONV).reshape(W.shape)}
    ),
    "a Tucker core": ({CONV: WIDE}, {f"{CONV}.weight": lambda W: W + tucker(CORE)}),
    "a Tucker core between matrices": ({CONV: CORE}, {f"{CONV}.weight": lambda W: W + tucker(CORE)}),
    "PEFT's magnitude": ({Q: LINEAR | {"lora_magnitude_vector": MAGNITUDE}}, {f"{Q}.weight": decomposed}),
    "a magnitude's weight": ({Q: LINEAR | {"lora_magnitude_vector.weight": MAGNITUDE}}, {f"{Q}.weight": decomposed}),
    "set_weight": ({NORM: {"set_weight": VECTOR}, Q: LINEAR},
                   {f"{NORM}.weight": lambda w: VECTOR, f"{Q}.weight": lambda W: W + product(LINEAR)}),
    "reshape_weight": (
        {Q: LINEAR | {"reshape_weight": torch.tensor([N, N])}}, {f"{Q}.weight": lambda W: W + product(LINEAR)}
    ),
}  # fmt: skip


def write(folder: Path, modules: dict[str, Tensors], naming: str, stored: Tensors) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    name = NAMINGS[naming]
    file = {f"{name(module)}.{part}": lazy for module, parts in modules.items() for part, lazy in parts.items()}
    save_file(stored, folder / "base.safetensors")
    save_file(file, folder / "a.safetensors")
    return folder / "base.safetensors", folder / "a.safetensors"


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("case", CASES)
def test_every_part_is_merged_where_it_belongs(tmp_path: Path, case: str, naming: str) -> None:
    modules, becomes = CASES[case]
    stored = base()
    model, adapter = write(tmp_path, modules, naming, stored)
    loratools.merge(model, adapter, tmp_path / "out")
    merged = load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert merged.keys() == stored.keys()
    for name, W in stored.items():
        wanted = becomes.get(name, lambda W: W)(W).double()
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-5, atol=1e-5, msg=lambda _, n=name: n)


@pytest.mark.parametrize("case", CASES)
def test_every_part_comes_back_from_comfy(tmp_path: Path, case: str) -> None:
    modules, becomes = CASES[case]
    model, adapter = write(tmp_path, modules, "comfy", base())
    loratools.convert(adapter, tmp_path / "again.safetensors", to="comfy")
    before, after = load_file(adapter), load_file(tmp_path / "again.safetensors")
    assert sum(tensor.numel() for tensor in after.values() if tensor.ndim) == sum(t.numel() for t in before.values())
    loratools.merge(model, tmp_path / "again.safetensors", tmp_path / "out")
    merged, stored = load_file(next((tmp_path / "out").glob("*.safetensors"))), base()
    for name, become in becomes.items():
        torch.testing.assert_close(merged[name].double(), become(stored[name]).double(), rtol=1e-5, atol=1e-5)


def test_a_difference_beside_factors_is_said(tmp_path: Path) -> None:
    warnings: list[str] = []
    _, adapter = write(tmp_path, {Q: LINEAR | {"diff": SUM}}, "comfy", base())
    with warnings_to(warnings.append):
        opened = dialects.open_adapter(adapter)
    assert sorted(opened.updates) == [f"diffusion_model.{Q}", f"diffusion_model.{Q}.weight"]
    assert [text for text in warnings if "both are added, ComfyUI takes the difference alone" in text]


def test_a_widened_input_needs_a_widened_base(tmp_path: Path) -> None:
    wide = factors(N, 2 * N) | {"reshape_weight": torch.tensor([N, 2 * N])}
    weights = {"img_in.weight": random(N, N), "img_in.bias": BIAS}
    model, adapter = write(tmp_path, {"img_in": wide}, "comfy", weights)
    with pytest.raises(IncompatibleAdapter, match="as control adapters do, and the base has to be widened too"):
        loratools.merge(model, adapter, tmp_path / "out")
    W = torch.cat([weights["img_in.weight"], torch.zeros(N, N)], 1)
    model, _ = write(tmp_path, {"img_in": wide}, "comfy", weights | {"img_in.weight": W})
    loratools.merge(model, adapter, tmp_path / "out")
    merged = load_file(next((tmp_path / "out").glob("*.safetensors")))
    torch.testing.assert_close(merged["img_in.weight"].double(), W + product(wide), rtol=1e-5, atol=1e-5)
    loratools.resize(adapter, tmp_path / "small", 2)
    (file,) = (tmp_path / "small").glob("*.safetensors")
    assert load_file(file)["diffusion_model.img_in.reshape_weight"].tolist() == [N, 2 * N]


@pytest.mark.parametrize(("shape", "why"), [
    (torch.tensor([N, N + 1]), "its factors are for"), (torch.ones(N, N), "expected at most 8 whole numbers"),
])  # fmt: skip
def test_a_shape_that_is_none_of_the_factors_is_refused(tmp_path: Path, shape: torch.Tensor, why: str) -> None:
    _, adapter = write(tmp_path, {Q: LINEAR | {"reshape_weight": shape}}, "comfy", base())
    with pytest.raises(LoraToolsError) as caught:
        dialects.open_adapter(adapter)
    assert why in str(caught.value)
