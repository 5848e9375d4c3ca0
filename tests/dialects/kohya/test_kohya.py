"""kohya: flattened names and how they are looked up, alphas, hashes and metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter import kinds
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.decisions import warnings_to
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor
from loratools.surgery.convert import convert
from tests.dialects.adapters import Q0, V0, expect, factors, lora, samples
from tests.dialects.contract import DialectContract

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
CLIP = "text_encoder.text_model.encoder.layers.0.mlp"
FLUX = "diffusion_model.double_blocks.0"


def conv(seed: int, rank: int = 2, alpha: float = 3) -> kinds.Update:
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "lora_A.weight": LazyTensor.of(torch.randn(rank, 5, 3, 3, generator=generator)),
        "lora_B.weight": LazyTensor.of(torch.randn(6, rank, 1, 1, generator=generator)),
    }
    built: kinds.Update = kinds.get("conv").build(parts, alpha / rank, alpha)
    return built


def dora(seed: int) -> kinds.Update:
    parts = dict(lora(seed).parts) | {"lora_magnitude_vector": LazyTensor.of(torch.rand(12) + 1)}
    built: kinds.Update = kinds.get("dora").build(parts, 2.0, 8.0)
    return built


class TestContract(DialectContract):
    name = "kohya"

    def adapters(self) -> Mapping[str, Adapter]:
        sd = {f"{UNET}.to_q": lora(1), f"{CLIP}.fc1": lora(2, 2, 3), "unet.conv_in": conv(3)}
        sdxl = {
            "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q": lora(1),
            f"{CLIP}.fc1": lora(2),
            "text_encoder_2.text_model.encoder.layers.31.self_attn.k_proj": lora(3),
        }
        flux = {
            f"{FLUX}.img_attn.qkv": lora(1),
            f"{FLUX}.img_mod.lin": lora(1),
            f"{CLIP}.fc2": lora(2),
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": lora(3),
        }
        strange = {"transformer.strange_blocks.37.proj_mlp": lora(1)}
        qwen = {"transformer.transformer_blocks.59.img_mlp.net.0.proj": lora(1)}
        return samples() | {
            "sd": Adapter(sd, base=BaseIdentity("v1-5-pruned.safetensors")),
            "sdxl": Adapter(sdxl),
            "flux": Adapter(flux),
            "of no family": Adapter(strange),
            "qwen": Adapter(qwen),
        }

    def lossy(self) -> Mapping[str, tuple[Adapter, tuple[str, ...]]]:
        whole = {"unet.conv_in.weight": LazyTensor.of(torch.ones(2, 2))}
        return {
            "whole": (Adapter({f"{UNET}.to_q": lora(1)}, whole), ("unet.conv_in.weight",)),
            "collision": (Adapter({"a.b": lora(1), "a_b": lora(2), Q0: lora(3)}), ("a_b",)),
        }


class TestSingleFile(TestContract):
    suffix = ".safetensors"


def named(flat: str, seed: int, alpha: torch.Tensor | float | None = 8.0) -> dict[str, torch.Tensor]:
    A, B = factors(seed)
    found = {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B}
    return found if alpha is None else found | {f"{flat}.alpha": torch.as_tensor(alpha)}


def saved(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(dict(tensors), path, metadata=metadata)
    return path


def test_alphas_in_every_dtype_and_none_at_all(tmp_path: Path) -> None:
    tensors = named(f"{FLAT}_to_q", 0) | named(f"{FLAT}_to_k", 1, None)
    tensors |= named(f"{FLAT}_to_v", 2, torch.tensor(22.627, dtype=torch.bfloat16))
    tensors |= named(f"{FLAT}_to_out_0", 3, torch.tensor([2.0], dtype=torch.float16))
    adapter = dialects.open_adapter(saved(tmp_path / "a.safetensors", tensors))
    expect(adapter, f"{UNET}.to_q", 0, 2.0)
    expect(adapter, f"{UNET}.to_k", 1, 1.0)
    expect(adapter, f"{UNET}.to_v", 2, 22.625 / 4)
    expect(adapter, f"{UNET}.to_out.0", 3, 0.5)


def test_dora_scale_is_the_magnitude_of_each_output(tmp_path: Path) -> None:
    tensors = named(f"{FLAT}_to_q", 0) | {f"{FLAT}_to_q.dora_scale": torch.arange(12.0).reshape(12, 1)}
    update = dialects.open_adapter(saved(tmp_path / "a.safetensors", tensors)).updates[f"{UNET}.to_q"]
    assert update.kind == "dora"
    assert torch.equal(update.parts["lora_magnitude_vector"].load(), torch.arange(12.0))
    adapter = Adapter({f"{UNET}.to_q": dora(1)})
    dialects.save_adapter(adapter, tmp_path / "b.safetensors", dialect="kohya")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.get_slice(f"{FLAT}_to_q.dora_scale").get_shape() == [12, 1]
    again = dialects.open_adapter(tmp_path / "b.safetensors").updates[f"{UNET}.to_q"]
    for part, lazy in adapter.updates[f"{UNET}.to_q"].parts.items():
        assert torch.equal(again.parts[part].load(), lazy.load())


def test_a_magnitude_for_each_input_is_not_taken_for_one_for_each_output(tmp_path: Path) -> None:
    tensors = named(f"{FLAT}_to_q", 0) | {f"{FLAT}_to_q.dora_scale": torch.ones(1, 10)}
    path = saved(tmp_path / "a.safetensors", tensors)
    if kinds.claim(
        {part: LazyTensor.of(torch.ones(2, 2)) for part in ("lora_A.weight", "lora_B.weight", "dora_scale")}
    ):
        assert "lora_magnitude_vector" not in dialects.open_adapter(path).updates[f"{UNET}.to_q"].parts
        return
    with pytest.raises(UnsupportedAdapter) as refusal:
        dialects.open_adapter(path)
    assert "dora_scale (2-D)" in refusal.value.problems[0]


def test_names_that_flattening_lost_wholly_are_named(tmp_path: Path) -> None:
    """A real file flattened the last dots too and doubled the prefix."""
    A, B = factors(0)
    wrong = "lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    tensors = {f"{wrong}_lora_down.weight": A, f"{wrong}_lora_up.weight": B}
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(saved(tmp_path / "a.safetensors", tensors))
    assert refusal.value.problems == (
        f"2 of 2 names under lora_unet_ are of no known family: {wrong}_lora_down, {wrong}_lora_up",
    )
    assert "--base" in str(refusal.value.hint)


def test_one_flattened_name_of_two_architectures_is_ambiguous(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", named("lora_unet_double_blocks_0_img_attn_qkv", 0))
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(path)
    assert refusal.value.problems == (
        "lora_unet_double_blocks_0_img_attn_qkv: could be diffusion_model.double_blocks.0.img_attn.qkv (Chroma, Flux.1,"
        " Flux.2 dev and klein), diffusion_model.double_blocks.0.img_attn_qkv"
        " (HunyuanImage, HunyuanVideo)",
    )
    tensors = named("lora_unet_double_blocks_0_img_attn_qkv", 0) | named("lora_unet_double_blocks_0_img_mlp_0", 1)
    adapter = dialects.open_adapter(saved(tmp_path / "b.safetensors", tensors))
    assert sorted(adapter.updates) == [f"{FLUX}.img_attn.qkv", f"{FLUX}.img_mlp.0"]


def test_the_base_decides_where_it_is_given(tmp_path: Path) -> None:
    weights = {"model.diffusion_model.double_blocks.0.img_attn_qkv.weight": torch.ones(12, 10)}
    weights |= {"model.layers.0.self_attn.q_proj.weight": torch.ones(12, 10)}
    base = Checkpoint.open(saved(tmp_path / "base.safetensors", weights))
    tensors = named("lora_unet_double_blocks_0_img_attn_qkv", 0) | named("lycoris_model_layers_0_self_attn_q_proj", 1)
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(BadFile, match="cannot be turned back"):
        dialects.open_adapter(path)
    adapter = dialects.open_adapter(path, base=base)
    expect(adapter, "diffusion_model.double_blocks.0.img_attn_qkv", 0, 2.0)
    expect(adapter, Q0, 1, 2.0)


def test_names_of_no_known_architecture_are_written_down_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    dialects.save_adapter(Adapter({Q0: lora(0), f"{UNET}.to_q": lora(1)}), path, dialect="kohya")
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["loratools_names"]) == {"lycoris_model_layers_0_self_attn_q_proj": Q0}
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    lie = {"loratools_names": json.dumps({"lycoris_model_layers_0_self_attn_q_proj": V0})}
    with pytest.raises(BadFile, match="cannot be turned back"):
        dialects.open_adapter(saved(tmp_path / "b.safetensors", tensors, lie))


def test_strangers_and_lonely_alphas_are_listed(tmp_path: Path) -> None:
    tensors = named(f"{FLAT}_to_q", 0) | {"what": torch.ones(1)}
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(saved(tmp_path / "a.safetensors", tensors))
    assert refusal.value.problems == ("1 name is none of kohya's: what",)
    with pytest.raises(BadFile, match="problem") as refusal:
        dialects.open_adapter(
            saved(tmp_path / "b.safetensors", named(f"{FLAT}_to_q", 0) | {f"{FLAT}_to_k.alpha": torch.ones(())})
        )
    assert refusal.value.problems == (f"{UNET}.to_k: an alpha without factors",)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
        return found


def data_of(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def test_metadata_are_kept_and_hashes_computed_anew(tmp_path: Path) -> None:
    said = {
        "ss_network_module": "networks.lora", "ss_tag_frequency": '{"a": 1}', "ss_sd_model_name": "sd.safetensors",
        "modelspec.title": "x", "modelspec.hash_sha256": "0xold", "sshs_model_hash": "old", "other": "kept",
    }  # fmt: skip
    adapter = dialects.open_adapter(saved(tmp_path / "a.safetensors", named(f"{FLAT}_to_q", 0), said))
    assert adapter.base == BaseIdentity("sd.safetensors")
    dialects.save_adapter(adapter, tmp_path / "b.safetensors", dialect="kohya")
    sha = hashlib.sha256(data_of(tmp_path / "b.safetensors")).hexdigest()
    assert metadata_of(tmp_path / "b.safetensors") == said | {
        "sshs_model_hash": sha, "sshs_legacy_hash": "e3b0c442", "modelspec.hash_sha256": f"0x{sha}",
    }  # fmt: skip


def test_the_legacy_hash_is_of_64_kib_at_1_mib(tmp_path: Path) -> None:
    """As sd-scripts computes it: over the file as it is with its ss_ entries alone."""
    A, B = torch.randn(64, 5000), torch.randn(3000, 64)
    parts = {"lora_A.weight": LazyTensor.of(A), "lora_B.weight": LazyTensor.of(B)}
    adapter = Adapter({f"{UNET}.to_q": kinds.get("lora").build(parts, 1.0, 64.0)})
    path = tmp_path / "a.safetensors"
    dialects.save_adapter(adapter, path, dialect="kohya")
    training = {key: value for key, value in metadata_of(path).items() if key.startswith("ss_")}
    header = {"__metadata__": training}
    with safe_open(path, "pt") as file:
        order = [f"{FLAT}_to_q.alpha", f"{FLAT}_to_q.lora_down.weight", f"{FLAT}_to_q.lora_up.weight"]
        offset = 0
        for name in order:
            tensor = file.get_tensor(name)
            size = tensor.numel() * 4
            header[name] = {
                "dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size],
            }  # fmt: skip
            offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    whole = len(text).to_bytes(8, "little") + text + data_of(path)
    assert len(whole) > 0x110000
    wanted = hashlib.sha256(whole[0x100000:0x110000]).hexdigest()[:8]
    assert metadata_of(path)["sshs_legacy_hash"] == wanted


def test_what_is_written_for_other_tools(tmp_path: Path) -> None:
    adapter = Adapter({f"{UNET}.to_q": lora(1, 4, 8), f"{CLIP}.fc1": lora(2, 4, 8, 8 / 3**0.5)})
    path = tmp_path / "a.safetensors"
    dialects.save_adapter(adapter, path, dialect="kohya")
    said: dict[str, Any] = metadata_of(path)
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "4", "8")
    with safe_open(path, "pt") as file:
        assert file.get_tensor(f"{FLAT}_to_q.alpha").dtype == torch.float32
        alpha = file.get_tensor("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha")
    assert alpha.dtype == torch.float64  # float32 would round it
    assert alpha.item() / 4 == 8 / 3**0.5


def trained_lycoris(**options: Any) -> tuple[Any, Any]:
    """Return a tiny UNet and LyCORIS' network on it, with random factors."""
    lycoris: Any = pytest.importorskip("lycoris")
    from tests.dialects import pipelines

    model = pipelines.unet()
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Attention", "ResnetBlock2D"], "name_algo_map": {}})
    network = lycoris.create_lycoris(model, 1.0, linear_dim=4, linear_alpha=3, **options)
    network.apply_to()
    generator = torch.Generator().manual_seed(7)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model, network


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"conv_dim": 2, "conv_alpha": 1}, {"rs_lora": True}], ids=str)
@pytest.mark.parametrize("prefix", ["lycoris", "lora_unet"])
def test_delta_weights_are_those_of_lycoris(tmp_path: Path, options: dict[str, Any], prefix: str) -> None:
    from tests.dialects import pipelines

    model, network = trained_lycoris(algo="lora", **options)
    path = tmp_path / "a.safetensors"
    network.save_weights(str(path), None, {"ss_network_module": "lycoris.kohya"})
    with safe_open(path, "pt") as file:
        tensors = {f"{prefix}_{name.split('_', 1)[1]}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    adapter = dialects.open_adapter(saved(path, tensors))
    before = dict(pipelines.unet().named_parameters())
    network.restore()
    network.merge_to(1.0)
    after = dict(model.named_parameters())
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {module.removeprefix("unet.") for module in adapter.updates} == changed
    assert {update.kind for update in adapter.updates.values()} == {"lora", "conv"}
    for module, update in adapter.updates.items():
        name = module.removeprefix("unet.") + ".weight"
        delta = (after[name] - before[name]).detach()
        torch.testing.assert_close(update.delta_weight(), delta, rtol=1e-5, atol=1e-6, msg=module)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_diffusers_loads_what_is_written(name: str, tmp_path: Path) -> None:
    """Each with the names that sd-scripts gives it: diffusers' own for Stable Diffusion, the original's for SDXL."""
    pytest.importorskip("diffusers")
    from tests.dialects import pipelines
    from tests.dialects.test_diffusers import compare, dense
    from tests.interop import images

    pipe, found = images.pipeline(name), dict[str, torch.Tensor]()
    for component in images.components(pipe):
        targets = ["to_q", "to_out.0", "ff.net.2"] if component == "unet" else ["q_proj", "out_proj"]
        pipelines.train(getattr(pipe, component), targets)
        found |= pipelines.deltas(getattr(pipe, component), f"{component}.")
    made = {_of_clip(module): _factor(delta, i) for i, (module, delta) in enumerate(found.items())}
    dialects.save_adapter(Adapter(made), tmp_path / "a.safetensors", dialect="kohya")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert any("input_blocks" in key for key in file.keys()) == (name == "sdxl")  # noqa: SIM118
        assert any("down_blocks" in key for key in file.keys()) == (name == "sd")  # noqa: SIM118
    fresh = images.pipeline(name)
    fresh.load_lora_weights(tmp_path / "a.safetensors")
    loaded = {module: delta for component in images.components(fresh)
              for module, delta in pipelines.deltas(getattr(fresh, component), f"{component}.").items()}  # fmt: skip
    compare({_of_clip(module): delta for module, delta in loaded.items()}, dense(Adapter(made)))


def _of_clip(module: str) -> str:
    """Return a module's name with CLIP's `text_model`, which transformers 5 leaves out."""
    component, _, name = module.partition(".")
    return f"{component}.text_model.{name}" if name.startswith("encoder.") else module


def _factor(delta: torch.Tensor, seed: int) -> kinds.Update:
    """Return an update of a delta weight's shape, of rank 2 to 4 and alpha 3."""
    generator, rank = torch.Generator().manual_seed(seed), 2 + seed % 3
    parts = {
        "lora_A.weight": LazyTensor.of(torch.randn(rank, delta.shape[1], generator=generator)),
        "lora_B.weight": LazyTensor.of(torch.randn(delta.shape[0], rank, generator=generator)),
    }
    built: kinds.Update = kinds.get("lora").build(parts, 3 / rank, 3.0)
    return built


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_diffusers_turned_into_kohya_names(tmp_path: Path) -> None:
    """diffusers' converter writes alpha = rank whatever it was: the scale is 1."""
    pytest.importorskip("diffusers")
    from diffusers.utils import convert_state_dict_to_kohya
    from peft.utils import get_peft_model_state_dict

    from tests.dialects import pipelines
    from tests.dialects.test_diffusers import compare, dense

    model = pipelines.unet()
    pipelines.train(model, ["to_q", "to_out.0"])
    wanted = {f"unet.{module}": delta / 2.5 for module, delta in pipelines.deltas(model, "").items()}
    state = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(model).items()}
    kohya = {name: tensor.contiguous() for name, tensor in convert_state_dict_to_kohya(state).items()}
    compare(dense(dialects.open_adapter(saved(tmp_path / "a.safetensors", kohya))), wanted)


