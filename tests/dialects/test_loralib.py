"""loralib: alpha must be told, so must what a MergedLinear enables; the real library's layers are the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.errors import BadFile, LossyConversion, UnsupportedAdapter
from loratools.storage.checkpoint import Checkpoint

from .adapters import Q0, V0, expect, factors, fingerprint, lora, samples


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, path)
    return path


def state(module: str, seed: int) -> dict[str, torch.Tensor]:
    A, B = factors(seed)
    return {f"{module}.lora_A": A, f"{module}.lora_B": B}


def test_alpha_must_be_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", state(Q0, 0))
    with pytest.raises(UnsupportedAdapter, match="do not record alpha") as refusal:
        dialects.open_adapter(path)
    assert "--alpha" in str(refusal.value.hint)
    adapter = dialects.open_adapter(path, alpha=10)
    assert adapter.dialect == "loralib"
    expect(adapter, Q0, 0, 2.5)


def test_a_whole_state_dict_is_refused_for_it_may_hold_the_change_already(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", state(Q0, 0) | {f"{Q0}.weight": torch.ones(12, 10)})
    with pytest.raises(UnsupportedAdapter, match="applied twice"):
        dialects.open_adapter(path, alpha=1)


def test_faults_are_listed(tmp_path: Path) -> None:
    tensors = state(Q0, 0) | {"x.lora_A": torch.ones(4, 3), "y.lora_A": torch.ones(4, 3), "y.lora_B": torch.ones(5, 3)}
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(saved(tmp_path / "a.pt", tensors), alpha=1)
    assert refusal.value.problems == (
        "x: no lora_B, while its partner is there",
        "y: lora_A (4, 3) and lora_B (5, 3) do not share a rank",
    )


def test_a_pickle_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n" + "x" * 1200)
    with pytest.raises(BadFile, match="Git-LFS pointer"):
        dialects.open_adapter(tmp_path / "a.pt")


@pytest.mark.parametrize("label", sorted(samples()))
def test_what_is_lost_is_said_and_the_rest_comes_back(tmp_path: Path, label: str) -> None:
    adapter = samples()[label]
    with pytest.raises(LossyConversion) as refusal:
        dialects.save_adapter(adapter, tmp_path / "a.pt", dialect="loralib")
    assert not (tmp_path / "a.pt").exists()
    lost = dialects.save_adapter(adapter, tmp_path / "a.pt", dialect="loralib", allow_loss=True)
    assert refusal.value.problems == tuple(map(str, lost))
    assert {loss.where for loss in lost} == {"alpha"} | ({"base model"} if adapter.base else set())
    told = next(loss.what for loss in lost if loss.where == "alpha").rpartition(" ")[2]
    again = dialects.open_adapter(tmp_path / "a.pt", alpha=float(told))
    assert again.updates.keys() == adapter.updates.keys()
    for module, update in adapter.updates.items():
        torch.testing.assert_close(again.updates[module].delta_weight(), update.delta_weight(), rtol=1e-5, atol=1e-5)
    dialects.save_adapter(adapter, tmp_path / "twin.pt", dialect="loralib", allow_loss=True)
    assert list(fingerprint(tmp_path / "twin.pt").values()) == list(fingerprint(tmp_path / "a.pt").values())


def test_what_is_enabled_must_be_told(tmp_path: Path) -> None:
    tensors = {"qkv.lora_A": torch.randn(4, 8), "qkv.lora_B": torch.randn(16, 2)}
    path = saved(tmp_path / "a.pt", tensors)
    with pytest.raises(UnsupportedAdapter) as refusal:
        dialects.open_adapter(path, alpha=4)
    assert refusal.value.problems == (
        "qkv: a MergedLinear with 2 enabled projections of unknown places; none were told",
    )
    with pytest.raises(UnsupportedAdapter, match="which projections") as refusal:
        dialects.open_adapter(path, alpha=4, enabled=(True, True, True))
    update = dialects.open_adapter(path, alpha=4, enabled=(True, False, True)).updates["qkv"]
    assert (update.shape, update.rank, update.scaling) == ((24, 8), 4, 2.0)


def trained(layer: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return layer


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "merged", "merged all", "embedding", "conv"])
def test_delta_weights_are_those_of_loralib(tmp_path: Path, kind: str) -> None:
    library: Any = pytest.importorskip("loralib")
    from safetensors.torch import save_file

    options: dict[str, Any] = {"r": 2, "lora_alpha": 5}
    enabled = {"merged": (True, False, True), "merged all": (True, True)}.get(kind)
    layers = {
        "linear": lambda: library.Linear(8, 6, **options),
        "merged": lambda: library.MergedLinear(8, 24, enable_lora=[True, False, True], **options),
        "merged all": lambda: library.MergedLinear(8, 24, enable_lora=[True, True], **options),
        "embedding": lambda: library.Embedding(9, 6, **options),
        "conv": lambda: library.Conv2d(4, 6, kernel_size=3, **options),
    }
    layer = trained(layers[kind]())
    model = torch.nn.ModuleDict({"wte" if kind == "embedding" else "layer": layer})
    torch.save(library.lora_state_dict(model), tmp_path / "a.pt")
    held = layer.conv if kind == "conv" else layer
    before = held.weight.detach().clone()
    name = "wte" if kind == "embedding" else "layer"
    weights = f"{name}.conv.weight" if kind == "conv" else f"{name}.weight"
    save_file({weights: before}, tmp_path / "base.safetensors")
    layer.train(True)
    layer.eval()  # merges
    delta = held.weight.detach() - before
    base = Checkpoint.open(tmp_path / "base.safetensors")
    adapter = dialects.open_adapter(tmp_path / "a.pt", alpha=5, base=base, enabled=enabled)
    update = adapter.updates[name]
    assert update.kind == {"embedding": "embedding", "conv": "conv"}.get(kind, "lora")
    torch.testing.assert_close(update.delta_weight(), delta, rtol=1e-5, atol=5e-6)


@pytest.mark.interop
def test_loralib_loads_what_is_written(tmp_path: Path) -> None:
    library: Any = pytest.importorskip("loralib")
    adapter = Adapter({"a": lora(1, 4, 8), "b": lora(2, 4, 8)})
    dialects.save_adapter(adapter, tmp_path / "x.pt", dialect="loralib", allow_loss=True)
    model = torch.nn.ModuleDict({name: library.Linear(10, 12, r=4, lora_alpha=8) for name in "ab"})
    before = {name: layer.weight.detach().clone() for name, layer in model.items()}  # type: ignore[operator]
    missing = model.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True), strict=False)
    assert not missing.unexpected_keys
    model.eval()
    for name, update in adapter.updates.items():
        layer: Any = model[name]
        torch.testing.assert_close(layer.weight - before[name], update.delta_weight(), rtol=1e-5, atol=5e-6)


def test_embeddings_are_told_by_name_where_there_is_no_base(tmp_path: Path) -> None:
    tensors = {"wte.lora_A": torch.randn(2, 9), "wte.lora_B": torch.randn(6, 2), **state(V0, 1)}
    tensors["h.0.mlp.bias"] = torch.ones(3)
    adapter = dialects.open_adapter(saved(tmp_path / "a.pt", tensors), alpha=2)
    assert {module: update.kind for module, update in adapter.updates.items()} == {"wte": "embedding", V0: "lora"}
    assert list(adapter.replacements) == ["h.0.mlp.bias"]
