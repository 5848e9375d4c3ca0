"""Merging on a device: the policy where there is one, a sentence where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools.engine.device import check, exact_products, own_stream
from loratools.errors import NoDevice
from loratools.surgery.merge import merge
from tests.surgery.models import load, lora, random, save_adapter, save_base

SHAPES = {"a": (256, 512), "b": (512, 256)}


def models(folder: Path) -> tuple[Path, Path]:
    weights = {
        f"{name}.weight": random(*shape, seed=i, dtype=torch.bfloat16) for i, (name, shape) in enumerate(SHAPES.items())
    }
    return save_base(folder / "base", weights), save_adapter(folder / "adapter", lora(SHAPES, rank=8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base, adapter = models(tmp_path)
    with pytest.raises(NoDevice, match=r"device cuda: torch .* finds none on this machine"):
        merge(base, [adapter], tmp_path / "out", device="cuda")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.gpu
def test_a_gpu_differs_from_the_processor_in_ties_alone(tmp_path: Path) -> None:
    base, adapter = models(tmp_path)
    merge(base, [adapter], tmp_path / "cpu")
    merge(base, [adapter], tmp_path / "cuda", device="cuda")
    cpu, cuda = load(tmp_path / "cpu"), load(tmp_path / "cuda")
    bits = {name: (cpu[name].view(torch.int16).int() - cuda[name].view(torch.int16).int()).abs() for name in cpu}
    assert max(int(off.max()) for off in bits.values()) <= 1
    assert sum(int(off.sum()) for off in bits.values()) <= 1e-3 * sum(off.numel() for off in bits.values())


def test_settings_of_torch_come_back() -> None:
    matmul, before = torch.backends.cuda.matmul, (torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32)

    def fail() -> None:
        with exact_products("cuda"):
            assert (torch.get_num_threads(), matmul.allow_tf32) == (1, False)
            raise InterruptedError

    try:
        torch.set_num_threads(2)
        matmul.allow_tf32 = True
        with pytest.raises(InterruptedError):
            fail()
        assert (torch.get_num_threads(), matmul.allow_tf32) == (2, True)
    finally:
        torch.set_num_threads(before[0])
        matmul.allow_tf32 = before[1]


def test_the_processor_has_no_streams_and_needs_no_check() -> None:
    check("cpu")
    with own_stream(torch.device("cpu")) as stream:
        assert stream is None
