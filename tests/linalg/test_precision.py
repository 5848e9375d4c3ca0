"""Full float32, whatever switches of torch are set, of both sets that it has; afterwards they are what they were."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys, traceback
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

def check(switch):
    exec(switch)
    before = state()
    with full_float32():
        with full_float32():
            inside = state()
        assert state() == inside
    assert state() == before, (before, state())
    assert set(inside[2:4]) <= {"ieee", "none"}, inside

for switch in sys.argv[1:]:
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            check(switch)
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        os._exit(0)
    os.close(writer)
    told = open(reader, "rb").read().decode()
    ended = os.wait()[1]
    print(json.dumps(told or "ended with {}".format(ended) * bool(ended)))
"""

SWITCHES = [
    "pass",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.fp32_precision = 'bf16'",
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
]


@pytest.fixture(scope="module")
def faults() -> dict[str, str]:
    """What was wrong with each switch: "" for nothing.

    Each is set in a process of its own, since torch keeps which of the two sets was used: a fork of one that has
    imported torch, and computed nothing.
    """
    import torch

    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has one set of switches")
    done = subprocess.run([sys.executable, "-c", PROGRAM, *SWITCHES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(zip(SWITCHES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_of_torch_is_off_inside_and_as_it_was_after(switch: str, faults: dict[str, str]) -> None:
    assert faults[switch] == ""
