"""Merging on a device: the policy where there is one, a sentence where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.engine.arithmetic import native
from loratools.engine.device import check, exact_products, own_stream
from loratools.errors import NoDevice
from loratools.options import Device
from loratools.surgery.merge import merge
from tests.surgery.models import load, lora, random, save_adapter, save_base

SHAPES = {"a": (256, 512), "b": (512, 256)}


def models(folder: Path) -> tuple[Path, Path]:
    weights = {
        f"{name}.weight": random(*shape, seed=i, dtype=torch.bfloat16) for i, (name, shape) in enumerate(SHAPES.items())
    }
    return save_base(folder / "base", weights), save_adapter(folder / "adapter", lora(SHAPES, rank=8))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(device: Device, tmp_path: Path) -> None:
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip("there is one")
    base, adapter = models(tmp_path)
    with pytest.raises(NoDevice, match=rf"device {device}: torch .* finds none on this machine"):
        merge(base, [adapter], tmp_path / "out", device=device)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("what", ["dora", "float64"])
def test_what_needs_float64_is_not_given_to_a_gpu_of_apple(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU of Apple is needed to see it: nothing of these reaches one, and without this rule torch would refuse."""
    dtype = torch.float64 if what == "float64" else torch.bfloat16
    weights = {f"{name}.weight": random(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    base, adapter = save_base(tmp_path / "base", weights), save_adapter(tmp_path / "adapter", lora(SHAPES, rank=8))
    if what == "dora":
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": True}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        norms = {
            f"base_model.model.{name}.lora_magnitude_vector": weights[f"{name}.weight"].float().norm(dim=1) * 1.1
            for name in SHAPES
        }
        file = adapter / "adapter_model.safetensors"
        save_file(load_file(file) | norms, file, {"format": "pt"})
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(native, "serves", lambda *_: False)
    for device in ("cpu", "mps"):
        merge(base, [adapter], tmp_path / device, device=device)
    cpu, mps = load(tmp_path / "cpu"), load(tmp_path / "mps")
    assert all(torch.equal(cpu[name], mps[name]) for name in cpu)
    assert not any(torch.equal(cpu[name], weights[name]) for name in cpu)


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
