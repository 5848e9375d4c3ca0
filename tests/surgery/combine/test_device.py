"""Combining and resizing on a CUDA device that the processor pretends to be: the same change, on one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.dialects import open_adapter
from loratools.errors import NoDevice
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy
from loratools.surgery.combine import combine, methods
from loratools.surgery.resize import resize
from tests.make.pretended_gpu import GPU, pretended
from tests.surgery.models import load, lora, save_adapter

SHAPES = {"a": (96, 64), "b": (64, 300), "c": (320, 280)}
MORE: dict[str, dict[str, Any]] = {
    "dare": {"seed": 3}, "dare_ties": {"seed": 3}, "della": {"seed": 3}, "della_linear": {"seed": 3},
    "breadcrumbs": {"gamma": 0.02}, "sce": {},
}  # fmt: skip
LIKE = [("ties", "peft"), ("ties", "mergekit"), ("dare", "peft"), ("dare", "mergekit"), ("della", "mergekit")]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("device")
    return [save_adapter(folder / str(i), lora(SHAPES, rank=4 + i, seed=5 * i)) for i in range(3)]


def change_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return s·B·A in float64 by module; the scaling of a result is 1."""
    updates = open_adapter(folder).updates
    return {module: update.delta_weight().double() for module, update in updates.items()}


def expect_alike(first: Path, second: Path) -> None:
    ours, theirs = change_of(first), change_of(second)
    assert ours.keys() == theirs.keys() != set()
    for module in ours:
        assert float((ours[module] - theirs[module]).norm() / ours[module].norm()) < 1e-5, module
    assert {name: W.shape for name, W in load(first).items()} == {name: W.shape for name, W in load(second).items()}


@pytest.mark.parametrize(("method", "like"), [*((name, None) for name in methods.names()), *LIKE])
def test_every_method_on_a_device(method: str, like: Any, adapters: list[Path], tmp_path: Path) -> None:
    more = MORE.get(method, {}) | ({} if method == "linear" else {"density": 0.6})
    weights = None if method == "sce" else [0.7, -0.4, 1.0]
    ranks = None if method == "linear" else 8
    given: dict[str, Any] = {"method": method, "like": like, "weights": weights, "ranks": ranks, **more}
    here = combine(adapters, tmp_path / "cpu", **given)
    with pretended() as log:
        there = combine(adapters, tmp_path / "cuda", device="cuda:1", **given)
    assert log.operations > 50
    assert [share.rank for share in there.shares] == [share.rank for share in here.shares]
    assert there.error == pytest.approx(here.error, rel=1e-4, abs=1e-9)
    expect_alike(tmp_path / "cpu", tmp_path / "cuda")
    assert open_adapter(tmp_path / "cuda").provenance[-1].parameters["device"]["make"] == GPU
    assert "device" not in open_adapter(tmp_path / "cpu").provenance[-1].parameters


@pytest.mark.parametrize("ranks", [2, Ranks(Energy(0.7)), Ranks(budget=3000)], ids=["rank", "energy", "budget"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_resize_on_a_device(ranks: Any, dtype: Any, adapters: list[Path], tmp_path: Path) -> None:
    here = resize(adapters[0], tmp_path / "cpu", ranks, dtype=dtype)
    with pretended():
        there = resize(adapters[0], tmp_path / "cuda", ranks, dtype=dtype, device="cuda")
    assert [share.rank for share in there.shares] == [share.rank for share in here.shares]
    assert there.optimum == pytest.approx(here.optimum, rel=1e-9)
    if dtype == "f32":
        expect_alike(tmp_path / "cpu", tmp_path / "cuda")


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoDevice, match=r"device cuda: torch .* finds none on this machine"):
        combine(adapters, tmp_path / "out", device="cuda")
    with pytest.raises(NoDevice, match=r"device cuda:1: torch .* finds none on this machine"):
        resize(adapters[0], tmp_path / "out", 2, device=torch.device("cuda", 1))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(NoDevice, match="device mps: it has no float64"):
        combine(adapters, tmp_path / "out", device="mps")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["linear", "ties", "core_space"])
def test_a_gpu_combines_what_the_processor_does(method: str, adapters: list[Path], tmp_path: Path) -> None:
    more: dict[str, Any] = {} if method == "linear" else {"density": 0.6}
    for device in ("cpu", "cuda"):
        combine(adapters, tmp_path / device, method=method, ranks=4, device=device, **more)
    ours, theirs = change_of(tmp_path / "cpu"), change_of(tmp_path / "cuda")
    assert all(float((ours[name] - theirs[name]).norm() / ours[name].norm()) < 1e-3 for name in ours)
