"""A cast that loses a number says so: infinities are refused, numbers that became zero are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools.decisions import warnings_to
from loratools.errors import IncompatibleAdapter
from loratools.storage import dtypes
from loratools.surgery.merge import MergeReport, merge
from loratools.surgery.verify import verify
from tests.surgery.models import DTYPES, load, lora, random, save, save_base

SHAPES = {"a": (8, 8)}
LARGEST = {name: float(torch.finfo(dtype).max) for name, dtype in DTYPES.items()}


def run(folder: Path, extra: dict[str, Tensor], dtype: str, rounding: str = "nearest") -> tuple[MergeReport, list[str]]:
    weights = {"a.weight": random(8, 8), **extra}
    base, paths = save(folder, weights, [lora(SHAPES)])
    warnings: list[str] = []
    with warnings_to(warnings.append):
        report = merge(base, paths, folder / "out", dtype=dtype, rounding=rounding)  # type: ignore[arg-type]
    return report, warnings


@pytest.mark.parametrize(
    ("stored", "value", "dtype"),
    [
        ("BF16", 1e5, "F16"),
        ("F32", -65536.0, "F16"),
        ("F32", LARGEST["F32"], "BF16"),
        ("F64", 1e39, "F32"),
        ("F64", -1e300, "BF16"),
    ],
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_infinities_that_a_cast_would_make(
    stored: str, value: float, dtype: str, rounding: str, tmp_path: Path
) -> None:
    extra = {name: random(5, 7).to(DTYPES[stored]) for name in ("b.weight", "c.weight", "d.weight")}
    for name, index in (("b.weight", (4, 6)), ("d.weight", (0, 0))):
        extra[name][index] = value
    extra["d.weight"][2] = value
    with pytest.raises(IncompatibleAdapter, match=f"2 tensor.* infinite in {dtype}") as refusal:
        run(tmp_path, extra, dtype, rounding)
    assert refusal.value.problems == ("b.weight: 1 number beyond it", "d.weight: 8 numbers beyond it")
    assert not (tmp_path / "out").exists()


def test_infinities_of_the_base_stay(tmp_path: Path) -> None:
    mask = torch.tensor([[0.0, float("-inf")], [float("nan"), 1.0]])
    report, warnings = run(tmp_path, {"mask": mask}, "F16")
    assert (report.changed, warnings) == (1, [])
    assert torch.equal(load(tmp_path / "out")["mask"].isinf(), mask.isinf())
    assert verify(tmp_path / "out", tmp_path / "base", tmp_path / "adapter0").ok


@pytest.mark.parametrize(
    ("stored", "dtype", "small"), [("F32", "F16", 2.0**-26), ("BF16", "F16", -1e-9), ("F64", "F32", 1e-50)]
)
def test_numbers_that_become_zero_are_counted(stored: str, dtype: str, small: float, tmp_path: Path) -> None:
    extra = {name: torch.ones(50, 60, dtype=DTYPES[stored]) for name in ("b.weight", "c.weight", "d.weight")}
    extra["b.weight"][:3] = small
    extra["c.weight"][7, 7] = small
    extra["d.weight"][:9] = 0
    _, warnings = run(tmp_path, extra, dtype)
    assert warnings == [
        "too small for their new dtype, and became zero: 181 numbers of 2 tensors, most of them in b.weight (180)"
    ]
    assert verify(tmp_path / "out", tmp_path / "base", tmp_path / "adapter0").ok


def test_of_a_changed_tensor_too(tmp_path: Path) -> None:
    adapter = lora(SHAPES)
    adapter.factors["a"][1][:4] = 0  # rows 0 to 3 do not change
    base, paths = save(tmp_path, {"a.weight": torch.full((8, 8), 1e-9)}, [adapter])
    warnings: list[str] = []
    with warnings_to(warnings.append):
        merge(base, paths, tmp_path / "out", dtype="F16")
    assert [warning.partition(": ")[2].partition(" of ")[0] for warning in warnings] == ["32 numbers"]


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_which_casts_can_lose_a_number(source: str, target: str) -> None:
    info, largest = torch.finfo(DTYPES[source]), torch.tensor(LARGEST[source], dtype=DTYPES[source])
    least = torch.tensor(info.smallest_normal * info.eps, dtype=torch.float64).to(DTYPES[source])
    assert least > 0
    lost = bool(largest.to(DTYPES[target]).isinf()) or bool(least.to(DTYPES[target]) == 0)
    assert dtypes.narrows(source, target) is lost


@pytest.mark.parametrize(
    ("name", "dtype"), [("ids", torch.int64), ("mask", torch.bool), ("freqs", torch.complex64), ("codes", torch.uint8)]
)
def test_what_is_no_float_is_never_cast(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = torch.arange(6).reshape(2, 3).to(dtype)
    run(tmp_path, {name: stored}, "BF16")
    merged = load(tmp_path / "out")
    assert merged[name].dtype == dtype
    assert torch.equal(merged[name], stored)


def test_verify_recomputes_casts(tmp_path: Path) -> None:
    """They are counted apart from what is equal byte by byte; an infinity, another number, a cast scale are not."""
    base = {"a.weight": random(8, 8), "b.weight": random(300, 40), "n": torch.arange(3), "big": torch.full((3, 3), 1e5)}
    base |= {"q.qweight": torch.zeros(2, 2, dtype=torch.int32), "q.scales": torch.ones(1, 2)}
    adapter = lora(SHAPES)
    path, paths = save(tmp_path, base, [adapter])
    half = {
        name: W.half() if W.is_floating_point() and name not in ("q.scales", "big") else W for name, W in base.items()
    }
    half["a.weight"] = (base["a.weight"].double() + adapter.delta("a")).half()
    account = verify(save_base(tmp_path / "good", half), path, paths)
    assert (account.ok, account.cast, account.identical) == (True, 1, 4)
    off = half["b.weight"].clone()
    off[299, 39] = torch.nextafter(off[299, 39], torch.tensor(9.0).half())
    wrong = {"b.weight": off, "n": base["n"].float(), "big": base["big"].half(), "q.scales": base["q.scales"].half()}
    for name, tensor in wrong.items():
        account = verify(save_base(tmp_path / name, half | {name: tensor}), path, paths)
        assert (account.ok, account.differing) == (False, (name,))
