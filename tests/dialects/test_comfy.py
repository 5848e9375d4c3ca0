"""The original implementation's names: fused and split projections both ways, XLabs, BFL, text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.adapter import kinds
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.adapter.naming.image import rename
from loratools.adapter.naming.image.readings import Reading, leads
from loratools.decisions import warnings_to
from loratools.errors import LoraToolsError, LossyConversion, UnsupportedAdapter
from loratools.storage.lazy import LazyTensor

from .adapters import Q0, lora
from .contract import DialectContract

H = 8  # hidden size; Flux.1's proportions are what matters
FLUX = BaseIdentity("black-forest-labs/FLUX.1-dev")
DOUBLE, SINGLE = "diffusion_model.double_blocks.3", "diffusion_model.single_blocks.7"
SPLIT, SPLIT_ONE = "transformer.transformer_blocks.3", "transformer.single_transformer_blocks.7"


def product(out: int, width: int, seed: int, rank: int = 2, scaling: float = 1.5, **more: torch.Tensor) -> kinds.Update:
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "lora_A.weight": torch.randn(rank, width, generator=generator),
        "lora_B.weight": torch.randn(out, rank, generator=generator),
    } | {
        name.replace("bias", "lora_B.bias").replace("magnitude", "lora_magnitude_vector"): t for name, t in more.items()
    }
    kind = "dora" if "magnitude" in more else "lora"
    lazy = {part: LazyTensor.of(tensor) for part, tensor in parts.items()}
    built: kinds.Update = kinds.get(kind).build(lazy, scaling, scaling * rank)
    return built


def flux_original() -> dict[str, kinds.Update]:
    return {
        f"{DOUBLE}.img_attn.qkv": product(3 * H, H, 1),
        f"{DOUBLE}.txt_attn.qkv": product(3 * H, H, 2, 3, 0.7),
        f"{DOUBLE}.img_mlp.0": product(4 * H, H, 3),
        f"{DOUBLE}.txt_mod.lin": product(6 * H, H, 4),
        f"{SINGLE}.linear1": product(7 * H, H, 5, 4),
        f"{SINGLE}.linear2": product(H, 5 * H, 6),
        "diffusion_model.final_layer.adaLN_modulation.1": product(2 * H, H, 7),
        "diffusion_model.guidance_in.in_layer": product(H, 4, 8),
    }


class TestContract(DialectContract):
    name = "comfy"

    def adapters(self) -> Mapping[str, Adapter]:
        wan = {"diffusion_model.blocks.0.self_attn.q": lora(1), "diffusion_model.blocks.3.ffn.0": lora(2, 2, 3, 0.3)}
        encoders = {f"text_encoder{n}.text_model.encoder.layers.0.mlp.fc1": lora(3) for n in ("", "_2")}
        encoders |= {"text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": lora(4)}
        return {
            "wan": Adapter(wan, base=BaseIdentity("wan2.1")),
            "flux": Adapter(flux_original() | encoders),
            "sdxl": Adapter({"diffusion_model.input_blocks.4.1.proj_in": lora(5)}),
        }

    def lossy(self) -> Mapping[str, tuple[Adapter, tuple[str, ...]]]:
        known = {"diffusion_model.blocks.0.self_attn.q": lora(1)}
        sd3 = "transformer.transformer_blocks.0.attn.to_q"  # SD3's, Flux's or HunyuanVideo's
        return {"others": (Adapter({**known, Q0: lora(2), sd3: lora(3)}), (Q0, sd3))}


class TestSingleFile(TestContract):
    suffix = ".safetensors"


def delta(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {module: update.delta_weight().double() for module, update in adapter.updates.items()}


def test_fused_projections_of_flux_are_split_and_fused_again_exactly() -> None:
    original = Adapter(flux_original())
    split = rename.to_diffusers(original)
    before, after = delta(original), delta(split)
    assert len(after) == 3 + 3 + 1 + 1 + 4 + 1 + 1 + 1
    qkv = before[f"{DOUBLE}.img_attn.qkv"]
    for i, name in enumerate("qkv"):
        assert torch.equal(after[f"{SPLIT}.attn.to_{name}"], qkv[i * H : (i + 1) * H])
    linear1 = before[f"{SINGLE}.linear1"]
    assert torch.equal(after[f"{SPLIT_ONE}.attn.to_v"], linear1[2 * H : 3 * H])
    assert torch.equal(after[f"{SPLIT_ONE}.proj_mlp"], linear1[3 * H :])
    modulation = before["diffusion_model.final_layer.adaLN_modulation.1"]
    assert torch.equal(after["transformer.norm_out.linear"], torch.cat([modulation[H:], modulation[:H]]))
    again = rename.to_original(Adapter(split.updates, base=FLUX))
    assert again.updates.keys() == original.updates.keys()
    for module, update in original.updates.items():
        assert again.updates[module].rank == update.rank, module
        for part, lazy in update.parts.items():
            assert torch.equal(again.updates[module].parts[part].load(), lazy.load()), (module, part)


def test_projections_trained_apart_are_fused_on_the_diagonal_and_come_apart_as_they_were() -> None:
    split = {
        f"{SPLIT}.attn.to_q": product(H, H, 1, 2),
        f"{SPLIT}.attn.to_v": product(H, H, 2, 3),
        "transformer.transformer_blocks.18.attn.to_out.0": product(H, H, 6),  # as many double blocks as Flux.1 has
        f"{SPLIT_ONE}.attn.to_k": product(H, H, 3, 2, 1.5),
        f"{SPLIT_ONE}.proj_mlp": product(4 * H, H, 4, 2, 0.7),
        "transformer.single_transformer_blocks.37.attn.to_q": product(H, H, 5),
    }
    fused = rename.to_original(Adapter(split))
    assert {module: update.rank for module, update in fused.updates.items()} == {
        f"{DOUBLE}.img_attn.qkv": 5,
        f"{SINGLE}.linear1": 4,
        "diffusion_model.single_blocks.37.linear1": 2,
        "diffusion_model.double_blocks.18.img_attn.proj": 2,
    }
    wanted, found = delta(Adapter(split)), delta(fused)
    zero = torch.zeros(H, H, dtype=torch.float64)
    q, v = wanted[f"{SPLIT}.attn.to_q"], wanted[f"{SPLIT}.attn.to_v"]
    torch.testing.assert_close(found[f"{DOUBLE}.img_attn.qkv"], torch.cat([q, zero, v]), rtol=1e-6, atol=1e-6)
    k, mlp = wanted[f"{SPLIT_ONE}.attn.to_k"], wanted[f"{SPLIT_ONE}.proj_mlp"]
    torch.testing.assert_close(found[f"{SINGLE}.linear1"], torch.cat([zero, k, zero, mlp]), rtol=1e-6, atol=1e-6)
    again = rename.to_diffusers(fused)
    assert {module: update.rank for module, update in again.updates.items()} == {
        module: update.rank for module, update in split.items()
    }
    for module, one in delta(again).items():
        torch.testing.assert_close(one, wanted[module], rtol=1e-6, atol=1e-6)


def test_magnitudes_and_biases_go_with_their_rows() -> None:
    magnitude, bias = torch.rand(3 * H), torch.rand(3 * H)
    fused = {
        f"{DOUBLE}.img_attn.qkv": product(3 * H, H, 1, magnitude=magnitude),
        f"{DOUBLE}.txt_attn.qkv": product(3 * H, H, 2, bias=bias),
    }
    split = rename.to_diffusers(Adapter(fused))
    assert torch.equal(split.updates[f"{SPLIT}.attn.to_k"].parts["lora_magnitude_vector"].load(), magnitude[H : 2 * H])
    assert torch.equal(split.updates[f"{SPLIT}.attn.add_v_proj"].parts["lora_B.bias"].load(), bias[2 * H :])
    again = rename.to_original(Adapter(split.updates, base=FLUX))
    for module, update in fused.items():
        for part, lazy in update.parts.items():
            assert torch.equal(again.updates[module].parts[part].load(), lazy.load())
    del split.updates[f"{SPLIT}.attn.to_k"]  # type: ignore[attr-defined]
    kept = rename.to_original(Adapter(split.updates, base=FLUX))
    assert f"{SPLIT}.attn.to_q" in kept.updates  # no magnitude can be made up for k


def test_models_with_flux_like_names_are_not_taken_for_flux() -> None:
    flux2 = {f"{DOUBLE}.img_attn.qkv": product(3 * H, H, 1), f"{DOUBLE}.img_mlp.0": product(6 * H, H, 2)}
    assert f"{SPLIT}.ff.linear_in" in rename.to_diffusers(Adapter(flux2)).updates
    hunyuan = {f"transformer.single_transformer_blocks.{i}.norm.linear": product(3 * H, H, i) for i in (0, 39)}
    theirs = {f"diffusion_model.single_blocks.{i}.modulation.linear" for i in (0, 39)}  # Flux.1's ends in .lin
    assert rename.to_original(Adapter(hunyuan)).updates.keys() == theirs
    short = {"transformer.transformer_blocks.3.attn.to_q": product(H, H, 1)}
    assert rename.to_original(Adapter(short)).updates.keys() == short.keys()


def of_blocks(kind: str, count: int, width: int = 3072) -> Adapter:
    """Return diffusers' attentions of so many of Flux.1's blocks, at the width of the published model."""
    names = [f"transformer.{kind}.{i}.attn.to_{x}" for i in range(count) for x in "qkv"]
    return Adapter({name: product(width, width, seed, 1) for seed, name in enumerate(names)})


@pytest.mark.parametrize(
    ("kind", "count", "theirs", "flat"),
    [
        ("single_transformer_blocks", 38, "single_blocks.{}.linear1", "single_blocks_{}_linear1"),
        ("transformer_blocks", 19, "double_blocks.{}.img_attn.qkv", "double_blocks_{}_img_attn_qkv"),
    ],
)
def test_all_blocks_of_one_list_at_flux_s_width_are_flux(
    tmp_path: Path, kind: str, count: int, theirs: str, flat: str
) -> None:
    adapter = of_blocks(kind, count)
    warnings: list[str] = []
    with warnings_to(warnings.append):
        for to, name in (("comfy", f"diffusion_model.{theirs}"), ("kohya", f"lora_unet_{flat}")):
            assert not dialects.get(to).losses(adapter)
            dialects.get(to).write(adapter, tmp_path / to)
            (path,) = (tmp_path / to).glob("*.safetensors")
            modules = {tensor.rsplit(".lora_")[0].removesuffix(".alpha") for tensor in load_file(path)}
            assert modules == {name.format(i) for i in range(count)}
    assert any("FIBO" in text for text in warnings) == (count == 38)  # which has as many single blocks, as wide


@pytest.mark.parametrize("kind", ["single_transformer_blocks", "transformer_blocks"])
def test_a_few_blocks_are_refused_with_the_families_and_what_tells(tmp_path: Path, kind: str) -> None:
    with pytest.raises(LossyConversion) as refusal:
        dialects.get("comfy").write(of_blocks(kind, 3), tmp_path / "comfy")
    assert all(word in str(refusal.value) for word in ("Flux.1", "HunyuanVideo", "--base"))


def test_an_encoder_that_is_a_language_model_is_not_called_clip(tmp_path: Path) -> None:
    adapter = Adapter({"text_encoder.layers.0.self_attn.q_proj": lora(1)})
    with pytest.raises(LossyConversion, match="is not known"):
        dialects.get("comfy").write(adapter, tmp_path / "comfy")


def test_unknown_original_names_are_a_loss_for_diffusers(tmp_path: Path) -> None:
    adapter = Adapter({"diffusion_model.strange.0.self_attn.q": lora(1)})
    with pytest.raises(LossyConversion) as refusal:
        dialects.save_adapter(adapter, tmp_path / "a", dialect="diffusers")
    assert refusal.value.problems == ("diffusion_model.strange.0.self_attn.q: diffusers' name of it is not known",)


def pair(name: str, down: str, up: str, out: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    update = product(out, width, seed)
    return {
        f"{name}{down}": update.parts["lora_A.weight"].load(),
        f"{name}{up}": update.parts["lora_B.weight"].load(),
    }


def test_xlabs(tmp_path: Path) -> None:
    ends = (".down.weight", ".up.weight")
    tensors = (
        pair("double_blocks.3.processor.qkv_lora1", *ends, 3 * H, H, 1)
        | pair("double_blocks.3.processor.proj_lora2", *ends, H, H, 2)
        | pair("single_blocks.7.processor.qkv_lora", *ends, 3 * H, H, 3)
        | pair("single_blocks.7.processor.proj_lora", *ends, H, 5 * H, 4)
    )
    save_file(tensors, tmp_path / "a.safetensors")
    found = delta(dialects.open_adapter(tmp_path / "a.safetensors"))
    assert found.keys() == {
        f"{DOUBLE}.img_attn.qkv", f"{DOUBLE}.txt_attn.proj", f"{SINGLE}.linear1", f"{SINGLE}.linear2",
    }  # fmt: skip
    qkv = product(3 * H, H, 3, scaling=1.0).delta_weight().double()
    torch.testing.assert_close(found[f"{SINGLE}.linear1"], torch.cat([qkv, torch.zeros(4 * H, H).double()]))


def test_bfl_control_and_ai_toolkit_and_alphas(tmp_path: Path) -> None:
    tensors = pair("double_blocks.3.img_attn.qkv", ".lora_A.weight", ".lora_B.weight", 3 * H, H, 1)
    tensors |= {"double_blocks.3.img_attn.qkv.lora_B.bias": torch.ones(3 * H)}
    tensors |= {"double_blocks.3.img_attn.norm.query_norm.scale": torch.ones(4)}
    save_file(tensors, tmp_path / "bfl.safetensors")
    adapter = dialects.open_adapter(tmp_path / "bfl.safetensors")
    assert adapter.dialect == "comfy"
    assert list(adapter.replacements) == ["diffusion_model.double_blocks.3.img_attn.norm.query_norm.scale"]
    assert adapter.updates[f"{DOUBLE}.img_attn.qkv"].parts.keys() == {
        "lora_A.weight", "lora_B.weight", "lora_B.bias",
    }  # fmt: skip
    tensors = pair(f"{DOUBLE}.img_attn.qkv", ".lora_down.weight", ".lora_up.weight", 3 * H, H, 1)
    save_file(tensors | {f"{DOUBLE}.img_attn.qkv.alpha": torch.tensor(5.0)}, tmp_path / "m.safetensors")
    assert dialects.open_adapter(tmp_path / "m.safetensors").updates[f"{DOUBLE}.img_attn.qkv"].scaling == 2.5


def test_an_alpha_is_written_only_where_it_says_something(tmp_path: Path) -> None:
    adapter = Adapter({f"{DOUBLE}.img_attn.qkv": product(3 * H, H, 1, scaling=1.0), SINGLE + ".linear2": lora(1, 4, 8)})
    dialects.save_adapter(adapter, tmp_path / "a.safetensors", dialect="comfy")
    assert {name for name in load_file(tmp_path / "a.safetensors") if "alpha" in name} == {f"{SINGLE}.linear2.alpha"}


@pytest.mark.parametrize("through", ["diffusers", "kohya", "comfy"])
def test_flux_through_each_dialect_and_back(tmp_path: Path, through: str) -> None:
    start = Adapter({m: u for m, u in flux_original().items() if "guidance" not in m}, base=FLUX)
    dialects.save_adapter(start, tmp_path / "a", dialect="diffusers")
    first = dialects.open_adapter(tmp_path / "a")
    dialects.save_adapter(first, tmp_path / "b", dialect=through)
    dialects.save_adapter(dialects.open_adapter(tmp_path / "b"), tmp_path / "c", dialect="diffusers")
    last = dialects.open_adapter(tmp_path / "c")
    wanted, found = delta(first), delta(last)
    assert found.keys() == wanted.keys()
    for module in wanted:
        assert torch.equal(found[module], wanted[module])


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_the_unets_names_are_those_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    from types import SimpleNamespace

    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    inside = (
        "input_blocks.4.1.proj_in", "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0", "output_blocks.5.1.proj_in",
        "output_blocks.0.1.transformer_blocks.3.ff.net.0.proj", "middle_block.1.proj_out",
        "input_blocks.7.1.transformer_blocks.0.attn1.to_q",
    )  # fmt: skip
    config: Any = SimpleNamespace(layers_per_block=2)
    for module in inside:
        key = f"lora_unet_{module.replace('.', '_')}"
        theirs = next(iter(_maybe_map_sgm_blocks_to_diffusers({key: 0}, config)))
        for old, new in (
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_blocks", "up_blocks"),
        ):
            theirs = theirs.replace(old, new)  # as its next step does
        (ours,) = leads(Reading("sdxl", "original"), [module], "diffusers")[module].names
        assert f"lora_unet_{ours.replace('.', '_')}" == theirs
        assert leads(Reading("sdxl", "diffusers"), [ours], "original")[ours].names == (module,)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("through", ["comfy", "kohya"])
def test_diffusers_loads_flux_that_came_through_the_originals_names(tmp_path: Path, through: str) -> None:
    pytest.importorskip("diffusers")
    from . import pipelines
    from .test_diffusers import compare, dense

    model = pipelines.flux()
    pipelines.train(model, ["to_q", "to_k", "to_v", "add_k_proj", "proj_mlp", "proj_out", "ff.net.2", "norm1.linear"])
    trained = pipelines.deltas(model, "transformer.")
    made = {module: product(*delta.shape, seed) for seed, (module, delta) in enumerate(trained.items())}
    dialects.save_adapter(Adapter(made, base=FLUX), tmp_path / "a", dialect=through)
    dialects.save_adapter(dialects.open_adapter(tmp_path / "a"), tmp_path / "b", dialect="diffusers")
    compare(pipelines.loaded("flux", tmp_path / "b"), dense(Adapter(made)))


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_xlabs_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers

    ends = (".down.weight", ".up.weight")
    tensors = (
        pair("double_blocks.3.processor.qkv_lora1", *ends, 3 * H, H, 1)
        | pair("double_blocks.3.processor.qkv_lora2", *ends, 3 * H, H, 5)
        | pair("double_blocks.3.processor.proj_lora1", *ends, H, H, 2)
        | pair("single_blocks.7.processor.qkv_lora", *ends, 3 * H, H, 3)
        | pair("single_blocks.7.processor.proj_lora", *ends, H, 5 * H, 4)
    )
    save_file(tensors, tmp_path / "a.safetensors")
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    found = delta(rename.to_diffusers(dialects.open_adapter(tmp_path / "a.safetensors")))
    modules = {name.rsplit(".lora_", 1)[0] for name in theirs}
    assert found.keys() == modules
    for module in modules:
        wanted = theirs[f"{module}.lora_B.weight"] @ theirs[f"{module}.lora_A.weight"]
        torch.testing.assert_close(found[module].float(), wanted)


@pytest.mark.parametrize("module", ["transformer_blocks.0.mlp_context_fc1", "single_transformer_blocks.0.qkv_proj"])
def test_factors_packed_for_nunchaku_are_refused_by_what_they_are(tmp_path: Path, module: str) -> None:
    file = {f"{module}.lora_down": torch.zeros(64, 16), f"{module}.lora_up": torch.zeros(192, 16)}
    save_file(file, tmp_path / "a.safetensors")
    with pytest.raises(UnsupportedAdapter, match=r"packed for the 4-bit kernels of Nunchaku \(SVDQuant\)"):
        dialects.open_adapter(tmp_path / "a.safetensors")
    save_file(file | {f"{module}.qweight": torch.zeros(8, 8, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(LoraToolsError):
        dialects.open_adapter(tmp_path / "model.safetensors")
