"""MLX-LM: transposed factors, a literal scale, one rank, stacked experts; the real mlx-lm writes and reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import dialects
from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.decisions import warnings_to
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage.lazy import LazyTensor

from .adapters import Q0, V0, factors, lora, opened, samples
from .contract import DialectContract


class TestContract(DialectContract):
    name = "mlx"
    refactors = True

    def adapters(self) -> Mapping[str, Adapter]:
        experts = {f"model.layers.0.mlp.experts.{i}.{name}": lora(i) for i in range(3) for name in ("gate_proj", "x")}
        return samples() | {"experts": Adapter({**experts, Q0: lora(9)})}

    def lossy(self) -> Mapping[str, tuple[Adapter, tuple[str, ...]]]:
        whole = {"lm_head.weight": LazyTensor.of(torch.ones(2, 2))}
        step = Step("combine", "loratools 1")
        some = Adapter({f"model.layers.0.mlp.experts.{i}.up_proj": lora(i) for i in (0, 2)})
        return {
            "whole": (Adapter({Q0: lora(1)}, whole), ("lm_head.weight",)),
            "sealed": (
                Adapter({Q0: lora(1)}, base=BaseIdentity(schema="blake3:0"), provenance=(step,)),
                ("base model", "provenance"),
            ),
            "a missing expert": (replace(some, updates={**some.updates, Q0: lora(4)}), tuple(some.updates)),
        }


def mlx_folder(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "adapters.safetensors")
    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0, "alpha": 16}
    document = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": parameters, "model": "org/b"} | config
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def state(module: str = Q0, seed: int = 0) -> dict[str, torch.Tensor]:
    A, B = factors(seed)
    return {f"{module}.lora_a": A.T.contiguous(), f"{module}.lora_b": B.T.contiguous()}


def test_the_scale_is_literal_and_an_alpha_beside_it_means_nothing(tmp_path: Path) -> None:
    adapter = dialects.open_adapter(mlx_folder(tmp_path / "a", state()))
    A, B = factors(0)
    update = adapter.updates[Q0]
    assert (update.scaling, update.alpha, update.rank, adapter.base) == (10.0, 40.0, 4, BaseIdentity("org/b"))
    torch.testing.assert_close(update.delta_weight().double(), 10 * (B.double() @ A.double()), rtol=1e-6, atol=1e-5)


def test_what_has_no_effect_is_said(tmp_path: Path) -> None:
    inner = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": [Q0], "gate": 2}
    _, warnings = opened(mlx_folder(tmp_path / "a", state(), lora_parameters=inner, use_hyper=True, train=True))
    assert [warning.partition(": ")[2] for warning in warnings] == [
        "fields that are not known here, and have no effect: lora_parameters.gate, use_hyper"
    ]
    _, warnings = opened(mlx_folder(tmp_path / "a", state()))
    assert [warning.partition(": ")[2] for warning in warnings] == [
        "lora_parameters.alpha = 16 has no effect in mlx-lm, where the scale counts"
    ]
    with pytest.raises(BadFile, match="problem") as refusal:
        dialects.open_adapter(mlx_folder(tmp_path / "a", state(), fine_tune_type="dora"))
    assert refusal.value.problems == (f"{Q0}: no magnitude (m), and the config says dora",)
    silent = mlx_folder(tmp_path / "a", state(), lora_parameters={"rank": 4})
    assert dialects.open_adapter(silent, alpha=6).updates[Q0].scaling == 1.5


def test_the_arguments_that_are_known_are_those_of_mlx_lm() -> None:
    trainer = pytest.importorskip("mlx_lm.lora")
    from loratools.dialects import mlx

    assert set(trainer.CONFIG_DEFAULTS) <= mlx._ARGUMENTS


def test_experts_of_a_switch_layer_are_read_one_by_one(tmp_path: Path) -> None:
    pairs = [factors(seed) for seed in range(3)]
    module = "model.layers.1.mlp.switch_mlp.gate_proj"
    tensors = {
        f"{module}.lora_a": torch.stack([A for A, _ in pairs]),
        f"{module}.lora_b": torch.stack([B for _, B in pairs]),
    }
    adapter = dialects.open_adapter(mlx_folder(tmp_path / "a", tensors))
    for i, (A, B) in enumerate(pairs):
        found = adapter.updates[f"model.layers.1.mlp.experts.{i}.gate_proj"].delta_weight()
        torch.testing.assert_close(found, 10 * (B @ A), rtol=1e-6, atol=1e-5)
    dialects.save_adapter(adapter, tmp_path / "b", dialect="mlx")
    again = load_file(tmp_path / "b" / "adapters.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_ranks_and_scalings_are_made_equal_without_changing_delta_weights(tmp_path: Path) -> None:
    adapter = Adapter({Q0: lora(2, 2, 2), V0: lora(4, 4, 16, torch.pi), "x": lora(3, 4, 8, torch.pi)})
    said: list[str] = []
    with warnings_to(said.append):
        dialects.save_adapter(adapter, tmp_path / "a", dialect="mlx")
        dialects.save_adapter(Adapter({V0: lora(4, 4, 16)}), tmp_path / "one", dialect="mlx")
    (note,) = said
    assert "so zeros fill 1 module to rank 4, the largest" in note
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {"keys": sorted(adapter.updates), "rank": 4, "scale": torch.pi, "dropout": 0.0}
    written = load_file(tmp_path / "a" / "adapters.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in written.items() if name.startswith(Q0)} == {
        f"{Q0}.lora_a": (10, 4),
        f"{Q0}.lora_b": (4, 12),
    }
    for module, update in dialects.open_adapter(tmp_path / "a").updates.items():
        torch.testing.assert_close(update.delta_weight(), adapter.updates[module].delta_weight(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"fine_tune_type": "full"}, UnsupportedAdapter, "whole weights"),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, BadFile, "lora_parameters.scale: expected a number, found None"),
        ({"lora_parameters": None}, BadFile, "found None"),
    ],
)
def test_configs_that_do_not_tell_the_scale(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        dialects.open_adapter(mlx_folder(tmp_path / "a", state(), **change))


def test_damaged_names_and_shapes_are_listed_all_at_once(tmp_path: Path) -> None:
    tensors = state() | state("lonely") | {"lora_c": torch.ones(1), "odd.lora_a": torch.ones(2, 2)}
    del tensors["lonely.lora_b"]
    tensors["odd.lora_b"] = torch.ones(2, 2, 2)
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(mlx_folder(tmp_path / "a", tensors))
    assert refusal.value.problems == (
        "lora_c: expected a name that ends in .lora_a, .lora_b or .m",
        "lonely: no lora_b, while its partner is there",
        "odd: lora_a (2, 2) and lora_b (2, 2, 2): expected (in, r) and (r, out)",
    )


def real_model() -> Any:
    pytest.importorskip("mlx.core")
    import mlx.core as mx
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(0)
    return Model(
        ModelArgs(
            model_type="llama", hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=64, tie_word_embeddings=False,
        )
    )  # fmt: skip


def real_adapter(folder: Path, model: Any, **parameters: Any) -> Path:
    """Let mlx-lm make an adapter with random factors and save it as its trainer does."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 4, "scale": 10.0, "dropout": 0.0} | parameters
    model.freeze()
    linear_to_lora_layers(model, 2, parameters)
    model.update(tree_map(lambda array: mx.random.normal(array.shape), model.trainable_parameters()))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, "model": "org/b"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def fused(model: Any) -> dict[str, torch.Tensor]:
    """Return all weights of a model, those with an adapter fused as mlx-lm fuses them."""
    from mlx.utils import tree_flatten, tree_unflatten

    layers = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(layers))
    return {name: torch.from_numpy(np.array(array)) for name, array in tree_flatten(model.parameters())}


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.down_proj"], ["lm_head", "model.embed_tokens"]])
def test_delta_weights_are_those_of_mlx_lm(tmp_path: Path, keys: list[str] | None) -> None:
    model = real_model()
    before = fused(real_model())
    path = real_adapter(tmp_path / "a", model, **({"keys": keys} if keys else {}))
    after = fused(model)
    adapter = dialects.open_adapter(path)
    assert adapter.dialect == "mlx"
    changed = {name.removesuffix(".weight") for name in after if not torch.equal(before[name], after[name])}
    assert adapter.updates.keys() == changed
    for module, update in adapter.updates.items():
        delta = after[f"{module}.weight"] - before[f"{module}.weight"]
        torch.testing.assert_close(update.delta_weight(), delta, rtol=1e-5, atol=5e-5)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_mlx_lm_loads_what_is_written(tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    model = real_model()
    before = fused(real_model())
    real_adapter(tmp_path / "a", model)
    adapter = dialects.open_adapter(tmp_path / "a")
    uneven = {module: update for i, (module, update) in enumerate(sorted(adapter.updates.items())) if i % 3} | {
        "lm_head": _random(64, 32, 2, 0.3)
    }
    dialects.save_adapter(replace(adapter, updates=uneven), tmp_path / "b", dialect="mlx")
    after = fused(load_adapters(real_model(), str(tmp_path / "b")))
    for name, tensor in after.items():
        wanted = before[name].double()
        if update := uneven.get(name.removesuffix(".weight")):
            wanted = wanted + update.delta_weight().double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=5e-5)


def _random(out: int, width: int, rank: int, scaling: float) -> Any:
    from loratools.adapter import kinds

    generator = torch.Generator().manual_seed(5)
    parts = {
        "lora_A.weight": LazyTensor.of(torch.randn(rank, width, generator=generator)),
        "lora_B.weight": LazyTensor.of(torch.randn(out, rank, generator=generator)),
    }
    return kinds.get("lora").build(parts, scaling, scaling * rank)
