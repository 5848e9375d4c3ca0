"""The decomposition without torch: the steps and the numbers of the one with it, and what it leaves to that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.linalg.native import delta
from loratools.linalg.svd import usual
from loratools.linalg.svd.truncated import truncated_svd
from tests.linalg.matrices import power_law, signal_and_noise, with_spectrum

pytestmark = pytest.mark.skipif(not delta.available(), reason="the C code is not compiled, or does not serve here")

MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "noise": partial(signal_and_noise, signals=0), "signal+noise": signal_and_noise,
    "i^-0.3": partial(power_law, -0.3), "i^-0.5": partial(power_law, -0.5),
}  # fmt: skip
SHAPES = [(960, 700), (700, 960), (600, 601), (300, 180), (200, 400)]
"""Both sides over 512 are iterated, the last two are solved through their Gram matrix."""


def norm2_of(D: Tensor) -> float:
    return float(D.double().square().sum())


def leading(D: Tensor, rank: int, **options: object) -> usual.Leading | None:
    return usual.leading(D.numpy(), rank, norm2_of(D), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_it_is_near_the_optimum_and_says_truly_how_near(name: str, shape: tuple[int, int], turned: bool) -> None:
    D = MATRICES[name](*shape).float()
    D = D.T.contiguous().T if turned else D
    values = torch.linalg.svdvals(D.double())
    for rank in (3, 12 if name == "noise" else 32):  # the values of noise may be one, often repeated
        found = leading(D, rank, tolerance=6e-4)
        assert found is not None
        B, A = (torch.from_numpy(np.ascontiguousarray(factor)).double() for factor in (found.B, found.A))
        assert (B.shape, A.shape, found.rank) == ((shape[0], rank), (rank, shape[1]), rank)
        true2, best2 = norm2_of(D.double() - B @ A), float(values[rank:].square().sum())
        assert found.error2 == pytest.approx(true2, rel=1e-6)
        assert true2 <= best2 * (1 + 6e-4)
        assert best2 >= (found.error2 - found.excess_bound) * (1 - 1e-6)
        assert pytest.approx(values[:rank].numpy(), rel=2e-2) == found.S
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-5, atol=1e-5 * float(values[0]))


@pytest.mark.parametrize("shape", [(960, 700), (700, 960), (300, 180)], ids=str)
def test_it_takes_the_steps_of_the_one_with_torch(shape: tuple[int, int]) -> None:
    """One sketch, one stopping rule: what differs is the rounding of sums."""
    D = signal_and_noise(*shape).float()
    for seed in (0, 1):
        found, other = leading(D, 16, seed=seed), truncated_svd(D, 16, seed=seed, norm2=norm2_of(D))
        assert found is not None
        assert found.products == other.products
        assert found.error2 == pytest.approx(other.error2, rel=1e-6)
        assert found.excess_estimate == pytest.approx(other.excess_estimate, rel=1e-2, abs=1e-9 * found.error2)
        assert found.excess_bound == pytest.approx(other.excess_bound, rel=1e-4)
        assert pytest.approx(other.S.numpy(), rel=1e-5) == found.S


def test_it_gives_the_same_bytes_again_and_others_for_another_seed() -> None:
    D = signal_and_noise(700, 600).float()
    first, again, other = leading(D, 8), leading(D, 8), leading(D, 8, seed=1)
    assert first is not None
    assert again is not None
    assert other is not None
    assert (first.B.tobytes(), first.A.tobytes()) == (again.B.tobytes(), again.A.tobytes())
    assert first.B.tobytes() != other.B.tobytes()


@pytest.mark.parametrize("size", [1000, 5000])
@pytest.mark.parametrize("where", ["number", "row", "column", "direction"])
def test_the_error_is_true_where_one_direction_is_nearly_all(where: str, size: int) -> None:
    """‖D‖² − Σθ is a small difference there, and roundings of the few numbers that matter do not cancel."""
    generator = torch.Generator().manual_seed(size)
    for m, n in ((640, 600), (600, 640)):
        D = torch.randn(m, n, generator=generator, dtype=torch.float64)
        if where == "number":
            D[7, 11] += size
        elif where == "direction":
            D += size * with_spectrum(torch.ones(1, dtype=torch.float64), m, n, size)
        else:
            line = D[7] if where == "row" else D[:, 11]
            line *= size / float(line.norm())
        D = D.float()
        for rank in (1, 16):
            found, other = leading(D, rank, tolerance=6e-4), truncated_svd(D, rank, tolerance=6e-4)
            assert found is not None
            for error2, (B, A) in ((found.error2, (found.B, found.A)), (other.error2, other.factors())):
                B, A = (torch.as_tensor(np.ascontiguousarray(factor)).double() for factor in (B, A))
                assert error2 == pytest.approx(norm2_of(D.double() - B @ A), rel=5e-7)


def low_rank(m: int, n: int) -> Tensor:
    return with_spectrum(torch.linspace(2, 1, 16, dtype=torch.float64), m, n)


def repeated(m: int, n: int) -> Tensor:
    return with_spectrum(torch.cat([torch.full((40,), 3.0), torch.ones(500)]).double(), m, n)


UNUSUAL = {
    "low rank": (low_rank(600, 700), 32), "low rank, small": (low_rank(200, 300), 32),
    "repeated values": (repeated(600, 700), 32), "the identity": (torch.eye(600), 8),
    "beyond float32's squares": (1e-30 * power_law(-0.3, 600, 700), 8), "i^-3": (power_law(-3.0, 600, 700), 8),
    "full rank": (power_law(-0.3, 600, 700), 600), "zero": (torch.zeros(600, 700), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_left_to_torch(name: str) -> None:
    D, rank = UNUSUAL[name]
    assert leading(D.float(), rank) is None


@pytest.mark.skipif(not delta.multiplies_bf16(), reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("shape", [(960, 700), (700, 960)], ids=str)
def test_products_in_bfloat16_find_directions_as_good(shape: tuple[int, int]) -> None:
    D = signal_and_noise(*shape).float()
    low = D.bfloat16()
    lost2 = norm2_of(D.double() - low.double())
    found = leading(D, 16, low=low.view(torch.int16).numpy().view(np.uint16), lost2=lost2)
    assert found is not None
    assert found.rounded
    B, A = (torch.from_numpy(np.ascontiguousarray(factor)).double() for factor in (found.B, found.A))
    best2 = float(torch.linalg.svdvals(D.double())[16:].square().sum())
    assert found.error2 == pytest.approx(norm2_of(D.double() - B @ A), rel=1e-6)
    assert best2 * (1 - 1e-6) <= found.error2 <= best2 * (1 + 6e-4)
    assert best2 >= found.error2 - found.excess_bound
