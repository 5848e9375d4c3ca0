"""Every `PeftType` of the installed PEFT: merged equal to PEFT's own merge, or refused by what it is."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import convert, inspect, live, merge, resize, spectrum, unmerge, verify
from loratools.adapter import kinds
from loratools.adapter.kinds.peanut import ACTIVATIONS
from loratools.dialects.peft import types
from loratools.dialects.peft.types._refused import REFUSED
from loratools.errors import BadFile, IncompatibleAdapter, LoraToolsError, LossyConversion, UnsupportedAdapter
from loratools.storage.lazy import LazyTensor
from tests.interop.models import FAMILIES, load
from tests.interop.test_kinds import mixed, save_mixed
from tests.make import wavelets

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

TARGETS = ["q_proj", "k_proj", "down_proj"]  # (32, 32), (16, 32) and (32, 48)
LLAMA = {"target_modules": TARGETS}
GPT2 = {"family": "gpt2", "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}  # (96, 32), (32, 128)

CASES: Mapping[str, list[dict[str, Any]]] = {
    "ADAMSS": [
        {"r": r, **more}
        for r in (5, 8)
        for more in ({}, {"num_subspaces": 3, "subspace_rank": 2, "random_seed": 4}, {"use_dynamic_rank": True})
    ],
    "BEFT": [
        {"family": "qwen2", "target_modules": ["q_proj"]},
        {"family": "qwen2", "target_modules": ["q_proj", "k_proj"]},
    ],
    "C3A": [{"block_size": 8, **more} for more in ({}, {"block_size_pattern": {"k_proj": 16}})]
    + [{"block_size": 16}, {"block_size": 4, "init_weights": "gaussian"}],
    "DEFT": [
        {"r": r, **more}
        for r in (2, 5)
        for more in (
            {},
            {"alpha": 3},
            {"decomposition_method": "qr"},
            {"decomposition_method": "qr", "para": True},
            GPT2,
        )
    ],
    "DELORA": [{"r": r, **more} for r in (2, 5) for more in ({}, {"rank_pattern": {"k_proj": 3}, "delora_lambda": 4})],
    "FOURIERFT": [
        {"n_frequency": n, **more}
        for n in (40, 300)
        for more in ({}, {"random_loc_seed": 5, "scaling": 30.0, "n_frequency_pattern": {"k_proj": 7}}, GPT2)
    ],
    "FROD": [
        {"sparse_rate": rate, **more} for rate in (0.01, 0.2) for more in ({}, {"regularization_alpha": 0.1}, GPT2)
    ],
    "HRA": [{"r": r, "apply_GS": orthogonal} for r in (2, 5) for orthogonal in (False, True)]
    + [{"bias": "all", "family": "qwen2"}, {"bias": "hra_only", "family": "qwen2", "modules_to_save": ["lm_head"]}],
    "MISS": [
        {"r": r, **more}
        for r in (4, 8)
        for more in ({}, {"init_weights": "bat"}, {"init_weights": "mini", "mini_r": 4}, {"r": r + 1})
    ],
    "OSF": [{"effective_rank": k, **more} for k in (3, 0.5) for more in ({}, {"rank_pattern": {"k_proj": 2}})],
    "PEANUT": [{"r": r, **more} for r in (2, 5) for more in ({}, {"depth": 2, "act_fn": "silu", "scaling": 0.5})],
    "PSOFT": [
        {"r": r, **more}
        for r in (2, 5)
        for more in (
            {},
            {"ab_svd_init": "pissa_init", "psoft_alpha": 4, "psoft_mag_a": False},
            {"psoft_orth": False},
            {"use_cayley_neumann": True, "cayley_neumann_eps": 0.1},
            {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3},
            {"psoft_svd": "lowrank", "random_seed": 3},
        )
    ],
    "ROAD": [
        {"variant": variant, "group_size": size, **more}
        for variant in ("road_1", "road_2", "road_4")
        for size, more in ((4, {}), (8, {"family": "qwen2"}))
    ],
    "SHIRA": [{"r": r, **more} for r in (2, 5) for more in ({}, {"random_seed": 4})],
    "SUPERTUNING": [
        {"sparsity": sparsity, **more}
        for sparsity in (0.9, 0.5)
        for more in (
            {},
            {"select_top": False, "r": 3},
            {"r": 2, "lora_alpha": 7.0},
            {"save_precomputed_indices": False},
            {"save_precomputed_indices": False, "select_top": False, "r": 2},
        )
    ],
    "TINYLORA": [
        *(
            {"r": r, **more}
            for r in (2, 5)
            for more in ({}, {"weight_tying": 0.5, "u": 8}, {"weight_tying": 1.0}, GPT2)
        ),
        {"save_projection": False},
        {"weight_tying": 0.5, "save_projection": False, "family": "qwen2"},
        {"target_modules": ["embed_tokens", "v_proj"]},
    ],
    "UNILORA": [
        {"r": r, **more}
        for r in (2, 5)
        for more in ({"save_indices": True}, {"theta_d_length": 31}, GPT2, {"save_indices": True, **GPT2})
    ],
    "WAVEFT": [
        {"n_frequency": n, **more}
        for n in (40, 300)
        for more in (
            {},
            {"wavelet_family": "sym4", "scaling": 3.0, "random_loc_seed": 5},
            {"use_idwt": False},
            {"wavelet_family": "db3", "proportional_parameters": True},
            GPT2,
        )
    ],
    "IA3": [
        {"feedforward_modules": ["down_proj"]},
        {"feedforward_modules": []},
        {"family": "qwen2", "feedforward_modules": r".*\.(down|k)_proj"},  # q and k have a bias
        {**GPT2, "feedforward_modules": ["mlp.c_proj"]},
    ],
    "LOHA": [{"r": r, **more} for r in (2, 5) for more in ({}, {"alpha": 3, "rank_pattern": {"k_proj": 3}})],
    "LOKR": [
        {"r": r, **more}
        for r in (2, 5)
        for more in ({}, {"alpha": 3, "decompose_both": True, "decompose_factor": 4}, {"alpha_pattern": {"q_proj": 2}})
    ],
    "OFT": [
        {"oft_block_size": 8, "use_cayley_neumann": False},
        {"oft_block_size": 16, "num_cayley_neumann_terms": 3},
        {"oft_block_size": 4, "block_share": True, "num_cayley_neumann_terms": 7},
        {"oft_block_size": 0, "r": 2, "coft": True, "eps": 0.3},
        {"oft_block_size": 8, "coft": True, "eps": 0.2, "block_share": True, "num_cayley_neumann_terms": 2},
    ],
    "BOFT": [{"boft_block_size": 4}, {"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 2}],
    "HIRA": [{"r": r, **more} for r in (2, 5) for more in ({}, {"rank_pattern": {"k_proj": 3}}, GPT2)]
    + [{"r": 3, "target_modules": ["embed_tokens", "q_proj"]}],
    "GLORA": [
        {"r": r, "family": family, "config_A_B": first, "config_C": second, "config_D_E": third}
        for r in (2, 3)
        for family, first, second, third in (
            ("llama", "lora", "lora", "constant"),
            ("qwen2", "lora", "lora", "vector"),
            ("qwen2", "vector", "vector", "constant"),
            ("qwen2", "constant", "none", "none"),
            ("qwen2", "none", "lora", "vector"),
        )
    ],
    "GRALORA": [
        {"r": r, "gralora_k": k, **more} for r, k in ((4, 2), (8, 4)) for more in ({}, {"hybrid_r": 3, "alpha": 5})
    ],
    "ADALORA": [
        {"init_r": r, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1, **more}
        for r in (3, 6)
        for more in ({}, {"lora_alpha": 3}, GPT2)
    ],
    "PVERA": [{"r": r, **more} for r in (2, 5) for more in ({}, {"save_projection": False, "projection_prng_key": 11})],
    "VBLORA": [
        {"r": r, "num_vectors": 7, "vector_length": 8, **more}
        for r in (2, 3)
        for more in ({}, {"topk": 3}, {"save_only_topk_weights": True}, GPT2)
    ],
    "RANDLORA": [
        {"r": r, **more}
        for r in (3, 8)
        for more in (
            {},
            {"save_projection": False},
            {"save_projection": False, "sparse": True},
            {"save_projection": False, "very_sparse": True, "randlora_alpha": 4},
        )
    ]
    + [{"r": 4, **GPT2}],
    "LN_TUNING": [
        {"target_modules": ["input_layernorm"]},
        {"target_modules": ["norm", "q_proj"]},
        {"family": "bert", "target_modules": ["output.LayerNorm"]},
    ],
    "TRAINABLE_TOKENS": [
        {"token_indices": [1, 5, 9], "target_modules": ["embed_tokens"]},
        {"token_indices": [7, 3], "family": "qwen2"},
        {"token_indices": [2, 0], "target_modules": ["wte"], "family": "gpt2"},
    ],
    "VERA": [
        {"r": r, **more}
        for r in (2, 5)
        for more in ({}, {"save_projection": False, "projection_prng_key": 11}, {**GPT2, "save_projection": False})
    ],
}
"""Type -> settings of its config; `family` names the base, llama by default."""

NOT_WRITTEN = {"FROD", "TINYLORA"}
"""Types that share tensors among groups of modules; they are read, and their loss is named where they are written."""

LORA = {"LORA": "tests/interop/test_kinds.py and most others"}


def listed() -> list[Any]:
    """Return a parameter for each type and settings."""
    return [
        pytest.param(name, settings, id=f"{name}-{i}")
        for name in sorted(CASES)
        for i, settings in enumerate(CASES[name])
    ]


def trained(base: Any, name: str, settings: Mapping[str, Any], seed: int = 7) -> Any:
    """Return a PEFT model of a type around a copy of `base` in which everything that would be trained has moved."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    torch.manual_seed(3)
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]](**settings)
    peft = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return peft


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return max|ours − theirs| / max|theirs|."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-30))


