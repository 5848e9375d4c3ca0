"""Products with few columns, by C and by torch: one result to float32, whichever way D lies in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratools.linalg import products
from loratools.linalg.native import delta


def matrix(kind: str) -> Tensor:
    D = torch.randn(300, 170, generator=torch.Generator().manual_seed(1))
    turned = D.T.contiguous().T
    ways = {"rows": D, "transposed": turned, "a part": D[10:, :150], "strided": D[:, ::2], "wide": D.double()}
    return ways[kind]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["rows", "transposed", "a part", "strided", "wide"])
def test_products_are_right_however_d_lies(kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(delta, "available", lambda: False)
    D = matrix(kind)
    X = torch.randn(24, D.shape[1], generator=torch.Generator().manual_seed(2), dtype=D.dtype).T
    Y = torch.randn(D.shape[0], 24, generator=torch.Generator().manual_seed(3), dtype=D.dtype)
    torch.testing.assert_close(products.times(D, X).double(), D.double() @ X.double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(products.across(D, Y).double(), D.T.double() @ Y.double(), atol=1e-4, rtol=0)
    together = products.both(D, X)
    if compiled and delta.available() and kind in ("rows", "a part"):
        assert together is not None
        assert together[0].equal(products.times(D, X))
        assert together[1].equal(products.across(D, together[0]))
    else:
        assert together is None
    summed = products.gram64(Y, Y)
    if D.dtype == torch.float32 and delta.available():
        assert summed is not None
        torch.testing.assert_close(summed, Y.double().T @ Y.double(), atol=1e-12, rtol=0)
    else:
        assert summed is None


def test_torchs_threads_change_no_bit() -> None:
    if not delta.available():
        pytest.skip("the C code is not compiled here")
    D, before = matrix("rows"), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            Y = products.times(D, torch.eye(170, 40))
            made.append((Y.numpy().tobytes(), products.across(D, Y).numpy().tobytes()))
    finally:
        torch.set_num_threads(before)
    assert len(set(made)) == 1
