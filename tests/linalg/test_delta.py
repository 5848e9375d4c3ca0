"""Changes as factors and as dense matrices, against numpy in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.linalg.delta import Delta, Dense, Product

ROWS, COLUMNS, RANK = 30, 22, 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(seed: int) -> tuple[Tensor, Tensor]:
    return normal(ROWS, RANK, seed=seed), normal(RANK, COLUMNS, seed=seed + 1)


def both(seed: int) -> tuple[Delta, Delta]:
    B, A = factors(seed)
    return Product(B, A), Dense(B @ A)


@pytest.mark.parametrize(("one", "other"), list(product((0, 1), repeat=2)))
def test_norms_and_products_do_not_depend_on_the_form(one: int, other: int) -> None:
    first, second = both(1)[one], both(5)[other]
    D1, D2 = ((B @ A).numpy() for B, A in (factors(1), factors(5)))
    X = normal(COLUMNS, 3, seed=9)
    assert first.shape == (ROWS, COLUMNS)
    assert first.norm2() == pytest.approx(np.linalg.norm(D1) ** 2, rel=1e-13)
    assert first.inner(second) == pytest.approx(np.vdot(D1, D2), rel=1e-11)
    assert first.onto(torch.from_numpy(D2)) == pytest.approx(np.vdot(D1, D2), rel=1e-11)
    np.testing.assert_allclose(first.times(X).numpy(), D1 @ X.numpy(), rtol=1e-12)
    with pytest.raises(ValueError, match="of one shape"):
        first.inner(Dense(torch.zeros(COLUMNS, ROWS, dtype=torch.float64)))


@pytest.mark.parametrize("form", [0, 1])
def test_directions_and_values_are_those_of_numpy(form: int) -> None:
    found = both(3)[form]
    U, S, Vh = np.linalg.svd((factors(3)[0] @ factors(3)[1]).numpy())
    svd, norm = found.leading(RANK)
    assert norm == pytest.approx(float(np.linalg.norm(S)), rel=1e-13)
    assert int(svd.rank()) == RANK
    np.testing.assert_allclose(svd.S.numpy(), S[:RANK], rtol=1e-12)
    for own, theirs in ((svd.U.numpy(), U[:, :RANK]), (svd.Vh.numpy().T, Vh[:RANK].T)):
        np.testing.assert_allclose(np.abs((own * theirs).sum(0)), 1, atol=1e-12)
    sigma = found.sigma().numpy()
    np.testing.assert_allclose(sigma[:RANK], S[:RANK], rtol=1e-12)
    assert not sigma[RANK:].any()


def test_fewer_directions_than_there_are() -> None:
    D = normal(ROWS, COLUMNS, seed=4)
    U, S, _ = np.linalg.svd(D.numpy())
    svd, norm = Dense(D).leading(3)
    assert norm == pytest.approx(float(np.linalg.norm(S)), rel=1e-13)
    assert (svd.U.shape, svd.S.shape, svd.Vh.shape) == ((ROWS, 3), (3,), (3, COLUMNS))
    np.testing.assert_allclose(svd.S.numpy(), S[:3], rtol=1e-12)
    np.testing.assert_allclose(np.abs((svd.U.numpy() * U[:, :3]).sum(0)), 1, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
def test_long_sides(turned: bool) -> None:
    """Past 512 the leading directions come from an iteration, the values from DᵀD."""
    B, A = normal(600, 5, seed=1), normal(5, 540, seed=2)
    D = B @ A + 0.05 * normal(600, 540, seed=3)
    D = D.T.contiguous() if turned else D
    U, S, Vh = np.linalg.svd(D.numpy())
    svd, _ = Dense(D).leading(5)
    np.testing.assert_allclose(svd.S.numpy(), S[:5], rtol=1e-9)
    for own, theirs in ((svd.U.numpy().T, U[:, :5]), (svd.Vh.numpy(), Vh[:5].T)):
        np.testing.assert_allclose(np.linalg.svd(own @ theirs)[1], 1, atol=1e-8)
    np.testing.assert_allclose(Dense(D).sigma().numpy(), S, rtol=1e-9)
    low = Dense(B @ A).sigma()
    np.testing.assert_allclose(low[:5].numpy(), np.linalg.svd((B @ A).numpy())[1][:5], rtol=1e-9)
    assert not bool(low[5:].any())


@pytest.mark.parametrize("side", [8, 520])
def test_nothing_is_nothing(side: int) -> None:
    nothing = Dense(torch.zeros(side, side + 1, dtype=torch.float64))
    assert (nothing.norm2(), int(nothing.leading(2)[0].rank())) == (0.0, 0)
    assert not bool(nothing.sigma().any())


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 2\) holds 1 NaN or infinite"):
        Dense(torch.tensor([[1.0, 2], [float("nan"), 1], [0, 0]], dtype=torch.float64))


def test_the_norm_of_what_is_left_where_terms_cancel() -> None:
    B, A = factors(7)
    left, right = torch.cat([B, B], 1), torch.cat([A, -A + 1e-9 * normal(RANK, COLUMNS, seed=8)])
    wanted = 1e-9 * float((B @ normal(RANK, COLUMNS, seed=8)).norm())
    assert Product(left, right).norm2() == pytest.approx(wanted**2, rel=1e-5)