def made(tmp_path: Path, name: str, settings: Mapping[str, Any]) -> tuple[Any, Path, Path]:
    """Return a base model, its folder, and that of an adapter."""
    if name == "ADAMSS":
        pytest.importorskip("sklearn", reason="PEFT makes none without it")
    rest = dict(settings)
    base = FAMILIES[rest.pop("family", "llama")].build()
    for parameter in (parameter for name, parameter in base.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(parameter)
    base.save_pretrained(tmp_path / "base")
    rest.setdefault("target_modules", TARGETS)
    trained(base, name, rest).save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "base", tmp_path / "adapter"


@pytest.mark.sweep(80)
@pytest.mark.parametrize(("name", "settings"), listed())
def test_a_merge_is_pefts(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base, folder, adapter = made(tmp_path, name, settings)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).merge_and_unload().state_dict()
    before = load(folder)
    report = merge(folder, [adapter], tmp_path / "ours", keep_residual=True)
    ours = load(tmp_path / "ours")
    assert {key: difference(W, theirs[key]) for key, W in ours.items() if difference(W, theirs[key]) > 1e-5} == {}
    moved = {key for key, W in before.items() if difference(theirs[key], W) > 1e-4}
    assert {key for key, W in before.items() if difference(ours[key], W) > 1e-4} == moved
    assert 0 < len(moved) <= report.changed
    assert verify(tmp_path / "ours", folder, [adapter]).ok
    unmerge(tmp_path / "ours", [adapter], tmp_path / "back")
    back = load(tmp_path / "back")
    assert all(torch.equal(W, back[key]) for key, W in before.items())
    stored = {"UNILORA": settings.get("save_indices", False), "TINYLORA": settings.get("save_projection", True)}
    if stored.get(name, True):
        assert inspect(adapter).peft_type == name
        if name in NOT_WRITTEN:
            with pytest.raises(LossyConversion, match=f"kind {name.lower()}"):
                convert(adapter, tmp_path / "again", to="peft")
            return
        convert(adapter, tmp_path / "again", to="peft")
        first, again = (load_file(each / "adapter_model.safetensors") for each in (adapter, tmp_path / "again"))
        assert again.keys() <= first.keys()
        assert all(torch.equal(W, first[key]) for key, W in again.items())
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").merge_and_unload().state_dict()
        assert max(difference(W, theirs[key]) for key, W in ours.items()) <= 1e-5
    else:
        with pytest.raises(BadFile, match=r"PEFT draws .* all modules in turn"):
            inspect(adapter)


CONVOLUTIONS: list[tuple[str, str, dict[str, Any]]] = [
    ("LOKR", "conv1", {"r": 8}),
    ("LOKR", "conv1", {"r": 2, "decompose_both": True, "decompose_factor": 4}),
    ("LOKR", "conv1", {"r": 1}),
    ("LOKR", "conv2", {"r": 2, "use_effective_conv2d": True}),
    ("LOHA", "conv1", {"r": 2, "use_effective_conv2d": True}),
    ("LOHA", "conv1", {"r": 2}),
    ("HIRA", "conv3", {"r": 3}),
    ("OFT", "embed", {"oft_block_size": 4}),
    ("OFT", "embed", {"oft_block_size": 4, "coft": True, "eps": 0.3, "block_share": True, "use_cayley_neumann": False}),
]


@pytest.mark.parametrize(("name", "target", "settings"), CONVOLUTIONS)
def test_convolutions_and_embeddings_of_types_that_have_them(
    name: str, target: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base = mixed()
    folder, adapter = save_mixed(tmp_path / "base", base), tmp_path / "adapter"
    trained(base, name, {**settings, "target_modules": [target]}).save_pretrained(adapter)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).merge_and_unload().state_dict()
    merge(folder, [adapter], tmp_path / "ours")
    ours, before = load(tmp_path / "ours"), load(folder)
    assert max(difference(W, theirs[key]) for key, W in ours.items()) <= 1e-5
    assert {key for key, W in before.items() if not torch.equal(W, ours[key])} == {f"{target}.weight"}
    assert verify(tmp_path / "ours", folder, [adapter]).ok
    convert(adapter, tmp_path / "again", to="peft")
    first, again = (load_file(each / "adapter_model.safetensors") for each in (adapter, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(W, again[key]) for key, W in first.items())


@pytest.mark.parametrize("name", sorted(CASES))
def test_without_a_base_the_spectrum_is_that_with_it_or_left_out(name: str, tmp_path: Path) -> None:
    """Of some the file does not tell the shape of the weight: then nothing is measured, and nothing is written."""
    pytest.importorskip("peft")
    _, folder, adapter = made(tmp_path, name, CASES[name][0])
    alone, whole = spectrum(adapter), spectrum(adapter, base=folder)
    measured = {module.module: module for module in whole.modules}
    assert {module.module for module in alone.modules} | set(alone.skipped) <= measured.keys()
    for module in alone.modules:
        assert module.shape == measured[module.module].shape
        assert module.norm == pytest.approx(measured[module.module].norm, rel=1e-4)
    if alone.skipped:
        with pytest.raises(LoraToolsError):
            resize(adapter, tmp_path / "small", 2)
        assert not (tmp_path / "small").exists()


DAMAGES: list[tuple[str, dict[str, Any], str, str, str]] = [
    ("VERA", {"r": 2}, "vera_B", "missing", "no vera_B; found vera_lambda_b, vera_lambda_d"),
    ("PVERA", {"r": 2}, "pvera_A", "missing", "no pvera_A; found"),
    ("PSOFT", {"r": 2}, "psoft_R.vector_a", "missing", r"no psoft_R\.vector_a; found"),
    ("BOFT", {"boft_block_size": 4}, "boft_R", "twice", "boft_R has 2 factors, the config says 1"),
    ("FOURIERFT", {"n_frequency": 40}, "fourierft_spectrum", "twice", "has 80 coefficients, the config says 40"),
    ("WAVEFT", {"n_frequency": 40}, "waveft_spectrum", "twice", "has 80 coefficients, the config says 40"),
    ("GLORA", CASES["GLORA"][2], "glora_E.X", "twice", r"glora_E\.X has shape \(2,\), the base's weight"),
    ("SHIRA", {"r": 2}, "shira_indices", "negative", "a number at row -7 of a weight of"),
    ("UNILORA", {"r": 2, "save_indices": True}, "unilora_indices_A", "negative", "an index of A is -7"),
]


@pytest.mark.parametrize(("name", "settings", "part", "damage", "sentence"), DAMAGES)
def test_a_damaged_file_is_refused_in_a_sentence(
    name: str, settings: dict[str, Any], part: str, damage: str, sentence: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    _, folder, adapter = made(tmp_path, name, settings)
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in sorted(tensors) if key.endswith(part))
    W = tensors.pop(key)
    if damage != "missing":
        tensors[key] = torch.cat([W, W]) if damage == "twice" else torch.full_like(W, -7)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(LoraToolsError, match=sentence):
        merge(folder, [adapter], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


SEVERAL = {
    "HRA": {"r": 3}, "ROAD": {"group_size": 4, "family": "qwen2"}, "MISS": {"r": 4, "init_weights": "bat"},
    "DEFT": {"r": 3}, "OSF": {"effective_rank": 3}, "PSOFT": {"r": 3}, "PEANUT": {"r": 3}, "FROD": {},
    "DELORA": {"r": 3}, "SUPERTUNING": {"sparsity": 0.9}, "C3A": {"block_size": 8},
}  # fmt: skip
"""Types of which two adapters are merged: what changes the weight that it finds, and what asks the unchanged base."""


@pytest.mark.parametrize("name", sorted(SEVERAL))
def test_two_of_a_type_are_merged_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = SEVERAL[name]
    base, folder, first = made(tmp_path, name, settings)
    rest = {"target_modules": TARGETS} | {key: value for key, value in settings.items() if key != "family"}
    trained(base, name, rest, seed=11).save_pretrained(tmp_path / "second")
    both = [first, tmp_path / "second"]
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), both[0], adapter_name="a")
    model.load_adapter(both[1], adapter_name="b")
    theirs = model.merge_and_unload(adapter_names=["a", "b"]).state_dict()
    merge(folder, both, tmp_path / "ours", keep_residual=True)
    ours = load(tmp_path / "ours")
    assert {key: difference(W, theirs[key]) for key, W in ours.items() if difference(W, theirs[key]) > 1e-5} == {}
    assert verify(tmp_path / "ours", folder, both).ok
    unmerge(tmp_path / "ours", both, tmp_path / "back")
    back = load(tmp_path / "back")
    assert all(torch.equal(W, back[key]) for key, W in load(folder).items())


@pytest.mark.parametrize("alpha", [3, 0])
def test_adalora_of_which_ranks_are_gone(alpha: int, tmp_path: Path) -> None:
    """What was pruned is not in the file; of a module without any rank its tensors are empty, and nothing changes."""
    peft = pytest.importorskip("peft")
    base = FAMILIES["llama"].build()
    base.save_pretrained(tmp_path / "base")
    model = trained(base, "ADALORA", {
        "init_r": 3, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1, "lora_alpha": alpha,
        "target_modules": ["q_proj", "k_proj"],
    })  # fmt: skip
    name = "model.layers.{}.self_attn.{}_proj.lora_E.default"
    model.peft_config["default"].rank_pattern = {
        name.format(0, "q"): [True, False, True], name.format(0, "k"): [False] * 3,
        name.format(1, "q"): [True] * 3, name.format(1, "k"): [False, False, True],
    }  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload().state_dict()
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    ours, before = load(tmp_path / "ours"), load(tmp_path / "base")
    assert max(difference(W, theirs[key]) for key, W in ours.items()) <= 1e-5
    assert sum(difference(ours[key], W) > 1e-4 for key, W in before.items()) == 3


def test_every_type_is_merged_or_refused() -> None:
    """A member of PEFT's enumeration that is in no list fails, and so does one in two."""
    peft = pytest.importorskip("peft")
    members = {member.value for member in peft.PeftType}
    assert members - CASES.keys() - REFUSED.keys() - LORA.keys() == set()
    assert CASES.keys() & REFUSED.keys() == set()
    assert {name for name in types.names() if name not in CASES and name in members} == set()


def test_functions_of_peanut_are_those_of_transformers() -> None:
    activations = pytest.importorskip("transformers.activations").ACT2FN
    x = torch.linspace(-12, 12, 97, dtype=torch.float64)
    assert set(activations) - set(ACTIVATIONS) == {"xielu"}
    for name, function in ACTIVATIONS.items():
        theirs = activations[name].double() if name == "prelu" else activations[name]
        torch.testing.assert_close(function(x), theirs(x).detach(), rtol=1e-6, atol=1e-6, msg=name)


def test_wavelets_are_pefts() -> None:
    pytest.importorskip("peft")
    assert wavelets.TABLE.read_text(encoding="utf-8") == wavelets.written()


@pytest.mark.parametrize("shape", [(11, 8), (12, 7), (9, 13)])
@pytest.mark.parametrize("wavelet", ["db1", "sym4", "coif2"])
def test_waveft_of_odd_sides_is_pefts(wavelet: str, shape: tuple[int, int]) -> None:
    """PEFT widens an odd side by one more, and cuts the middle out of what the transform makes of it."""
    peft = pytest.importorskip("peft")
    out, inner = shape
    config = peft.WaveFTConfig(target_modules=["0"], n_frequency=out * inner // 2, wavelet_family=wavelet, scaling=3.0)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(inner, out, bias=False)), config)
    layer = model.base_model.model[0]
    spectrum = torch.randn(out * inner // 2, generator=torch.Generator().manual_seed(1))
    layer.waveft_spectrum["default"].data.copy_(spectrum)
    theirs = layer.get_delta_weight("default").detach().double()
    layout = {"seed": config.random_loc_seed, "wavelet": wavelet}
    update = kinds.get("waveft").build({"waveft_spectrum": LazyTensor.of(spectrum)}, 3.0, 3.0, layout=layout)
    update = update.fitted(shape)
    torch.testing.assert_close(3.0 * update.dense(), theirs, rtol=1e-5, atol=1e-5)
    tile = update.rows(torch.float64, torch.device("cpu"), False)
    torch.testing.assert_close(3.0 * torch.cat([tile(slice(0, 5)), tile(slice(5, out))]), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 8, "init_weights": "bat"}], ids=["plain", "bat"])
def test_bone_is_what_miss_was_called(settings: dict[str, Any], tmp_path: Path) -> None:
    """PEFT reads no BONE any more; its files have other names for the same."""
    pytest.importorskip("peft")
    _, folder, adapter = made(tmp_path, "MISS", settings)
    merge(folder, [adapter], tmp_path / "miss")
    tensors = {key.replace("miss_block", "bone_block"): W for key, W in load(adapter).items()}
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    config = {field: value for field, value in config.items() if field not in ("mini_r", "miss_dropout")}
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "BONE"}))
    merge(folder, [adapter], tmp_path / "bone")
    miss, bone = load(tmp_path / "miss"), load(tmp_path / "bone")
    assert all(torch.equal(W, bone[key]) for key, W in miss.items())


