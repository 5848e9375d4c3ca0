"""Single numbers in a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.dialects._frame.numbers import is_float32, is_number, most_common, read_number
from loratools.errors import BadFile
from loratools.storage.header import read_header
from loratools.storage.lazy import LazyTensor


def stored(tensor: torch.Tensor, folder: Path) -> LazyTensor:
    save_file({"alpha": tensor}, folder / "x.safetensors")
    return LazyTensor.stored(read_header(folder / "x.safetensors").tensors["alpha"])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int32]
)
def test_an_alpha_of_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    assert read_number(stored(torch.tensor(-24, dtype=dtype), tmp_path), "x.alpha") == -24.0


@pytest.mark.parametrize(
    "value", [torch.tensor([1.0, 2.0]), torch.tensor(True), torch.tensor(math.inf), torch.tensor(math.nan)]
)
def test_what_is_no_alpha(value: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=r"x\.alpha: (expected one number, found|(inf|nan) is no alpha)"):
        read_number(stored(value, tmp_path), "x.alpha")


def test_numbers_of_a_configuration() -> None:
    assert [is_number(value) for value in (1, -0.5, True, "1", None, math.inf, math.nan, 1e301)] == [True] * 2 + [
        False
    ] * 6
    assert [is_float32(value) for value in (0.5, 0.1, 2.0**-140, 1e39)] == [True, False, True, False]


def test_the_most_common_of_equals() -> None:
    assert most_common([2.0, 3.0, 3.0, 2.0, 0.0, 0.0, 0.0]) == 3.0
    assert most_common([2.0, 3.0, 3.0, 2.0, 1.0], smallest=True) == 2.0
    assert most_common([0.0]) == 1.0