ATTENTION = "transformer_blocks_0_attn1_to_q"
SD = (f"down_blocks_0_attentions_0_{ATTENTION}", f"up_blocks_1_attentions_2_{ATTENTION}")
SDXL = (f"input_blocks_4_1_{ATTENTION}", f"output_blocks_0_1_{ATTENTION}", f"input_blocks_8_1_{ATTENTION}")
OPEN = (f"input_blocks_4_1_{ATTENTION}",)
"""A module of Stable Diffusion and of SDXL alike."""


@pytest.mark.parametrize("modules", [SD, SDXL, OPEN], ids=["sd", "sdxl", "open"])
def test_names_of_a_unet_come_back_from_the_originals(modules: tuple[str, ...], tmp_path: Path) -> None:
    """sd-scripts flattens diffusers' names of Stable Diffusion 1 and 2, and the original's of SDXL."""
    tensors = {f"lora_unet_{module}.lora_{side}.weight": torch.ones(shape) for module in modules
               for side, shape in (("down", (2, 8)), ("up", (8, 2)))}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "comfy.safetensors", to="comfy")
    convert(tmp_path / "comfy.safetensors", tmp_path / "back.safetensors", to="kohya")
    with safe_open(tmp_path / "comfy.safetensors", "pt") as file:
        assert all("input_blocks" in name or "output_blocks" in name for name in file.keys())  # noqa: SIM118
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        back = {name for name in file.keys() if not name.endswith(".alpha")}  # noqa: SIM118
    assert back == tensors.keys()


