"""The benchmark of a GPU runs without one, on CPU tensors, and what it finds there is what the processor computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.make import REPOSITORY


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose numbers may differ")
def test_the_small_run_measures_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", tmp_path, "--small", "--runs", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[:2] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == [
        ["| model", "what"], ["| small", "cp -r"], ["| small", "merge, cpu"], ["| small", "merge, cuda"],
        ["| small", "extract-svd, cpu"], ["| small", "extract-svd, cuda"],
        ["| 70b, 1 block(s)", "extract-svd, cpu"], ["| 70b, 1 block(s)", "extract-svd, cuda"],
        ["| 70b, 2 block(s)", "extract-svd, cpu"], ["| 70b, 2 block(s)", "extract-svd, cuda"],
    ]  # fmt: skip
    assert "differ from the processor's, by 0 unit(s) at most; 0 between two runs" in done.stdout
    assert "CPU tensors in its place, whose times say nothing of a GPU" in done.stdout
