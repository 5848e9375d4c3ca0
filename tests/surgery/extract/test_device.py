"""Extraction on a CUDA device that the processor pretends to be: as near the optimum, and nothing on two devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.dialects import open_adapter
from loratools.errors import NoDevice
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy
from loratools.surgery.extract import extract
from tests.make.pretended_gpu import GPU, pretended
from tests.surgery.finetunes import pair
from tests.surgery.models import load, random

SHAPES = {"a": (96, 64), "b": (64, 300), "c": (640, 560), "d": (600, 700)}
"""Both sides over 512 in the last two: those are iterated, the others solved exactly."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("device")
    base = {f"{name}.weight": random(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    base["mlp.experts.down_proj"] = random(3, 40, 64, seed=9)
    tuned = {name: W + falling(W) for name, W in base.items()}
    return pair(folder, base, tuned, model_type="mixtral")


def falling(W: torch.Tensor) -> torch.Tensor:
    """Return a change with forty directions that fall, of each expert one of its own, and noise."""
    *stack, m, n = W.shape
    left, right = random(*stack, m, 40, seed=3), random(*stack, 40, n, seed=4)
    spectrum = torch.arange(1, 41).float() ** -1.0
    return 1e-2 * (left * spectrum) @ right + 1e-3 * random(*W.shape, seed=5)


def changes(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Return B·A, of three experts each its own: A is (experts, r, in), and B (out, r, experts), as PEFT has them."""
    if B.shape[0] != 40:
        return B @ A
    return torch.einsum("ore,eri->eoi", B.view(40, -1, 3), A.view(3, -1, A.shape[1]))


WAYS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a rank": (8, {}), "tight": (8, {"tight": True}), "an energy": (Ranks(Energy(0.8)), {}),
    "noise": (Ranks(noise=True, maximum=16), {}), "a budget": (Ranks(budget=20_000), {"dtype": "bf16"}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_device_extracts_what_the_processor_does(way: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    ranks, options = WAYS[way]
    here = extract(*models, tmp_path / "cpu", ranks, **options)
    with pretended() as log:
        there = extract(*models, tmp_path / "cuda", ranks, device="cuda", **options)
    assert log.operations > 100
    assert log.streams >= 1
    assert there.total.error == pytest.approx(here.total.error, rel=1e-5)
    ours, theirs = load(tmp_path / "cpu"), load(tmp_path / "cuda")
    assert ours.keys() == theirs.keys()
    for name in (name for name in ours if name.endswith("lora_A.weight")):
        B = name.replace("lora_A", "lora_B")
        products = [changes(each[B].double(), each[name].double()) for each in (ours, theirs)]
        assert float((products[0] - products[1]).norm() / products[0].norm()) < (2e-2 if "dtype" in options else 1e-2)
    (step,) = open_adapter(tmp_path / "cuda").provenance
    assert step.parameters["device"]["make"] == GPU
    assert "device" not in open_adapter(tmp_path / "cpu").provenance[0].parameters


def test_a_full_device_is_a_sentence_and_leaves_nothing(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pretended() as log:
        log.room = 1 << 18
        with pytest.raises(NoDevice, match=r"device cuda: its memory, or page-locked memory, is full \(CUDA out of"):
            extract(*models, tmp_path / "out", device="cuda")
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_without_float64_is_refused(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(NoDevice, match="device mps: it has no float64"):
        extract(*models, tmp_path / "out", device="mps")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_a_gpu_is_as_near_and_writes_the_same_bytes_again(models: tuple[Path, Path], tmp_path: Path) -> None:
    here = extract(*models, tmp_path / "cpu", 8)
    there = [extract(*models, tmp_path / f"cuda{threads}", 8, device="cuda", threads=threads) for threads in (1, 2)]
    assert there[0].total.error == pytest.approx(here.total.error, rel=3e-4)
    first, second = (load(tmp_path / f"cuda{threads}") for threads in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
