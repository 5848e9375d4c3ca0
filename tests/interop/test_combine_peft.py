"""Combined adapters in PEFT: they load and merge; its dense methods give the same numbers; what it does otherwise."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.dialects import open_adapter
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Fixed
from loratools.surgery.combine import combine
from loratools.surgery.merge import merge
from tests.interop.models import FAMILIES, adapt, load, merge_by_peft

pytestmark = pytest.mark.interop
peft = pytest.importorskip("peft")

FULL = Ranks(Fixed(32))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[Path]]:
    """A tiny Llama, its folder, and three adapters: other ranks, scalings and targets."""
    folder = tmp_path_factory.mktemp("combine")
    model = FAMILIES["llama"].build()
    model.save_pretrained(folder / "base")
    adapters = []
    for i, (targets, settings) in enumerate(
        [
            (["q_proj", "v_proj"], {}),
            (["q_proj", "down_proj"], {"r": 6, "use_rslora": True}),
            (["q_proj", "v_proj"], {"r": 3, "lora_alpha": 2, "rank_pattern": {"v_proj": 5}}),
        ]
    ):
        tuned = adapt(model, targets, **settings)
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
        tuned.save_pretrained(folder / f"adapter{i}")
        adapters.append(folder / f"adapter{i}")
    return model, folder / "base", adapters


def deltas_of_peft(
    model: Any, adapters: list[Path], weights: list[float], kind: str, seed: int = 0, **more: Any
) -> dict[str, Tensor]:
    """Return ΔW of every module that `add_weighted_adapter` makes, at full rank."""
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model), adapters[0], adapter_name="a0")
    for i, folder in enumerate(adapters[1:], 1):
        tuned.load_adapter(folder, adapter_name=f"a{i}")
    torch.manual_seed(seed)
    names = [f"a{i}" for i in range(len(adapters))]
    tuned.add_weighted_adapter(names, weights, "sum", combination_type=kind, **more)
    changes = {}
    for name, layer in tuned.named_modules():
        if hasattr(layer, "lora_A") and "sum" in layer.lora_A:
            B, A = layer.lora_B["sum"].weight.detach(), layer.lora_A["sum"].weight.detach()
            # Where a module has fewer rows than svd_rank, PEFT keeps rows of Vh that no singular value belongs to.
            changes[name.removeprefix("base_model.model.")] = B @ A[: B.shape[1]]
    return changes


def deltas(folder: Path) -> dict[str, Tensor]:
    return {module: update.delta_weight() for module, update in open_adapter(folder).updates.items()}


def close(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    assert ours.keys() == expected.keys()
    norm = sum(float(D.square().sum()) for D in expected.values()) ** 0.5
    error = sum(float((ours[m] - expected[m]).square().sum()) for m in expected) ** 0.5
    return error <= tolerance * norm


def test_the_combined_adapter_is_both(llama: Any, tmp_path: Path) -> None:
    model, base, adapters = llama
    weights = [0.7, -0.4, 1.5]
    combine(adapters, tmp_path / "sum", weights=weights)
    merge(base, adapters, tmp_path / "both", weights=weights)
    merge(base, [tmp_path / "sum"], tmp_path / "once")
    by_peft = merge_by_peft(model, tmp_path / "sum")
    by_peft.save_pretrained(tmp_path / "peft")
    both, once, theirs = (load(tmp_path / name) for name in ("both", "once", "peft"))
    assert any(not torch.equal(both[name], W) for name, W in load(base).items())
    for name, W in both.items():
        assert torch.allclose(once[name], W, rtol=0, atol=2e-6), name
        assert torch.allclose(theirs[name], W, rtol=0, atol=2e-6), name


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -0.4, 1.5]])
def test_svd_of_peft_is_linear_here(llama: Any, weights: list[float], tmp_path: Path) -> None:
    model, _, adapters = llama
    plain = [adapters[0], adapters[2]]  # PEFT takes use_rslora from the first adapter for the sum
    combine(plain, tmp_path / "sum", weights=weights[:2])
    expected = deltas_of_peft(model, plain, weights[:2], "svd", svd_rank=32)
    assert close(deltas(tmp_path / "sum"), expected)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.8, -0.5], [-1.0, 2.0]])
@pytest.mark.parametrize(("method", "kind"), [("ties", "ties_svd"), ("magnitude_prune", "magnitude_prune_svd")])
def test_pruning_like_peft(llama: Any, method: str, kind: str, weights: list[float], tmp_path: Path) -> None:
    model, _, adapters = llama
    pair = [adapters[0], adapters[2]]
    combine(pair, tmp_path / "sum", weights=weights, method=method, density=0.4, like="peft", ranks=FULL)
    expected = deltas_of_peft(model, pair, weights, kind, svd_rank=32, density=0.4)
    assert close(deltas(tmp_path / "sum"), expected)


@pytest.mark.parametrize(("method", "kind"), [("dare", "dare_linear"), ("dare_ties", "dare_ties")])
def test_the_same_masks_as_peft(llama: Any, method: str, kind: str, tmp_path: Path) -> None:
    # add_weighted_adapter first draws the factors of its new adapter from the same stream, so that no seed before it
    # tells its masks; its own functions are called here, module by module, from the seed on.
    from peft.utils import merge_utils

    model, _, adapters = llama
    pair, weights = [adapters[0], adapters[2]], [0.8, -0.5]
    combine(pair, tmp_path / "sum", weights=weights, method=method, density=0.4, seed=11, like="peft", ranks=FULL)
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model), pair[0], adapter_name="a0")
    tuned.load_adapter(pair[1], adapter_name="a1")
    torch.manual_seed(11)
    expected = {}
    for name, layer in tuned.named_modules():
        if hasattr(layer, "get_delta_weight"):
            changes = [layer.get_delta_weight(adapter).detach() for adapter in ("a0", "a1")]
            merged = getattr(merge_utils, kind)(changes, torch.tensor(weights), 0.4)
            expected[name.removeprefix("base_model.model.")] = merged
    assert len(expected) == 4
    assert close(deltas(tmp_path / "sum"), expected)
    combine(pair, tmp_path / "other", weights=weights, method=method, density=0.4, seed=11, ranks=FULL)
    assert not close(deltas(tmp_path / "other"), expected, 0.1)


def test_ties_differs_from_peft_where_weights_differ(llama: Any, tmp_path: Path) -> None:
    model, _, adapters = llama
    pair = [adapters[0], adapters[2]]
    expected = deltas_of_peft(model, pair, [1.0, -1.0], "ties_svd", svd_rank=32, density=0.4)
    combine(pair, tmp_path / "sum", weights=[1, -1], method="ties", density=0.4, ranks=FULL)
    assert not close(deltas(tmp_path / "sum"), expected, 0.1)
    same = deltas_of_peft(model, pair, [1.0, 1.0], "ties_svd", svd_rank=32, density=0.4)
    combine(pair, tmp_path / "even", method="ties", density=0.4, ranks=FULL)
    assert close(deltas(tmp_path / "even"), same)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_of_a_changed_base_as_peft_converts_it(llama: Any, init: str, tmp_path: Path) -> None:
    model, _, _ = llama
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "start")
    tuned.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(3)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    trained = {name: W.clone() for name, W in copy.deepcopy(tuned).merge_and_unload().state_dict().items()}
    tuned.save_pretrained(tmp_path / "trained")
    report = combine([tmp_path / "trained"], tmp_path / "plain", initial=tmp_path / "start")
    assert {share.rank for share in report.shares} == {8}
    merged = merge_by_peft(model, tmp_path / "plain").state_dict()
    for name, W in trained.items():
        assert torch.allclose(merged[name], W, rtol=0, atol=5e-6), name
