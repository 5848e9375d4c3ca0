"""The C code of thin factors against float64: every remainder of its blocks, what is not finite, and whom it serves."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from loratools.linalg.native import thin
from loratools.live.product import LowRankLinear, add_product, gradients

DTYPES = [torch.float32, torch.bfloat16]
PRECISION = {torch.float32: 2**-18, torch.bfloat16: 2**-6}


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> bool:
    """Tell whether the largest error is small against the largest number, or a term of 1, at a dtype's precision."""
    return bool((found.double() - exact).abs().max() <= PRECISION[dtype] * max(float(exact.abs().max()), 1.0))


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param not in thin.dtypes():
        pytest.skip("this processor, or an installation without a C compiler, leaves it to torch")
    return request.param


@pytest.mark.parametrize(("rows", "rank"), list(product([1, 3, 4, 7, 8, 12, 13, 31], [1, 2, 5, 8, 16, 17, 33])))
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 48), (64, 32)])
def test_outputs_and_gradients_are_those_of_float64(
    dtype: torch.dtype, rows: int, rank: int, inputs: int, outputs: int
) -> None:
    A, B = numbers(rank, inputs, seed=0), numbers(outputs, rank, seed=1)
    x, G = numbers(rows, inputs, seed=2, dtype=dtype), numbers(rows, outputs, seed=3, dtype=dtype)
    y, dx = numbers(rows, outputs, seed=4, dtype=dtype), numbers(rows, inputs, seed=5, dtype=dtype)
    # As torch does, factors and what lies between two products are rounded to the dtype of x; sums are not.
    a, b, X, D = (tensor.to(dtype).double() for tensor in (A, B, x, G))
    u, v = (tensor.to(dtype).double() for tensor in (X @ a.T, D @ b))
    exact_y, exact_dx = y.double() + 0.5 * u @ b.T, dx.double() + 0.5 * v @ a
    assert thin.serves(x, y, A, B)
    kept = thin.forward(x, y, A, B, 0.5)
    assert near(kept, u, dtype)
    assert near(y, exact_y, dtype)
    dA, dB = thin.backward(G, x, kept, A, B, 0.5, dx, True, True)
    assert dA is not None
    assert dB is not None
    assert near(dA, 0.5 * v.T @ X, dtype)
    assert near(dB, 0.5 * D.T @ u, dtype)
    assert near(dx, exact_dx, dtype)
    before = dx.clone()
    assert thin.backward(G, x, kept, A, B, 0.5, None, False, False) == (None, None)
    assert torch.equal(dx, before)


def test_torch_and_c_agree(dtype: torch.dtype) -> None:
    """What serves where C does not is held against it, in outputs and in gradients."""
    A, B = numbers(8, 64, seed=0), numbers(32, 8, seed=1)
    x, G = numbers(24, 64, seed=2, dtype=dtype), numbers(24, 32, seed=3, dtype=dtype)
    results = []
    for serves in (True, False):
        y, dx = numbers(24, 32, seed=4, dtype=dtype), numbers(24, 64, seed=5, dtype=dtype)
        if serves:
            u, by_c = add_product(y, x, A, B, 2.0)
            assert by_c
            results.append((y, dx, *thin.backward(G, x, u, A, B, 2.0, dx, True, True)))
        else:
            wide = x.T.contiguous().T  # the same numbers, not contiguous: torch's
            u, by_c = add_product(y, wide, A, B, 2.0)
            assert not by_c
            results.append((y, dx, *gradients(G, x, u, A, B, 2.0, dx, True, True)))
    for by_c, by_torch in zip(*results, strict=True):
        assert by_c is not None
        assert by_torch is not None
        assert by_c.dtype == by_torch.dtype
        assert near(by_c, by_torch.double(), dtype)


def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    A, B = numbers(3, 32, seed=0), numbers(16, 3, seed=1)
    x, y = numbers(13, 32, seed=2, dtype=dtype), torch.zeros(13, 16, dtype=dtype)
    x[5, 7], x[9, 0] = float("nan"), float("inf")
    thin.forward(x, y, A, B, 1.0)
    wrong = [row for row in range(13) if not y[row].isfinite().all()]
    assert wrong == [5, 9]
    assert y[5].isnan().all()


def test_who_is_served(dtype: torch.dtype) -> None:
    A, B = numbers(4, 32, seed=0), numbers(16, 4, seed=1)
    x, y = numbers(8, 32, seed=2, dtype=dtype), torch.zeros(8, 16, dtype=dtype)
    assert thin.serves(x, y, A, B)
    assert not thin.serves(x.double(), y.double(), A, B)
    assert not thin.serves(x, y, A.to(torch.bfloat16), B)  # factors are in float32
    assert not thin.serves(x[:, :24], y, A[:, :24].contiguous(), B)  # sides are multiples of 16
    assert not thin.serves(x[:0], y[:0], A, B)
    assert not thin.serves(x.to("meta"), y.to("meta"), A.to("meta"), B.to("meta"))
    large = torch.empty(1 << 15, 32, dtype=dtype), torch.empty(1 << 15, 16, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not thin.serves(*large, A, B)  # so many rows are quicker on several threads
        torch.set_num_threads(1)
        assert thin.serves(*large, A, B)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_the_function_trains_by_c_as_by_torch(dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    W, b = numbers(32, 64, seed=0, dtype=dtype), numbers(32, seed=1, dtype=dtype)
    G, grads = numbers(2, 6, 32, seed=5, dtype=dtype), []
    library, both = thin._library()
    for served in (both, ()):
        monkeypatch.setattr(thin, "_library", lambda served=served: (library, served))
        A, B = (numbers(*shape, seed=2).requires_grad_() for shape in ((5, 64), (32, 5)))
        x = numbers(2, 6, 64, seed=4, dtype=dtype).requires_grad_()
        y = LowRankLinear.apply(x, W, b, A, B, 0.5, p, 7)
        y.backward(G)
        grads.append((y.detach(), x.grad, A.grad, B.grad))
    for by_c, by_torch in zip(*grads, strict=True):
        assert near(by_c, by_torch.double(), dtype)


@pytest.mark.skipif(not thin.dtypes(), reason="this processor, or an installation without a C compiler")
def test_one_batch_after_another() -> None:
    x, y = numbers(3, 5, 32, seed=0), numbers(3, 5, 16, seed=1)
    F, P = numbers(3, 32, 16, seed=2), numbers(3, 16, 16, seed=3)
    exact = y.double() + x.double() @ F.double() @ P.double()
    thin.batch(x, y, F, P)
    assert near(y, exact, torch.float32)
