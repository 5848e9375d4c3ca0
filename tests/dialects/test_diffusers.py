"""diffusers: three spellings, the config in the header, components; the real library writes and loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.errors import BadFile
from loratools.storage.lazy import LazyTensor
from tests.dialects.adapters import Q0, expect, factors, lora, opened, samples
from tests.dialects.contract import DialectContract

UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CLIP = "text_encoder.text_model.encoder.layers.0.self_attn"


class TestContract(DialectContract):
    name = "diffusers"

    def adapters(self) -> Mapping[str, Adapter]:
        mixed = {f"{UNET}.to_q": lora(1), f"{UNET}.to_out.0": lora(2, 2, 3), f"{CLIP}.q_proj": lora(3, 3, 5, 0.7)}
        return samples() | {"components": Adapter(mixed, base=BaseIdentity("org/sd"))}

    def lossy(self) -> Mapping[str, tuple[Adapter, tuple[str, ...]]]:
        whole = {"unet.conv_in.weight": LazyTensor.of(torch.ones(2, 2))}
        return {
            "whole": (Adapter({f"{UNET}.to_q": lora(1)}, whole), ("unet.conv_in.weight",)),
            "no component": (Adapter({f"{UNET}.to_q": lora(1), Q0: lora(2)}), (Q0,)),
        }


class TestSingleFile(TestContract):
    suffix = ".safetensors"


def named(module: str, down: str, up: str, seed: int) -> dict[str, torch.Tensor]:
    A, B = factors(seed)
    return {f"{module}{down}": A, f"{module}{up}": B}


def test_older_spellings(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = (
        named(f"{UNET}.to_q", ".lora.down.weight", ".lora.up.weight", 0)
        | named(f"{UNET}.processor.to_k", "_lora.down.weight", "_lora.up.weight", 1)
        | named(f"{UNET}.processor.to_out", "_lora.down.weight", "_lora.up.weight", 2)
        | named(f"{CLIP}.q_proj", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", 3)
        | named(f"{CLIP}.to_out", "_lora.down.weight", "_lora.up.weight", 4)
        | named(f"{CLIP}.v_proj", ".lora_A.default.weight", ".lora_B.default.weight", 5)
        | named(f"{UNET}.to_v", ".lora_A.weight", ".lora_B.weight", 6)
        | {f"{UNET}.to_v.alpha": torch.tensor(2.0), f"{UNET}.to_q.alpha": torch.tensor(8.0, dtype=torch.bfloat16)}
    )
    save_file(tensors, path)
    adapter, warnings = opened(path)
    scalings = {f"{UNET}.to_q": 2.0, f"{UNET}.to_v": 0.5}
    order = ("to_q", "to_k", "to_out.0", "q_proj", "out_proj", "v_proj", "to_v")
    for seed, last in enumerate(order):
        module = f"{CLIP if 'proj' in last else UNET}.{last}"
        expect(adapter, module, seed, scalings.get(module, 1.0))
    unread, warning = warnings
    assert unread.startswith(
        f"{path}: the scale of {UNET}.to_q, {UNET}.to_v is that of its tensors of alpha; diffusers"
    )
    assert warning.startswith(f"{path}: the file records no scale for {CLIP}.out_proj, {CLIP}.q_proj")
    assert warning.endswith("and 2 more; 1 is applied, as loaders do")
    assert dialects.open_adapter(tmp_path).updates.keys() == adapter.updates.keys()


def test_what_a_model_saves_has_no_component(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    module = UNET.removeprefix("unet.")
    save_file(named(f"{module}.processor.to_v", "_lora.down.weight", "_lora.up.weight", 7), path)
    assert dialects.detect(dialects.Listing.of(path))[1].reason.startswith("2 of the tensors in x.safetensors")
    expect(dialects.open_adapter(path), f"{module}.to_v", 7, 1.0)


def test_bare_names_of_a_language_model_are_pefts(tmp_path: Path) -> None:
    save_file(named(Q0, ".lora_A.weight", ".lora_B.weight", 1), tmp_path / "x.safetensors")
    adapter = dialects.open_adapter(tmp_path / "x.safetensors")
    assert (adapter.dialect, adapter.updates[Q0].scaling) == ("peft", 1.0)


def header_config(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["lora_adapter_metadata"])
        return found


def test_the_header_holds_a_config_for_each_component(tmp_path: Path) -> None:
    adapter = Adapter({f"{UNET}.to_q": lora(1), f"{UNET}.to_k": lora(2, 2, 3), f"{CLIP}.q_proj": lora(3)})
    dialects.save_adapter(adapter, tmp_path / "a.safetensors", dialect="diffusers")
    config = header_config(tmp_path / "a.safetensors")
    assert config["unet.rank_pattern"] == {"^" + f"{UNET}.to_q".removeprefix("unet.").replace(".", r"\."): 4}
    assert config["text_encoder.target_modules"] == ["encoder.layers.0.self_attn.q_proj"]
    assert (config["text_encoder.r"], config["text_encoder.lora_alpha"]) == (4, 8)


def test_a_scale_that_only_the_header_states_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scaled = Adapter({f"{UNET}.to_q": lora(1), f"{UNET}.to_k": lora(2)})
    plain = Adapter({name: replace(update, scaling=1.0) for name, update in scaled.updates.items()})
    for name, adapter in {"a": scaled, "b": plain}.items():
        dialects.save_adapter(adapter, tmp_path / f"{name}.safetensors", dialect="diffusers")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        f"{tmp_path / 'a.safetensors'}: the scale of 2 modules (2, {UNET}.to_k) stands in the header"
    )
    assert "ComfyUI" in said
    # What a reader has that ignores the header: another change, by that scale.
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "bare.safetensors")
    scales = [
        dialects.open_adapter(tmp_path / f"{n}.safetensors").updates[f"{UNET}.to_q"].scaling for n in ("a", "bare")
    ]
    assert scales == [2.0, 1.0]


def test_what_contradicts_the_header_is_listed(tmp_path: Path) -> None:
    config = {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"]}
    tensors = named(f"{UNET}.to_q", ".lora_A.weight", ".lora_B.weight", 1)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(tmp_path / "a.safetensors")
    assert refusal.value.problems == (f"{UNET}.to_q: its tensors have rank 4, the config says 2",)
    save_file({**tensors, "strange": torch.ones(1), "unet.x.alpha": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(tmp_path / "b.safetensors")
    assert refusal.value.problems == (
        "strange: no name that diffusers gives to a part of an adapter",
        "unet.x: an alpha without factors",
    )


CASES: dict[str, tuple[str, dict[str, tuple[list[str], dict[str, Any]]]]] = {
    "sd": ("sd", {
        "unet": (["to_q", "to_k", "to_out.0", "proj_in"], {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 3}}),
        "text_encoder": (["q_proj", "fc1"], {"lora_alpha": 6, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}}),
    }),
    "attention": ("sd", {"unet": (["to_q", "to_out.0"], {}), "text_encoder": (["q_proj", "out_proj"], {"r": 2})}),
    "sdxl": ("sdxl", {
        "unet": (["to_q", "to_out.0", "ff.net.0.proj"], {"rank_pattern": {"to_out.0": 3}}),
        "text_encoder": (["v_proj"], {}),
        "text_encoder_2": (["v_proj", "out_proj"], {"lora_alpha": 3, "alpha_pattern": {"out_proj": 7}}),
    }),
    "conv": ("sd", {"unet": (["conv1", "conv_in", "to_q"], {"r": 2})}),
    "rslora": ("sd", {"unet": (["to_v"], {"use_rslora": True, "r": 3})}),
    "flux": ("flux", {"transformer": (["to_q", "add_k_proj", "proj_mlp", "proj_out"], {"lora_alpha": 3})}),
}  # fmt: skip


def trained(case: str) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """Return a pipeline with random adapters, the arguments that save them, and all ΔW."""
    pytest.importorskip("diffusers")
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    from tests.dialects import pipelines

    name, parts = CASES[case]
    pipe = pipelines.pipeline(name)
    layers, wanted, models = {}, {}, {}
    for component, (targets, config) in parts.items():
        model = models[component] = getattr(pipe, component)
        pipelines.train(model, targets, **config)
        layers[f"{component}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="default")
        wanted |= pipelines.deltas(model, f"{component}.")
    return pipe, layers | {"_metadata": _collate_lora_metadata(models)}, wanted


def compare(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for module, delta in wanted.items():
        torch.testing.assert_close(found[module], delta, rtol=1e-6, atol=1e-6, msg=module)


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {module: update.delta_weight() for module, update in adapter.updates.items()}


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_delta_weights_are_those_of_diffusers(tmp_path: Path, case: str) -> None:
    pipe, layers, wanted = trained(case)
    metadata = layers.pop("_metadata")
    pipe.save_lora_weights(tmp_path, **layers, **metadata)
    assert header_config(tmp_path / "pytorch_lora_weights.safetensors")
    adapter = dialects.open_adapter(tmp_path)
    assert adapter.dialect == "diffusers"
    compare(dense(adapter), wanted)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_diffusers_loads_what_is_written(tmp_path: Path, case: str) -> None:
    from tests.dialects import pipelines

    pipe, layers, wanted = trained(case)
    metadata = layers.pop("_metadata")
    pipe.save_lora_weights(tmp_path / "a", **layers, **metadata)
    dialects.save_adapter(dialects.open_adapter(tmp_path / "a"), tmp_path / "b", dialect="diffusers")
    compare(pipelines.loaded(CASES[case][0], tmp_path / "b"), wanted)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_an_older_script_has_the_scale_that_diffusers_applies(tmp_path: Path) -> None:
    """No metadata, old names: the trained scale of 10/4 is lost, and diffusers applies 1.

    (Only attention: a mixture of spellings, as the script gives for other layers, diffusers loads in part.)
    """
    from tests.dialects import pipelines

    pipe, layers, wanted = trained("attention")
    from diffusers.utils import convert_state_dict_to_diffusers

    layers.pop("_metadata")
    pipe.save_lora_weights(tmp_path, **{name: convert_state_dict_to_diffusers(part) for name, part in layers.items()})
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert any(name.endswith(".lora.down.weight") for name in file.keys())  # noqa: SIM118
    adapter, warnings = opened(tmp_path)
    compare(dense(adapter), pipelines.loaded("sd", tmp_path))
    module = next(module for module in wanted if module.endswith("to_out.0"))
    torch.testing.assert_close(adapter.updates[module].delta_weight() * 2.5, wanted[module], rtol=1e-6, atol=1e-6)
    assert "records no scale" in warnings[0]


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", [[2.0], [2.0, 3.0, 3.0], [3.0, 3.0, None], [None, 5.0, 2.0, 5.0]])
@pytest.mark.parametrize("old", [False, True])
def test_alphas_of_a_transformer_are_those_that_diffusers_applies(
    tmp_path: Path, given: list[float | None], old: bool
) -> None:
    from tests.dialects import pipelines

    _, layers, _ = trained("flux")
    tensors = {
        f"transformer.{name}".replace(".lora_A.", ".lora.down." if old else ".lora_A.").replace(
            ".lora_B.", ".lora.up." if old else ".lora_B."
        ): value.contiguous()
        for name, value in layers["transformer_lora_layers"].items()
    }
    modules = sorted({name.removeprefix("transformer.").partition(".lora")[0] for name in tensors})
    stated = {f"transformer.{module}.alpha": given[i % len(given)] for i, module in enumerate(modules)}
    tensors |= {name: torch.tensor(alpha) for name, alpha in stated.items() if alpha is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, warnings = opened(tmp_path / "a.safetensors")
    compare(dense(adapter), pipelines.loaded("flux", tmp_path / "a.safetensors"))
    assert [text for text in warnings if "is taken, that of most others, as diffusers does" in text] == (
        warnings if None in given else []
    )
    usual = max({alpha for alpha in given if alpha}, key=given.count)
    wanted = {name.removesuffix(".alpha"): (alpha or usual) / 4 for name, alpha in stated.items()}
    assert {module: update.scaling for module, update in adapter.updates.items()} == wanted
    dialects.save_adapter(adapter, tmp_path / "b", dialect="diffusers")
    compare(pipelines.loaded("flux", tmp_path / "b"), dense(adapter))


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_of_a_unet_diffusers_reads_no_alphas_and_that_is_said(tmp_path: Path) -> None:
    from tests.dialects import pipelines

    _, layers, _ = trained("attention")
    tensors = {
        f"unet.{name}".replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): value.contiguous()
        for name, value in layers["unet_lora_layers"].items()
    }
    for ending in (".lora.alpha", ".alpha"):
        modules = {name.partition(".lora")[0] for name in tensors if "alpha" not in name}
        save_file(tensors | {f"{module}{ending}": torch.tensor(2.0) for module in modules}, tmp_path / "a.safetensors")
        adapter, warnings = opened(tmp_path / "a.safetensors")
        assert {update.scaling for update in adapter.updates.values()} == {0.5}
        assert "diffusers applies 1 or refuses the file, for it reads no alphas of a unet" in "".join(warnings)
        if ending == ".alpha":
            with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
                pipelines.loaded("sd", tmp_path / "a.safetensors")
        else:
            found = pipelines.loaded("sd", tmp_path / "a.safetensors")
            compare({module: delta * 0.5 for module, delta in found.items()}, dense(adapter))
        dialects.save_adapter(adapter, tmp_path / f"b{ending}", dialect="diffusers")
        compare(pipelines.loaded("sd", tmp_path / f"b{ending}"), dense(adapter))
