"""Full float32, whatever switches of torch are set, of both sets that it has; afterwards they are what they were."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from loratools.linalg.precision import full_float32

def state():
    read = (
        lambda: torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision,
        *(lambda each=each: each.fp32_precision for each in (
            torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends,
        )),
    )
    told = []
    for each in read:
        try:
            told.append(each())
        except RuntimeError:
            told.append("mixed")
    return told

{switch}
before = state()
with full_float32():
    with full_float32():
        inside = state()
    assert state() == inside
assert state() == before, (before, state())
assert set(inside[2:4]) <= {{"ieee", "none"}}, inside
"""


@pytest.mark.parametrize(
    "switch",
    [
        "pass",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.set_float32_matmul_precision('high')",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.fp32_precision = 'tf32'",
        "torch.backends.mkldnn.fp32_precision = 'bf16'",
        "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    ],
)
def test_every_switch_of_torch_is_off_inside_and_as_it_was_after(switch: str) -> None:
    """Each in a process of its own: torch keeps which of the two sets was used."""
    import torch

    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has one set of switches")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(switch=switch)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
