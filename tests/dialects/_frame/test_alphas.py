"""Alphas from elsewhere than a tensor: the header's, the call's, or none; each is applied and said, or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.decisions import warnings_to
from loratools.errors import BadFile, InvalidOption
from loratools.storage.checkpoint import Checkpoint
from tests.dialects.adapters import factors, lora
from tests.dialects.test_refused import LLAMA, WRITTEN

FLAT = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
NAMES = {
    "kohya": (FLAT, "lora_down.weight", "lora_up.weight"),
    "comfy": ("diffusion_model.double_blocks.3.img_attn.proj", "lora_A.weight", "lora_B.weight"),
    "diffusers": (WRITTEN["diffusers"], "lora_A.weight", "lora_B.weight"),
}


def scale(path: Path, dialect: str, **told: Any) -> tuple[float, list[str]]:
    """Return the scaling of the one module with rank 4, and what was warned of."""
    warnings: list[str] = []
    with warnings_to(warnings.append):
        (update,) = dialects.open_adapter(path, dialect=dialect, **told).updates.values()
    A, B = factors(1)
    wanted = update.scaling * (B.double() @ A.double())
    torch.testing.assert_close(update.delta_weight().double(), wanted, rtol=1e-6, atol=1e-5)
    return update.scaling, [warning.removeprefix(f"{path}: ") for warning in warnings]


def saved(path: Path, dialect: str, header: dict[str, str], alpha: float | None = None) -> Path:
    module, down, up = NAMES[dialect]
    A, B = factors(1)
    tensors = {f"{module}.{down}": A, f"{module}.{up}": B}
    save_file(tensors | ({} if alpha is None else {f"{module}.alpha": torch.tensor(alpha)}), path, metadata=header)
    return path


@pytest.mark.parametrize("dialect", sorted(NAMES))
def test_an_alpha_that_only_the_header_has_is_applied_and_said(tmp_path: Path, dialect: str) -> None:
    path = tmp_path / "a.safetensors"
    for name in ("ss_network_alpha", "lora_alpha", "alpha"):
        scaling, warnings = scale(saved(path, dialect, {name: "2.0"}), dialect)
        assert scaling == 0.5
        (warning,) = warnings
        assert warning.startswith("no tensor holds the alpha of ")
        assert warning.endswith(f"; that of the header, {name} = 2, is taken")
    assert scale(saved(path, dialect, {"alpha": "4"}), dialect) == (1.0, [])  # alpha is the rank: nothing to say
    scaling, warnings = scale(saved(path, dialect, {"ss_network_alpha": "2"}, 8.0), dialect)
    assert scaling == 2.0  # the tensor wins; U-Nets of diffusers read none
    told = ["that of its tensors of alpha; diffusers applies 1"] if dialect == "diffusers" else []
    assert [warning.partition(" is ")[2].partition(" or ")[0] for warning in warnings] == told
    for silent in ({}, {"ss_network_alpha": "None"}, {"alpha": "nan"}, {"ss_network_alpha": "Dynamic"}):
        scaling, (warning,) = scale(saved(path, dialect, silent), dialect)
        assert (scaling, warning.partition(" for ")[0]) == (1.0, "the file records no scale")
    with pytest.raises(BadFile, match=r"two alphas.*ss_network_alpha = 2, alpha = 3"):
        scale(saved(path, dialect, {"ss_network_alpha": "2", "alpha": "3"}), dialect)


def test_lycoris_has_the_root_of_rs_lora_in_its_alphas(tmp_path: Path) -> None:
    header = {"ss_network_alpha": "2", "ss_network_args": json.dumps({"rs_lora": "True", "algo": "lora"})}
    scaling, _ = scale(saved(tmp_path / "a.safetensors", "kohya", header), "kohya")
    assert scaling == 2 * math.sqrt(4) / 4


def test_convolutions_have_an_alpha_of_their_own(tmp_path: Path) -> None:
    A, B = factors(1)
    name = "lora_unet_conv_in"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 5, 3, 3), f"{name}.lora_up.weight": torch.ones(6, 2, 1, 1)}
    tensors |= {f"{FLAT}.lora_down.weight": A, f"{FLAT}.lora_up.weight": B}
    header = {"ss_network_alpha": "2", "ss_network_args": json.dumps({"conv_dim": "2", "conv_alpha": "1"})}
    save_file(tensors, tmp_path / "a.safetensors", metadata=header)
    adapter = dialects.open_adapter(tmp_path / "a.safetensors")
    assert {module: update.scaling for module, update in adapter.updates.items()} == {
        "unet.conv_in": 0.5, WRITTEN["kohya"]: 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("dialect", sorted(set(WRITTEN) - {"loratools"}))
def test_the_alpha_of_a_call_wins_and_that_is_said(tmp_path: Path, dialect: str) -> None:
    adapter = Adapter({WRITTEN[dialect]: lora(1)}, settings=LLAMA)
    dialects.save_adapter(adapter, tmp_path / "a", dialect=dialect, allow_loss=True)
    told: dict[str, Any] = {"alpha": 3.0}
    if dialect in ("gguf", "torchtune"):
        (tmp_path / "base").mkdir()
        save_file({f"{WRITTEN[dialect]}.weight": torch.ones(12, 10)}, tmp_path / "base" / "model.safetensors")
        (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA["base_config"]))
        told["base"] = Checkpoint.open(tmp_path / "base")
    warnings: list[str] = []
    with warnings_to(warnings.append):
        (update,) = dialects.open_adapter(tmp_path / "a", dialect=dialect, **told).updates.values()
    assert (update.scaling, update.alpha) == (0.75, 3.0)
    if dialect == "loralib":  # which records none
        assert not warnings
        return
    assert any("alpha 3, which the call gives, is taken in place of " in warning for warning in warnings)


def test_rs_lora_and_patterns_of_peft_with_the_alpha_of_a_call(tmp_path: Path) -> None:
    dialects.save_adapter(Adapter({WRITTEN["peft"]: lora(1)}), tmp_path / "a", dialect="peft")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True, "alpha_pattern": {"q_proj": 5}}))
    (update,) = dialects.open_adapter(tmp_path / "a", alpha=3).updates.values()
    assert (update.scaling, update.alpha) == (1.5, 3)


def test_what_a_call_cannot_tell_is_refused_by_name(tmp_path: Path) -> None:
    adapter = Adapter({WRITTEN["peft"]: lora(1)})
    dialects.save_adapter(adapter, tmp_path / "ours")
    dialects.save_adapter(adapter, tmp_path / "peft", dialect="peft")
    with pytest.raises(InvalidOption, match="alpha is 3, and this file records its scaling"):
        dialects.open_adapter(tmp_path / "ours", alpha=3)
    for alpha in (math.nan, math.inf, "8"):
        with pytest.raises(InvalidOption, match="finite number"):
            dialects.open_adapter(tmp_path / "peft", alpha=alpha)  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="enabled is for files of loralib, and this is one of peft"):
        dialects.open_adapter(tmp_path / "peft", enabled=(True, False))
    with pytest.raises(InvalidOption, match="alpha and enabled: for files only"):
        dialects.open_adapter(adapter, alpha=3, enabled=(True,))
