"""What `compare` and `inspect --spectrum` measure, for every kind: W' − W of PEFT and of LyCORIS in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loratools.surgery.compare import Comparison, compare
from loratools.surgery.spectrum import AdapterSpectrum, spectrum
from tests.interop.models import FAMILIES, load, merge_by_peft
from tests.interop.test_kinds import MIXED, mixed, save_mixed, train
from tests.interop.test_lycoris import CASES, module_of

pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

Changes = Mapping[str, Tensor]
"""Tensor of the base -> W' − W in float64."""

CONV1D = ("c_attn", "c_proj", "c_fc")


def by_peft(base: Any, folder: Path, adapter: Path) -> dict[str, Tensor]:
    """Return W' − W of every tensor that PEFT's merge of the model in float64 changes."""
    merged = merge_by_peft(copy.deepcopy(base).double(), adapter).state_dict()
    before = load(folder)
    changes = {name: merged[name].double() - W.double() for name, W in before.items() if merged[name].shape == W.shape}
    return {name: D for name, D in changes.items() if bool(D.any())}


def matrix_of(changes: Changes, module: str, shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Return the change of a module as a matrix with its outputs as rows; GPT-2 stores them as columns."""
    module = module.replace(".base_layer", "")
    name = next(name for name in (f"{module}.weight", module, f"{module}.in_proj_weight") if name in changes)
    D = changes[name]
    D = D.T if module.rpartition(".")[2] in CONV1D else D.reshape(len(D), -1)
    assert tuple(D.shape) == shape
    return D.numpy()


def check_spectrum(found: AdapterSpectrum, changes: Changes, off: float = 1e-9) -> None:
    assert (found.left_out, found.in_part) == ({}, {})
    assert len(found.modules) == len(changes)
    assert found.norm == pytest.approx(math.sqrt(sum(float(D.square().sum()) for D in changes.values())), rel=off)
    for one in found.modules:
        sigma = np.linalg.svd(matrix_of(changes, one.module, one.shape))[1]
        assert one.norm == pytest.approx(float(np.linalg.norm(sigma)), rel=off), one.module
        np.testing.assert_allclose(one.sigma, sigma[: len(one.sigma)], atol=off * sigma[0], err_msg=one.module)
        assert not (sigma[len(one.sigma) :] > off * sigma[0]).any()
        assert one.stable_rank == pytest.approx(float((sigma**2).sum() / sigma[0] ** 2), rel=10 * off)


def check_comparison(found: Comparison, first: Changes, second: Changes, off: float = 1e-9) -> None:
    assert first.keys() == second.keys()
    assert (len(found.modules), found.only) == (len(first), ((), ()))
    inner = sum(float((first[name] * second[name]).sum()) for name in first)
    norms = [math.sqrt(sum(float(D.square().sum()) for D in side.values())) for side in (first, second)]
    assert found.norms == pytest.approx(norms, rel=off)
    assert found.cosine == pytest.approx(inner / norms[0] / norms[1], abs=off)
    distance = math.sqrt(sum(float((first[name] - second[name]).square().sum()) for name in first))
    assert found.distance == pytest.approx(distance / norms[0], rel=10 * off)
    for one in found.modules:
        D1, D2 = (matrix_of(side, one.module, one.shape) for side in (first, second))
        n1, n2 = np.linalg.norm(D1), np.linalg.norm(D2)
        assert one.norms == pytest.approx((n1, n2), rel=off)
        assert one.cosine == pytest.approx(np.vdot(D1, D2) / n1 / n2, abs=off)
        (U1, S1, V1), (U2, S2, V2) = np.linalg.svd(D1), np.linalg.svd(D2)
        i, j = one.ranks
        gaps = [1 - (S[k] if k < len(S) else 0) / S[k - 1] for S, k in ((S1, i), (S2, j))]
        for own, angles, grid in (
            ((V1[:i], V2[:j]), one.input_angles, one.input_similarity),
            ((U1.T[:i], U2.T[:j]), one.output_angles, one.output_similarity),
        ):
            cosines = np.linalg.svd(own[0] @ own[1].T)[1].clip(0, 1)
            assert min(gaps) > 1e-6  # or the subspace is not one
            np.testing.assert_allclose(np.cos(angles), cosines, atol=off / min(gaps))
            assert grid[i - 1][j - 1] == pytest.approx(float((cosines**2).sum()) / min(i, j), abs=off / min(gaps))


@pytest.mark.parametrize("name", sorted(MIXED))
def test_a_module_of_every_kind(name: str, tmp_path: Path) -> None:
    base = mixed()
    folder = save_mixed(tmp_path / "base", base)
    changes = []
    for i in (0, 1):
        train(base, 7 + i, **MIXED[name][0]).save_pretrained(tmp_path / f"{i}")
        changes.append(by_peft(base, folder, tmp_path / f"{i}"))
        check_spectrum(spectrum(tmp_path / f"{i}", base=folder), changes[-1])
    check_comparison(compare(tmp_path / "0", tmp_path / "1", folder), *changes)


OFF = {"DiagOFTModule": 2e-5, "FullModule": 1e-6}
"""What LyCORIS computes or stores with the rounding of float32, and how far it may be off."""

ON_FAMILIES: dict[str, dict[str, Any]] = {
    "lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True},
    "tokens": {"trainable_token_indices": [5, 2, 63]},
}  # fmt: skip


@pytest.mark.sweep(8)
@pytest.mark.parametrize("settings", sorted(ON_FAMILIES))
@pytest.mark.parametrize("family", ["gpt2", "gpt2-square", "llama", "qwen2", "phi3", "bert", "t5", "bloom"])
def test_families(family: str, settings: str, tmp_path: Path) -> None:
    """GPT-2 stores weights [in, out], Phi-3 and BLOOM q, k and v in one, and most tie the head to the embedding."""
    base, changes = FAMILIES[family].build(), []
    base.save_pretrained(tmp_path / "base")
    for i in (0, 1):
        given = {"target_modules": list(FAMILIES[family].targets), **ON_FAMILIES[settings]}
        train(base, 7 + i, **given).save_pretrained(tmp_path / f"{i}")
        changes.append(by_peft(base, tmp_path / "base", tmp_path / f"{i}"))
    check_spectrum(spectrum(tmp_path / "0", base=tmp_path / "base"), changes[0])
    check_comparison(compare(tmp_path / "0", tmp_path / "1", tmp_path / "base"), *changes)


def test_heads_and_embeddings_of_a_tied_model(tmp_path: Path) -> None:
    """The head is no tensor of the base: it starts as the embedding."""
    base = FAMILIES["llama"].build(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    train(base, target_modules=["lm_head", "q_proj"], use_dora=True).save_pretrained(tmp_path / "a")
    untied = FAMILIES["llama"].build(tie_word_embeddings=False)
    untied.load_state_dict(base.state_dict())
    merged = merge_by_peft(copy.deepcopy(untied).double(), tmp_path / "a").state_dict()
    changes = {name: D for name, W in untied.state_dict().items() if bool((D := merged[name] - W.double()).any())}
    assert "lm_head.weight" in changes
    check_spectrum(spectrum(tmp_path / "a", base=tmp_path / "base"), changes)


def weight_by_forward(module: Any, layer: nn.Module) -> Tensor:
    """Return the weight with which the layer does what `module` does, one input at a time: (out, in, …)."""
    if isinstance(layer, nn.LayerNorm):
        x = torch.randn(3, len(layer.weight), dtype=torch.float64)
        plain = nn.functional.layer_norm(x, x.shape[1:], eps=layer.eps)
        bias = module(torch.ones_like(x))[0]  # of which the normalized is 0
        return ((module(x) - bias) / plain)[0]
    if isinstance(layer, nn.Linear):
        units = torch.eye(layer.in_features, dtype=layer.weight.dtype)
        return (module(units) - module(torch.zeros_like(units[:1]))).T
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    kernel, middle = layer.kernel_size, (..., *(int(p) for p in layer.padding))  # where the output sees all of it
    units = torch.eye(layer.in_channels * math.prod(kernel), dtype=layer.weight.dtype)
    units = units.view(-1, layer.in_channels, *kernel)
    return (module(units)[middle] - module(torch.zeros_like(units[:1]))[middle]).T.reshape(layer.weight.shape)


@pytest.mark.sweep(30)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_every_kind_of_lycoris(case: Any, tmp_path: Path) -> None:
    _, make, name, options = case
    torch.manual_seed(1)
    layer = make().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    (tmp_path / "base").mkdir()
    weights = {f"block.part.{key}": W.detach().clone() for key, W in layer.state_dict().items()}
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    changes = []
    for i in (0, 1):
        own = copy.deepcopy(layer)
        module = module_of(own, name, options, 1.0, seed=3 + i)
        if name == "FullModule":  # it holds the whole weight once it is applied
            module.apply_to()
        stored = {key: W.detach().clone().contiguous() for key, W in module.state_dict().items() if "org" not in key}
        save_file({f"lora_unet_block_part.{key}": W for key, W in stored.items()}, tmp_path / f"{i}.safetensors")
        with torch.no_grad():
            if name != "DiagOFTModule":  # which computes in float32, whatever its numbers are
                module.double(), own.double()
            plain = copy.deepcopy(layer).to(next(module.parameters()).dtype)
            D = weight_by_forward(module, plain) - weights["block.part.weight"].double()
            changes.append({"block.part.weight": D.double()})
            if (bias := stored.get("diff_b", stored.get("b_norm"))) is not None:
                changes[-1]["block.part.bias"] = bias.double()
    off = OFF.get(name, 1e-9)
    check_spectrum(spectrum(tmp_path / "0.safetensors", base=tmp_path / "base"), changes[0], off)
    check_comparison(compare(*(tmp_path / f"{i}.safetensors" for i in (0, 1)), tmp_path / "base"), *changes, off)
