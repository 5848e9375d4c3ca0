"""Changes of factors that are not loaded yet, each against torch on the loaded tensor."""

from __future__ import annotations

import pytest
import torch

from loratools.adapter import factors
from loratools.storage.lazy import LazyTensor

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def same(lazy: LazyTensor, expected: torch.Tensor) -> None:
    """Hold the dtype and shape that are known beforehand, and the numbers, against a tensor."""
    known = LazyTensor.of(expected)
    assert (lazy.dtype, lazy.shape) == (known.dtype, known.shape)
    assert torch.equal(lazy.load(), expected)


def test_parts_of_a_tensor() -> None:
    x = LazyTensor.of(X)
    same(factors.turned(x), X.T)
    same(factors.rows(x, 1, 3), X[1:3])
    same(factors.selected(x, 1, [3, 0]), X[:, [3, 0]])
    same(factors.item(x, 2), X[2])


def test_zeros_around_a_tensor() -> None:
    x = LazyTensor.of(X)
    same(factors.padded(x, 0, 5), torch.cat([X, torch.zeros(2, 4)]))
    same(factors.padded(x, 1, 7, start=2), torch.cat([torch.zeros(3, 2), X, torch.zeros(3, 1)], 1))
    assert factors.padded(x, 0, 3) is x
    same(factors.zeros((2, 5), "BF16"), torch.zeros(2, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dtype", "factor", "expected"),
    [
        (torch.bfloat16, 0.25, torch.bfloat16),
        (torch.bfloat16, 0.3, torch.float32),
        (torch.float16, 0.25, torch.float32),
        (torch.float32, -2.0, torch.float32),
        (torch.float64, 0.3, torch.float64),
    ],
)
def test_a_factor_is_rounded_once(dtype: torch.dtype, factor: float, expected: torch.dtype) -> None:
    x = X.to(dtype)
    same(factors.scaled(LazyTensor.of(x), factor), (x.double() * factor).to(expected))
    assert factors.scaled(LazyTensor.of(x), 1.0).dtype == LazyTensor.of(x).dtype


def test_tensors_together() -> None:
    half, wide = X.to(torch.bfloat16), X.double()
    same(factors.joined([LazyTensor.of(half), LazyTensor.of(half)]), torch.cat([half, half]))
    same(factors.joined([LazyTensor.of(half), LazyTensor.of(X)], 1), torch.cat([half.float(), X], 1))
    same(factors.joined([LazyTensor.of(half), LazyTensor.of(wide)]), torch.cat([half.double(), wide]))
    same(factors.stacked([LazyTensor.of(X), LazyTensor.of(2 * X)]), torch.stack([X, 2 * X]))
