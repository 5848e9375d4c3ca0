"""What has no effect, or too much, is said: too small, twice, overflowing, not finite, and nothing left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.adapter import kinds
from loratools.adapter.model import Adapter
from loratools.decisions import warnings_to
from loratools.dialects import open_adapter
from loratools.errors import IncompatibleAdapter, LossyConversion, UnsupportedAdapter
from loratools.storage.lazy import LazyTensor
from loratools.surgery.combine import combine
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch
from tests.dialects.adapters import Q0, V0, lora

N = 16
NAMES = [f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v")]


def said(run: Callable[[], object]) -> list[str]:
    warnings: list[str] = []
    with warnings_to(warnings.append):
        run()
    return warnings


@pytest.fixture
def base(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(N, N, generator=generator).bfloat16() for name in NAMES}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path / "base"


def made(path: Path, alpha: float = 8, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in (NAMES[0], NAMES[2]):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, N, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(N, 4, generator=generator)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj"]}
    if change:
        change(tensors)
        config["modules_to_save"] = ["k_proj"]
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def whole_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"base_model.model.{NAMES[1]}.weight"] = torch.full((N, N), torch.nan)


def factor_inf(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"base_model.model.{NAMES[0]}.lora_B.weight"][2, 1] = torch.inf


NO_BIT = "no bit of {} of 2 tensors changed that adapters are for, such as {}.weight: "
TWICE = "adapters 1 and 2 have the same tensors; each is applied with its own weight"


@pytest.mark.parametrize(("alpha", "weight"), [(1e-30, 1.0), (8, 1e-30), (8, -1e-9)])
def test_too_small_to_change_a_bit(tmp_path: Path, base: Path, alpha: float, weight: float) -> None:
    adapter = made(tmp_path / "a", alpha)
    warnings = said(lambda: merge(base, adapter, tmp_path / "out", weights=weight))
    assert warnings[0].startswith(NO_BIT.format(2, NAMES[0]))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_one_tensor_of_two(tmp_path: Path, base: Path) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"base_model.model.{NAMES[2]}.lora_B.weight"] *= 1e-20
        tensors[f"base_model.model.{NAMES[1]}.weight"] = torch.ones(N, N)

    warnings = said(lambda: merge(base, made(tmp_path / "a", change=shrink), tmp_path / "out"))
    assert any(warning.startswith(NO_BIT.format(1, NAMES[2])) for warning in warnings)
    assert not [w for w in said(lambda: merge(base, made(tmp_path / "b"), tmp_path / "out2")) if "no bit" in w]


def test_the_same_adapter_twice_by_content(tmp_path: Path, base: Path) -> None:
    one, copy, other = made(tmp_path / "a"), made(tmp_path / "copy"), made(tmp_path / "other", 4)
    assert TWICE in said(lambda: merge(base, [one, copy], tmp_path / "m"))
    assert TWICE in said(lambda: merge(base, [one, other], tmp_path / "m2"))  # another alpha, the same tensors
    assert TWICE in said(lambda: combine([one, copy], tmp_path / "c"))
    merge(base, one, tmp_path / "m3")
    assert TWICE in said(lambda: switch(tmp_path / "m3", one, [copy, one], tmp_path / "s"))
    cancelled = said(lambda: merge(base, [one, copy], tmp_path / "m4", weights=[1.0, -1.0]))
    assert any(warning.startswith(NO_BIT.format(2, NAMES[0])) for warning in cancelled)
    assert not [w for w in said(lambda: combine([one], tmp_path / "c2")) if "same tensors" in w]


@pytest.mark.parametrize("change", [whole_nan, factor_inf])
def test_numbers_that_are_none(tmp_path: Path, base: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    adapter = made(tmp_path / "a", change=change)
    name = NAMES[1] if change is whole_nan else NAMES[0]
    for run in (
        lambda out: merge(base, adapter, out), lambda out: combine([adapter], out),
        lambda out: switch(tmp_path / "m", made(tmp_path / "old"), adapter, out),
    ):  # fmt: skip
        if not (tmp_path / "m").exists():
            merge(base, made(tmp_path / "first"), tmp_path / "m", keep_residual=True)
        with pytest.raises((IncompatibleAdapter, UnsupportedAdapter)) as refusal:
            run(tmp_path / "out")
        assert name in str(refusal.value)
        assert "NaN or infin" in str(refusal.value)
        assert not (tmp_path / "out").exists()
    for to in ("loratools", "peft"):
        warnings = said(lambda to=to: convert(adapter, tmp_path / to, to=to))  # type: ignore[misc]
        assert [w for w in warnings if w.startswith(name) and "NaN or infinite numbers" in w]


def test_weights_that_overflow(tmp_path: Path, base: Path) -> None:
    adapter = made(tmp_path / "a")
    with pytest.raises(IncompatibleAdapter, match="not finite in BF16"):
        merge(base, adapter, tmp_path / "m", weights=1e39)
    with pytest.raises(IncompatibleAdapter, match="cannot be worked on"):
        combine([adapter], tmp_path / "c", weights=[1e300])
    with pytest.raises(IncompatibleAdapter, match="cannot be worked on") as error:
        combine([adapter], tmp_path / "d", weights=[1e-30], dtype="f16")
    assert all("its factors are too small for F16 and would become zero" in line for line in error.value.problems)


def test_what_is_written_is_counted_and_never_nothing(tmp_path: Path) -> None:
    two = Adapter({Q0: lora(1), "x.y": lora(2)}, settings={"base_config": {"model_type": "qwen2"}})
    conversion = convert(two, tmp_path / "a", to="gguf", allow_loss=True)
    assert (conversion.modules, [loss.where for loss in conversion.losses]) == (1, ["x.y"])
    alone = convert(Adapter({Q0: lora(1)}, settings=two.settings), tmp_path / "b", to="gguf", allow_loss=True)
    assert conversion.digest == alone.digest
    conv = LazyTensor.of(torch.ones(2, 3, 3, 3)), LazyTensor.of(torch.ones(4, 2, 1, 1))
    ours = open_adapter(convert(Adapter({V0: lora(1)}), tmp_path / "ours").output)
    pair = LazyTensor.of(torch.ones(2, 9)), LazyTensor.of(torch.ones(4, 2))
    convolution = kinds.get("conv").build(dict(zip(("lora_A.weight", "lora_B.weight"), conv, strict=True)), 1.0, 2.0)
    embedding = kinds.get("embedding").build(
        dict(zip(("lora_embedding_A", "lora_embedding_B"), pair, strict=True)), 1.0, 2.0
    )
    nothing = {
        "mlx": {"c": convolution},
        "gguf": {"x.y": lora(2)}, "torchtune": {"x.y": lora(2)}, "diffusers": {"diffusion_model.strange": lora(1)},
        "kohya": {"m.wte": embedding}, "comfy": {"x.y": lora(2)},
        "loralib": {"e.embed_tokens": lora(1)},
    }  # fmt: skip
    for to, updates in nothing.items():
        with pytest.raises(LossyConversion, match="nothing of this adapter would be left"):
            convert(Adapter(updates, settings=two.settings), tmp_path / to, to=to, allow_loss=True)
        assert not (tmp_path / to).exists()
    assert convert(ours, tmp_path / "k", to="peft", allow_loss=True).modules == 1