BLOCK = "down_blocks.1.attentions.0.transformer_blocks"


@pytest.mark.parametrize(
    ("module", "width", "flat"),
    [
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 2048, "middle_block_1_transformer_blocks_0_attn2"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 768, "mid_block_attentions_0_transformer_blocks_0"),
        (f"{BLOCK}.1.attn1.to_q", 640, "input_blocks_4_1_transformer_blocks_1_attn1"),
        (f"{BLOCK}.0.attn1.to_q", 640, "down_blocks_1_attentions_0_transformer_blocks_0_attn1"),
    ],
    ids=["texts of SDXL", "texts of SD", "a second block is SDXL's", "open"],
)
def test_widths_and_blocks_tell_one_module_of_a_unet(module: str, width: int, flat: str, tmp_path: Path) -> None:
    """What both UNets call alike sd-scripts calls by two names; where nothing tells them apart a warning says so."""
    tensors = {f"unet.{module}.lora_A.weight": torch.ones(2, width), f"unet.{module}.lora_B.weight": torch.ones(640, 2)}
    save_file(tensors, tmp_path / "a.safetensors")
    said: list[str] = []
    with warnings_to(said.append):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="kohya")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert all(name.startswith(f"lora_unet_{flat}") for name in file.keys())  # noqa: SIM118
    assert any("Stable Diffusion 1 and 2, SDXL share" in text for text in said) == (module == f"{BLOCK}.0.attn1.to_q")


