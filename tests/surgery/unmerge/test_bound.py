"""The bound of an approximate unmerge is true: for casts, stochastic rounding, numbers near zero, large products."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.adapter import kinds
from loratools.adapter.model import Adapter
from loratools.storage.lazy import LazyTensor
from loratools.surgery.merge import merge
from loratools.surgery.unmerge import UnmergeReport, unmerge
from tests.surgery.models import DTYPES, load, lora, random, save_adapter, save_base

SHAPES = {"a.up": (24, 40), "a.down": (40, 24)}


def model(folder: Path, dtype: str, scale: float = 0.05) -> Path:
    weights = {
        f"{name}.weight": random(*shape, seed=i, scale=scale, dtype=DTYPES[dtype])
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return save_base(folder, weights | {"norm.weight": random(40, scale=300 * scale, dtype=DTYPES[dtype])})


def taken_out(folder: Path, base: Path, adapter: Path | Adapter, **options: Any) -> tuple[UnmergeReport, float]:
    """Merge an adapter, take it out, and return the report with the largest error of any element."""
    folder.mkdir(exist_ok=True)
    merge(base, adapter, folder / "merged", **options)
    report = unmerge(folder / "merged", adapter, folder / "back")
    W, back = load(base), load(folder / "back")
    return report, max(float((W[name].double() - back[name].double()).abs().max()) for name in W)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_stochastic_rounding_errs_by_a_whole_unit(dtype: str, tmp_path: Path) -> None:
    base = model(tmp_path / "base", dtype)
    adapter = save_adapter(tmp_path / "adapter", lora(SHAPES, scale=0.3))
    plain, _ = taken_out(tmp_path / "plain", base, adapter)
    report, worst = taken_out(tmp_path / "drawn", base, adapter, rounding="stochastic")
    assert worst <= report.error_bound
    assert report.error_bound > 1.3 * plain.error_bound


@pytest.mark.parametrize("out", ["BF16", "F16"])
def test_a_cast_counts_for_tensors_that_no_adapter_touched(out: str, tmp_path: Path) -> None:
    base = model(tmp_path / "base", "F32")
    adapter = save_adapter(tmp_path / "adapter", lora(SHAPES))
    report, worst = taken_out(tmp_path, base, adapter, dtype=out)
    assert worst <= report.error_bound < 20 * worst
    assert f"tensors stay in {out}, in which the merge stored them; the base may have others" in report.notes


def test_numbers_near_zero_have_a_fixed_step(tmp_path: Path) -> None:
    base = model(tmp_path / "base", "F16", scale=2e-6)
    adapter = save_adapter(tmp_path / "adapter", lora(SHAPES, scale=1e-3))
    report, worst = taken_out(tmp_path, base, adapter, rounding="stochastic")
    assert 0 < worst <= report.error_bound < 1e-6


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_products_that_cancel_lose_digits(dtype: str, tmp_path: Path) -> None:
    """Two adapters whose changes are large and cancel: what the sums lose shows in neither W' nor W."""
    base = model(tmp_path / "base", dtype)
    large = lora(SHAPES, rank=8, scale=3.0)
    less = {name: (A, -(B + 1e-6)) for name, (A, B) in large.factors.items()}
    both = {
        name: (torch.cat([A, less[name][0]]), torch.cat([B, less[name][1]], 1))
        for name, (A, B) in large.factors.items()
    }
    adapter = save_adapter(tmp_path / "adapter", type(large)(both, alpha=16.0))
    other = save_adapter(tmp_path / "other", lora({"a.up": SHAPES["a.up"]}, seed=5, scale=2.0))
    merge(base, [adapter, other], tmp_path / "merged")
    report = unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    merge(base, other, tmp_path / "wanted", dtype="F64")
    wanted, back = load(tmp_path / "wanted"), load(tmp_path / "back")
    worst = max(float((wanted[name] - back[name].double()).abs().max()) for name in wanted)
    assert worst <= report.error_bound


@pytest.mark.parametrize("kind", ["loha", "lokr", "full"])
def test_other_kinds_that_add(kind: str, tmp_path: Path) -> None:
    """They are no product of two factors."""
    sizes = {
        "loha": {"hada_w1_a": (24, 4), "hada_w1_b": (4, 40), "hada_w2_a": (24, 4), "hada_w2_b": (4, 40)},
        "lokr": {"lokr_w1": (2, 4), "lokr_w2_a": (12, 3), "lokr_w2_b": (3, 10)},
        "full": {"diff": (24, 40)},
    }[kind]
    parts = {name: LazyTensor.of(random(*size, seed=i, scale=2.0)) for i, (name, size) in enumerate(sizes.items())}
    adapter = Adapter({"a.up": kinds.get(kind).build(parts, 0.7, 3.0)})
    for dtype in ("F32", "BF16"):
        report, worst = taken_out(tmp_path / dtype, model(tmp_path / f"base-{dtype}", dtype), adapter)
        assert 0 < worst <= report.error_bound


def test_a_model_without_a_record_says_what_is_taken_for_granted(tmp_path: Path) -> None:
    base = model(tmp_path / "base", "BF16")
    adapter = save_adapter(tmp_path / "adapter", lora(SHAPES, scale=0.3))
    merge(base, adapter, tmp_path / "merged")
    (tmp_path / "merged" / "loratools.json").unlink()
    report = unmerge(tmp_path / "merged", adapter, tmp_path / "back")
    assert any(
        "no record of its merge, so the bound takes it that the tensors were rounded once" in n for n in report.notes
    )
