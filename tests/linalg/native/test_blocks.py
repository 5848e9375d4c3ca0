"""Steps of a block Krylov iteration: the space that float64 spans, orthonormal to rounding, alike at every width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratools.linalg.native import delta
from loratools.linalg.native.blocks import Steps
from loratools.linalg.svd.start import random_columns
from tests.linalg.matrices import power_law, signal_and_noise, with_spectrum

WIDTHS = delta.widths()
pytestmark = pytest.mark.skipif(not WIDTHS, reason="the C code is not compiled, or does not serve here")

M, N = 640, 530
EPS = 2.0**-24


def grown(
    D: np.ndarray, block: int, steps: int, *, turned: bool = False, onward: bool = True, room: int = 256,
    width: int | None = None,
) -> Steps:  # fmt: skip
    made = Steps(np.ascontiguousarray(D.T) if turned else D, turned, block, room)
    for step in range(steps):
        assert made.step(random_columns(len(D), block, 0) if step == 0 else None, onward=onward, width=width)
    return made


def spanned(D: np.ndarray, block: int, steps: int) -> np.ndarray:
    """Return an orthonormal basis of DᵀS, DᵀD·DᵀS, … in float64."""
    D = D.astype(float)
    V = last = np.linalg.qr(D.T @ random_columns(len(D), block, 0))[0]
    for _ in range(steps - 1):
        new = D.T @ (D @ last)
        for _ in range(2):
            new = new - V @ (V.T @ new)
        last = np.linalg.qr(new)[0]
        V = np.concatenate([V, last], 1)
    return V


MATRICES = {
    "noise": signal_and_noise(M, N, signals=0), "signal+noise": signal_and_noise(M, N), "i^-0.5": power_law(-0.5, M, N),
    "one dominates": signal_and_noise(M, N) + 500 * with_spectrum(torch.ones(1, dtype=torch.float64), M, N),
}  # fmt: skip


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("onward", [False, True], ids=["once", "onward"])
@pytest.mark.parametrize("name", MATRICES)
def test_a_basis_is_orthonormal_and_spans_what_float64_does(name: str, onward: bool, turned: bool) -> None:
    D = MATRICES[name].float().numpy()
    made = grown(D, 16, 6, turned=turned, onward=onward)
    V, Y, G = made.V.astype(float), made.Y.astype(float), made.G
    assert made.width == 96
    assert np.abs(V.T @ V - np.eye(96)).max() < 8 * EPS
    assert np.abs(D.astype(float) @ V - Y).max() < 32 * EPS * np.abs(Y).max()
    near = np.abs(np.subtract.outer(np.arange(96) // 16, np.arange(96) // 16)) < 2
    assert np.abs(Y.T @ Y - G)[near].max() < 1e-12 * G.max()
    assert np.abs(Y.T @ Y)[~near].max() < 2e-6 * G.max()
    assert not G[~near].any()
    found, wanted = (np.linalg.eigvalsh(Z.T @ Z)[-32:] for Z in (Y, D.astype(float) @ spanned(D, 16, 6)))
    assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("block", [16, 32, 48, 64])
def test_blocks_of_any_size_and_room_have_one_result_at_every_width(block: int) -> None:
    D = power_law(-0.3, M, N).float().numpy()
    made = [
        (made.V.tobytes(), made.Y.tobytes(), made.G.tobytes())
        for width in WIDTHS for room in (256, block)
        for made in [grown(D, block, 4, room=room, width=width)]
    ]  # fmt: skip
    assert len(set(made)) == 1
    made_once = grown(D, block, 4)
    assert np.abs(made_once.V.T.astype(float) @ made_once.V - np.eye(4 * block)).max() < 8 * EPS


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_columns_that_depend_on_each_other_are_not_added(turned: bool) -> None:
    low = with_spectrum(torch.ones(20, dtype=torch.float64), M, N).float().numpy()
    made = grown(low, 16, 1, turned=turned)
    assert not made.step()
    assert made.width == 16
    S = random_columns(M, 16, 0).copy()
    S[:, 3] = S[:, 4] + S[:, 5]
    made = Steps(power_law(-0.3, M, N).float().numpy(), False, 16, 64)
    assert not made.step(S)
    assert made.width == 0
    assert not Steps(np.zeros((M, N), np.float32), False, 16, 64).step(random_columns(M, 16, 0))


def test_what_does_not_go_together_is_refused() -> None:
    D = power_law(-0.3, 64, 48).float().numpy()
    for rows, turned, block in ((D, True, 16), (D.T, False, 16), (D, False, 8), (D, False, 80), (D, False, 0)):
        with pytest.raises(ValueError, match="does not take steps of"):
            Steps(np.ascontiguousarray(rows), turned, block, 32)
    with pytest.raises(ValueError, match="begins with S"):
        Steps(D, False, 16, 32).step()
    with pytest.raises(ValueError, match="S is float32"):
        Steps(D, False, 16, 32).step(random_columns(63, 16, 0))
