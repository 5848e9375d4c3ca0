"""Every pair of dialects: A -> X -> A leaves every ΔW as it was, wherever both can say the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter import kinds
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.adapter.naming.image import rename
from loratools.adapter.placement.image import named_for
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor
from loratools.surgery.merge import merge

from .adapters import Q0, V0, lora
from .test_comfy import DOUBLE, FLUX, SINGLE, H, flux_original, product

CONFIG = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2}
RECORDS = {"alpha", "base model"}  # what loralib loses of any adapter, and the test tells it again
NAMES = [
    name for name in dialects.names() if name not in ("tinker", "megatron", "mistral", "mlx_vlm")
]  # which are only read


def conv() -> kinds.Update:
    parts = {"lora_A.weight": torch.randn(2, 5, 3, 3), "lora_B.weight": torch.randn(6, 2, 1, 1)}
    lazy = {part: LazyTensor.of(tensor) for part, tensor in parts.items()}
    built: kinds.Update = kinds.get("conv").build(lazy, 1.5, 3.0)
    return built


def samples() -> dict[str, Adapter]:
    known = {"base_config": CONFIG}
    return {
        "one scaling": Adapter({Q0: lora(1), V0: lora(2)}, settings=known),
        "mixed": Adapter({Q0: lora(1, 2, 3), V0: lora(2, 4, 8, 0.3)}, settings=known),
        "sd": Adapter(
            {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": lora(3), "unet.conv_in": conv()}
        ),
        "flux": Adapter({m: u for m, u in flux_original().items() if "guidance" not in m}, base=FLUX),
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base")
    save_file({f"{module}.weight": torch.ones(12, 10) for module in (Q0, V0)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return Checkpoint.open(folder)


def passed(adapter: Adapter, path: Path, dialect: str, base: Checkpoint | None) -> Adapter | None:
    """Write and read; None where the dialect cannot say it."""
    lost = dialects.get(dialect).losses(adapter)
    if {loss.where for loss in lost} - (RECORDS if dialect == "loralib" else {"base model"}):
        return None
    dialects.save_adapter(adapter, path, dialect=dialect, allow_loss=True)
    alpha = next((float(loss.what.rpartition(" ")[2]) for loss in lost if loss.where == "alpha"), None)
    again = dialects.open_adapter(path, alpha=alpha, base=base)
    assert again.dialect == dialect
    settings = {**adapter.settings, **again.settings}  # what the base told is told again
    return Adapter(again.updates, again.replacements, again.base or adapter.base, settings=settings)


@pytest.mark.parametrize("through", NAMES)
@pytest.mark.parametrize("start", NAMES)
def test_there_and_back(tmp_path: Path, base: Checkpoint, start: str, through: str) -> None:
    for label, sample in samples().items():
        told = base if "base_config" in sample.settings else None
        first = passed(sample, tmp_path / f"{label}-1", start, told)
        middle = first and passed(first, tmp_path / f"{label}-2", through, told)
        last = middle and passed(middle, tmp_path / f"{label}-3", start, told)
        if first is None or middle is None:
            assert label != "one scaling" or start == "comfy" or through == "comfy", (start, through)
            continue
        assert last is not None
        # A dialect that can say both namings keeps the one it was given.
        first, last = rename.to_diffusers(first), rename.to_diffusers(last)
        assert last.updates.keys() == first.updates.keys()
        for module, update in first.updates.items():
            wanted = update.delta_weight()
            atol = 1e-6 * max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(last.updates[module].delta_weight(), wanted, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("naming", ["bare", "model.diffusion_model.", "pipeline"])
def test_an_image_adapter_merges_into_a_base_of_any_naming(tmp_path: Path, naming: str) -> None:
    modules = {
        f"{DOUBLE}.img_attn.qkv": product(3 * H, H, 1),
        f"{SINGLE}.linear1": product(7 * H, H, 2),
        f"{SINGLE}.linear2": product(H, 5 * H, 3),
    }
    dialects.save_adapter(Adapter(modules), tmp_path / "a.safetensors", dialect="kohya")
    adapter = dialects.open_adapter(tmp_path / "a.safetensors")
    zeros = {f"{module}.weight": torch.zeros(update.shape) for module, update in modules.items()}
    if naming == "pipeline":
        double, single = "transformer_blocks.3", "single_transformer_blocks.7"
        parts = [f"{double}.attn.to_{n}" for n in "qkv"] + [f"{single}.attn.to_{n}" for n in "qkv"]
        zeros = {f"{name}.weight": torch.zeros(H, H) for name in parts}
        zeros |= {
            f"{single}.proj_mlp.weight": torch.zeros(4 * H, H),
            f"{single}.proj_out.weight": torch.zeros(H, 5 * H),
        }
        (tmp_path / "base" / "transformer").mkdir(parents=True)
        (tmp_path / "base" / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "X"]}))
        save_file(zeros, tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors")
        path = tmp_path / "base"
    else:
        prefix = "" if naming == "bare" else naming
        path = tmp_path / "base.safetensors"
        save_file({name.replace("diffusion_model.", prefix): zero for name, zero in zeros.items()}, path)
    base = Checkpoint.open(path)
    merge(base, [named_for(adapter, base)], tmp_path / "out")
    merged = Checkpoint.open(tmp_path / "out")
    found = {name: merged.read(name) for name in merged.specs}
    qkv = modules[f"{DOUBLE}.img_attn.qkv"].delta_weight()
    if naming == "pipeline":
        joined = torch.cat([found[f"transformer.transformer_blocks.3.attn.to_{name}.weight"] for name in "qkv"])
        torch.testing.assert_close(joined, qkv, rtol=1e-6, atol=1e-6)
        assert all(tensor.any() for tensor in found.values())
    else:
        for module, update in modules.items():
            name = module.replace("diffusion_model.", "" if naming == "bare" else naming)
            torch.testing.assert_close(found[f"{name}.weight"], update.delta_weight(), rtol=1e-6, atol=1e-6)


def test_named_for_leaves_language_models_alone(base: Checkpoint) -> None:
    adapter = Adapter({Q0: lora(1)}, base=BaseIdentity("x"))
    assert named_for(adapter, base).updates == adapter.updates
