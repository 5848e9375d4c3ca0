"""Merging on a device: the policy where there is one, a sentence where there is none."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils import deterministic

from loratools.engine.arithmetic import native
from loratools.engine.device import LANES, TILES, check, exact_products, told_plainly
from loratools.engine.lane import Lane
from loratools.errors import NoDevice
from loratools.options import Device
from loratools.surgery.merge import merge
from tests.make.pretended_gpu import GPU, pretended
from tests.surgery.models import load, lora, random, save_adapter, save_base

SHAPES = {"a": (256, 512), "b": (512, 256)}


def models(folder: Path, dtype: torch.dtype = torch.bfloat16, *, dora: bool = False) -> tuple[Path, Path]:
    weights = {f"{name}.weight": random(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    base, adapter = save_base(folder / "base", weights), save_adapter(folder / "adapter", lora(SHAPES, rank=8))
    if dora:
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"use_dora": True}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        norms = {
            f"base_model.model.{name}.lora_magnitude_vector": weights[f"{name}.weight"].float().norm(dim=1) * 1.1
            for name in SHAPES
        }
        file = adapter / "adapter_model.safetensors"
        save_file(load_file(file) | norms, file, {"format": "pt"})
    return base, adapter


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(device: Device, tmp_path: Path) -> None:
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip("there is one")
    base, adapter = models(tmp_path)
    with pytest.raises(NoDevice, match=rf"device {device}: torch .* finds none on this machine"):
        merge(base, [adapter], tmp_path / "out", device=device)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def merged_and_left(folder: Path, device: str, **options: Any) -> tuple[str, list[str]]:
    """Return what a merge on a pretended device says that cannot be, and what lies in the folder then."""
    base, adapter = models(folder)
    with pytest.raises(NoDevice) as refusal:
        merge(base, [adapter], folder / "out", device=device, **options)
    assert refusal.value.hint
    return refusal.value.message, sorted(path.name for path in folder.iterdir())


def test_a_number_beyond_the_last_device_is_refused(tmp_path: Path) -> None:
    with pretended():
        message, left = merged_and_left(tmp_path, "cuda:2")
    assert (message, left) == ("device cuda:2: this machine has cuda:0 to cuda:1", ["adapter", "base"])


def test_a_full_device_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with pretended() as log:
        log.room = 1 << 16
        message, left = merged_and_left(tmp_path, "cuda")
    assert message.startswith("device cuda: its memory, or page-locked memory, is full (CUDA out of memory. Tried")
    assert left == ["adapter", "base"]


def test_a_device_that_cannot_compute_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a driver is that is too old for this build of torch: it lists the device, and fails at the first number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def ones(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch, "ones", ones)
    message, left = merged_and_left(tmp_path, "cuda")
    why = "CUDA error: no kernel image is available for execution on the device"
    assert message == f"device cuda: torch cannot compute on it ({why})"
    assert left == ["adapter", "base"]


def test_what_torch_warns_of_is_in_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def old_driver() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old.\nUpdate it.", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", old_driver)
    with pytest.raises(NoDevice, match=r"none on this machine \(CUDA init.*The NVIDIA driver .* is too old\)\n"):
        check("cuda")


def test_an_error_that_is_not_the_devices_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="pieces"), told_plainly("cuda"):
        raise RuntimeError("3 of 5 pieces of the output were not written")
    with pytest.raises(RuntimeError, match="CUDA"), told_plainly("cpu"):
        raise RuntimeError("CUDA error")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_device_computes_what_the_processor_does(
    dtype: torch.dtype, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code on tensors that say they are on a device, in tiles of a few rows: the bytes of torch's own path."""
    base, adapter = models(tmp_path, dtype, dora=kind == "dora")
    monkeypatch.setattr(native, "serves", lambda *_: False)
    for kind in TILES:
        monkeypatch.setitem(TILES, kind, 1 << 14)
    merge(base, [adapter], tmp_path / "cpu", retention="full")
    with pretended() as log:
        merge(base, [adapter], tmp_path / "cuda", device="cuda:1", retention="full", threads=2)
    cpu, cuda = load(tmp_path / "cpu"), load(tmp_path / "cuda")
    assert all(torch.equal(cpu[name], cuda[name]) for name in cpu)
    assert 1 <= log.streams <= 2
    record = json.loads((tmp_path / "cuda" / "loratools.json").read_text())
    told = {"kind": "cuda", "make": GPU, "torch": torch.__version__, "precision": "float32, no TF32"}
    assert record["device"] == told
    plain = json.loads((tmp_path / "cpu" / "loratools.json").read_text())
    assert "device" not in plain
    assert record["retention"] == pytest.approx(plain["retention"], rel=1e-12)


def test_page_locked_memory_is_bounded_for_any_number_of_threads(tmp_path: Path) -> None:
    shapes = {str(i): (512, 64) for i in range(40)}
    weights = {f"{name}.weight": random(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    base, adapter = save_base(tmp_path / "base", weights), save_adapter(tmp_path / "adapter", lora(shapes, rank=2))
    with pretended() as log:
        merge(base, [adapter], tmp_path / "out", device="cuda", threads=64)
    assert 0 < log.pinned <= 2 * LANES * TILES["cuda"] == 256 << 20
    assert log.streams <= LANES


@pytest.mark.parametrize("what", ["dora", "float64"])
def test_what_needs_float64_is_not_given_to_a_gpu_of_apple(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU of Apple is needed to see it: nothing of these reaches one, and without this rule torch would refuse."""
    dtype = torch.float64 if what == "float64" else torch.bfloat16
    base, adapter = models(tmp_path, dtype, dora=what == "dora")
    weights = load(base)
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


@pytest.mark.parametrize("before", [None, ":16:8"])
def test_sums_are_in_one_order_on_a_device_and_nothing_is_left_behind(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "CUBLAS_WORKSPACE_CONFIG"
    if before:
        monkeypatch.setenv(name, before)
    else:
        monkeypatch.delenv(name, raising=False)
    with exact_products("cpu"):
        assert (torch.get_deterministic_debug_mode(), os.environ.get(name)) == (0, before)
    with exact_products("cuda:1"):
        assert torch.get_deterministic_debug_mode() == 1
        assert os.environ[name] == (before or ":4096:8")
        assert not deterministic.fill_uninitialized_memory
    assert (torch.get_deterministic_debug_mode(), os.environ.get(name)) == (0, before)
    assert deterministic.fill_uninitialized_memory


@pytest.mark.gpu
@pytest.mark.parametrize("dora", [False, True])
def test_a_gpu_writes_the_same_bytes_with_any_threads(dora: bool, tmp_path: Path) -> None:
    base, adapter = models(tmp_path, dora=dora)
    for threads in (1, 2, 8):
        merge(base, [adapter], tmp_path / str(threads), device="cuda", threads=threads)
    first, *others = (load(tmp_path / str(threads)) for threads in (1, 2, 8))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


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
    with Lane.of("cpu").open() as stream:
        assert stream is None
    assert Lane.of("cpu").send(there := torch.ones(2, 2)) is there