@pytest.mark.parametrize("settings", [{}, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("name", ["UNILORA", "TINYLORA"])
def test_a_running_model_has_the_order_of_its_modules(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    rest = settings | ({"save_projection": False} if name == "TINYLORA" else {})
    base, _, adapter = made(tmp_path, name, rest)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        before = base.eval()(tokens).logits
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()(tokens).logits
        live.load(base, adapter)
        torch.testing.assert_close(base(tokens).logits, theirs, rtol=1e-5, atol=1e-6)
    assert float((before - theirs).abs().max()) > 1e-4


HALF = {
    "TINYLORA": [{}, {"save_projection": False}], "FROD": [{}], "UNILORA": [{}, {"save_indices": True}],
    "OSF": [{"effective_rank": 3}], "PSOFT": [{"r": 3}], "SUPERTUNING": [{"save_precomputed_indices": False}],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(HALF))
def test_what_is_drawn_for_a_base_of_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT rounds what it draws to the base's dtype; what else it computes in that dtype is no more than rounding."""
    peft = pytest.importorskip("peft")
    base = FAMILIES["llama"].build().to(dtype)
    base.save_pretrained(tmp_path / "base")
    for i, settings in enumerate(HALF[name]):
        adapter = tmp_path / str(i)
        trained(base, name, {"target_modules": TARGETS, **settings}).save_pretrained(adapter)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).merge_and_unload().state_dict()
        merge(tmp_path / "base", [adapter], tmp_path / f"ours-{i}")
        for key, W in load(tmp_path / f"ours-{i}").items():
            assert difference(W.float(), theirs[key].float()) <= (2**-7 if dtype == torch.bfloat16 else 2**-10)
        assert verify(tmp_path / f"ours-{i}", tmp_path / "base", [adapter]).ok


# What a LoRA of full rank can say: the types that change no more than weights and, some, biases beside them.
LORAS = ["ADALORA", "BOFT", "GLORA", "GRALORA", "HIRA", "IA3", "LOHA", "LOKR", "OFT", "RANDLORA", "VBLORA", "VERA"]


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_of_full_rank_is_the_adapter_and_of_less_has_the_error_of_the_singular_values(
    name: str, tmp_path: Path
) -> None:
    """PEFT merges the LoRA to what it merges the adapter to; of rank 2 the error is that of an SVD in numpy."""
    peft = pytest.importorskip("peft")
    base, folder, adapter = made(tmp_path, name, CASES[name][0])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).merge_and_unload().state_dict()
    full = convert(adapter, tmp_path / "full", to="peft", base=folder, to_lora=32)
    assert full.lora is not None
    assert full.lora.relative_error < 1e-6
    ours = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "full").merge_and_unload().state_dict()
    assert max(difference(ours[key], W) for key, W in theirs.items()) <= 1e-5
    two = convert(adapter, tmp_path / "two", to="peft", base=folder, to_lora=2)
    assert two.lora is not None
    before, lost, whole = load(folder), 0.0, 0.0
    for module in two.lora.modules:
        W = f"{module.module}.weight"
        sigma = torch.linalg.svdvals(theirs[W].double() - before[W].double())
        assert module.relative_error == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-3, abs=1e-5)
        lost, whole = lost + float(sigma[2:].square().sum()), whole + float(sigma.square().sum())
    assert two.lora.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3, abs=1e-5)


def test_a_lora_of_what_depends_on_the_base_needs_it(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _, _, adapter = made(tmp_path, "IA3", CASES["IA3"][0])
    with pytest.raises(IncompatibleAdapter, match=r"6 modules whose change cannot be told") as raised:
        convert(adapter, tmp_path / "lora", to="peft", to_lora=2)
    assert "--base" in str(raised.value)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_merge_is_refused_by_what_it_is(name: str, tmp_path: Path) -> None:
    save_file({"prompt_embeddings": torch.zeros(2, 3)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": name}))
    with pytest.raises(UnsupportedAdapter, match=f"peft_type {name} cannot be merged: ") as raised:
        inspect(tmp_path)
    assert REFUSED[name] in str(raised.value)
