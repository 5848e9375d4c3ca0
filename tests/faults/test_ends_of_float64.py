"""Models and adapters in float64 whose squares float64 does not hold: the right answer or a true sentence, no zeros."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import BadFile, IncompatibleAdapter
from loratools.linalg.stacks import NO_SQUARES

BEYOND = [1e200, 1e300, 1e-200, 1e-300]
HELD = [1e100, 1e-100]
ONE = "model.layers.0.q_proj"


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(path: Path, size: float, seed: int = 0) -> Path:
    """Write a model in float64 whose weight has rank 2 and numbers of about `size`."""
    path.mkdir(parents=True)
    save_file(
        {f"{ONE}.weight": drawn(16, 2, seed=seed) * size @ drawn(2, 16, seed=seed + 1)}, path / "model.safetensors"
    )
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


def adapter(path: Path, a: float, b: float, seed: int = 5) -> Path:
    """Write an adapter of PEFT in float64 with A of about the size `a` and B of about `b`."""
    path.mkdir(parents=True)
    factors = {"A": a * drawn(2, 16, seed=seed), "B": b * drawn(16, 2, seed=seed + 1)}
    named = {f"base_model.model.{ONE}.lora_{side}.weight": factor for side, factor in factors.items()}
    save_file(named, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def delta(path: Path) -> torch.Tensor:
    A, B = (
        load_file(path / "adapter_model.safetensors")[f"base_model.model.{ONE}.lora_{side}.weight"] for side in "AB"
    )
    return B @ A


@pytest.mark.parametrize("size", [*BEYOND, *HELD])
def test_a_merge_adds_it_all_and_is_verified(size: float, tmp_path: Path) -> None:
    base, one = model(tmp_path / "base", size), adapter(tmp_path / "one", size**0.5, size**0.5)
    report = loratools.merge(base, one, tmp_path / "out")
    W = load_file(base / "model.safetensors")[f"{ONE}.weight"]
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{ONE}.weight"]
    torch.testing.assert_close(merged / size, (W + delta(one)) / size, rtol=1e-12, atol=1e-12)
    assert report.retention == (None if size in BEYOND else pytest.approx(1, abs=1e-9))
    assert loratools.verify(tmp_path / "out", base, one).ok
    assert not loratools.verify(base, base, one).ok


@pytest.mark.parametrize(("a", "b"), [(1e-60, 1e60), (1e-200, 1e200), (1e50, 1e-50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_float32_does_not_hold_are_multiplied_in_float64(
    a: float, b: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, one = model(tmp_path / "base", 1.0), adapter(tmp_path / "one", a, b)
    W = load_file(base / "model.safetensors")[f"{ONE}.weight"].to(dtype)
    save_file({f"{ONE}.weight": W}, base / "model.safetensors")
    loratools.merge(base, one, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{ONE}.weight"]
    assert torch.equal(merged, (W.double() + delta(one)).float().to(dtype))


@pytest.mark.parametrize("size", [*BEYOND, *HELD])
def test_spectra_are_right(size: float, tmp_path: Path) -> None:
    found = loratools.spectrum(adapter(tmp_path / "one", size**0.5, size**0.5))
    sigma = torch.linalg.svdvals(delta(tmp_path / "one") / size)[:2].tolist()
    assert [value / size for value in found.modules[0].sigma] == pytest.approx(sigma, rel=1e-9)
    assert found.norm / size == pytest.approx(math.hypot(*sigma), rel=1e-9)
    assert found.modules[0].stable_rank == pytest.approx(1 + (sigma[1] / sigma[0]) ** 2, rel=1e-9)
    assert found.kept(1) == pytest.approx(sigma[0] ** 2 / math.hypot(*sigma) ** 2, rel=1e-9)


@pytest.mark.parametrize("size", BEYOND)
def test_what_needs_squares_says_that_there_are_none(size: float, tmp_path: Path) -> None:
    one = adapter(tmp_path / "in" / "one", size**0.5, size**0.5)
    other = adapter(tmp_path / "in" / "other", size**0.5, size**0.5, seed=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(IncompatibleAdapter, match=NO_SQUARES):
            loratools.compare(one, other)
        with pytest.raises(IncompatibleAdapter, match=NO_SQUARES):
            loratools.resize(one, tmp_path / "out", 1, dtype="f64")
        with pytest.raises(IncompatibleAdapter, match=NO_SQUARES):
            loratools.combine([one, other], tmp_path / "out", dtype="f64")
        with pytest.raises(IncompatibleAdapter, match="too large or too small for float32, which ties takes"):
            loratools.combine([one, other], tmp_path / "out", method="ties", density=0.5, dtype="f64")
        found = loratools.find(tmp_path / "in")
    assert found.duplicates == ()
    assert len(found.adapters) == 2
    with pytest.raises(BadFile, match="cannot be compared") as caught:
        loratools.extract_svd(model(tmp_path / "zero", 0.0), model(tmp_path / "tuned", size), tmp_path / "out", 2)
    assert "float64 does not hold the squares" in caught.value.problems[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", HELD)
def test_what_float64_holds_is_worked_on(size: float, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", size**0.5, size**0.5)
    assert loratools.compare(one, one).cosine == pytest.approx(1, abs=1e-12)
    assert loratools.resize(one, tmp_path / "small", 2, dtype="f64").error <= 1e-12
    torch.testing.assert_close(delta(tmp_path / "small") / size, delta(one) / size, rtol=1e-9, atol=1e-9)
    loratools.extract_svd(
        model(tmp_path / "zero", 0.0), model(tmp_path / "tuned", size), tmp_path / "out", 2, dtype="f64"
    )
    W = load_file(tmp_path / "tuned" / "model.safetensors")[f"{ONE}.weight"]
    torch.testing.assert_close(delta(tmp_path / "out") / size, W / size, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", HELD)
def test_a_dtype_that_does_not_hold_the_factors_is_not_what_is_advised(size: float, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", size**0.5, size**0.5)
    with pytest.raises(IncompatibleAdapter, match="F64 holds them"):
        loratools.resize(one, tmp_path / "small", 1, dtype="f32")
