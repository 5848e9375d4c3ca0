"""Every kind of update on a CUDA device that the processor pretends to be: nothing of it is on two devices at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import merge
from tests.interop.test_peft_types import difference, listed, made
from tests.make.pretended_gpu import pretended
from tests.surgery.models import load

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.mark.sweep(60)
@pytest.mark.parametrize(("name", "settings"), listed())
def test_a_merge_on_a_device_is_that_of_the_processor(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _, base, adapter = made(tmp_path, name, settings)
    merge(base, adapter, tmp_path / "cpu")
    with pretended() as log:
        merge(base, adapter, tmp_path / "cuda", device="cuda")
    assert log.operations > 0
    cpu, cuda = load(tmp_path / "cpu"), load(tmp_path / "cuda")
    assert cpu.keys() == cuda.keys()
    for tensor in cpu:
        if cpu[tensor].dtype in (torch.float32, torch.bfloat16):
            assert difference(cuda[tensor], cpu[tensor]) < 1e-6, tensor
