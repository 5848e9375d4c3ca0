"""Products of one shape as one array, whatever their factors are stored as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loratools.adapter import kinds, low_rank
from loratools.adapter.kinds import Update
from loratools.adapter.parts import A, B
from loratools.storage.header import read_header
from loratools.storage.lazy import LazyTensor


def lora(seed: int, dtype: torch.dtype, folder: Path | None, kind: str = "lora", rank: int = 3) -> Update:
    """Return an update of rank 3 of a (5, 4) weight, in a file or in memory."""
    generator = torch.Generator().manual_seed(seed)
    sides = (1, 1) if kind == "conv" else ()
    a, b = torch.randn(rank, 4, *sides, generator=generator), torch.randn(5, rank, *sides, generator=generator)
    tensors = {A: a.to(dtype), B: b.to(dtype)}
    parts = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    if folder:
        save_file(tensors, folder / f"{seed}.safetensors")
        specs = read_header(folder / f"{seed}.safetensors").tensors
        parts = {name: LazyTensor.stored(spec) for name, spec in specs.items()}
    built: Update = kinds.get(kind).build(parts, 0.5 + seed, 8.0)
    return built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, "mixed"])
@pytest.mark.parametrize("stored", [True, False, "some"])
@pytest.mark.parametrize("kind", ["lora", "conv"])
def test_a_stack_is_what_its_products_are_one_by_one(
    dtype: torch.dtype | str, stored: bool | str, kind: str, tmp_path: Path
) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    parts = [
        lora(
            i, dtype if isinstance(dtype, torch.dtype) else dtypes[i],
            tmp_path if stored is True or (stored == "some" and i == 1) else None, kind,
        )
        for i in range(3)
    ]  # fmt: skip
    left, right, scales = low_rank.stacked(parts)
    assert scales == [0.5, 1.5, 2.5]
    for i, part in enumerate(parts):
        one_left, one_right, scale = low_rank.arrays(part)
        exact_left, exact_right = low_rank.load(part)
        np.testing.assert_array_equal(left[i], one_left)
        np.testing.assert_array_equal(right[i], one_right)
        np.testing.assert_array_equal(left[i].astype(np.float64) * scale, exact_left.numpy())
        np.testing.assert_array_equal(right[i].astype(np.float64), exact_right.numpy())


def test_products_of_several_shapes_are_no_stack(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shape"):
        low_rank.stacked([lora(0, torch.float32, tmp_path), lora(1, torch.float32, tmp_path, rank=2)])