def test_gemma_beside_lumina_has_the_prefix_of_sd_scripts(tmp_path: Path) -> None:
    """networks/lora_lumina.py calls its one text encoder `lora_te`, as networks/lora_anima.py does."""
    made = {"transformer.layers.0.attn.to_out.0": lora(1), "text_encoder.layers.3.self_attn.q_proj": lora(2),
            "transformer.layers.0.feed_forward.linear_1": lora(3)}  # fmt: skip
    dialects.save_adapter(Adapter(made), tmp_path / "a.safetensors", dialect="kohya")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        heads = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
    assert heads == {
        "lora_unet_layers_0_attention_out", "lora_unet_layers_0_feed_forward_w1", "lora_te_layers_3_self_attn_q_proj"
    }  # fmt: skip
    assert dialects.open_adapter(tmp_path / "a.safetensors").updates.keys() == {
        "diffusion_model.layers.0.attention.out", "diffusion_model.layers.0.feed_forward.w1",
        "text_encoder.layers.3.self_attn.q_proj",
    }  # fmt: skip


@pytest.mark.parametrize(("gone", "left"), [("lora_up", "lora_down"), ("lora_down", "lora_up")])
def test_a_factor_without_its_partner_is_told_in_the_files_own_names(gone: str, left: str, tmp_path: Path) -> None:
    tensors = named(f"{FLAT}_to_q", 0) | named(f"{FLAT}_to_k", 1)
    del tensors[f"{FLAT}_to_q.{gone}.weight"]
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(saved(tmp_path / "a.safetensors", tensors))
    assert refusal.value.problems == (
        f"{UNET}.to_q: {gone}.weight is missing, the partner of {FLAT}_to_q.{left}.weight",
    )


def test_strange_names_are_counted_among_all(tmp_path: Path) -> None:
    tensors = named(f"{FLAT}_to_q", 0) | named(f"{FLAT}_to_k", 1) | named("lora_unet_nonsense_block", 2)
    tensors |= named("lora_te_text_model_encoder_layers_0_mlp_fc1", 3)
    path = saved(tmp_path / "a.safetensors", tensors)
    save_file(
        {f"{UNET}.to_q.weight": torch.ones(12, 16), f"{UNET}.to_k.weight": torch.ones(12, 16)},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(path, base=Checkpoint.open(tmp_path / "b.safetensors"))
    (problem,) = [each for each in refusal.value.problems if "lora_unet_" in each]
    assert problem == "1 of 3 names under lora_unet_ is of no known family: lora_unet_nonsense_block"
