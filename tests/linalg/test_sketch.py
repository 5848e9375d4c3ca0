"""Sketches against the dense change: linear, blind to the factors, and as near in cosine as the docstring says."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from loratools.linalg.delta import Delta, Dense, Product
from loratools.linalg.sketch import SIZE, sketch, standard_error


def product(seed: int, rows: int = 40, rank: int = 3, columns: int = 24) -> Product:
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(rows, rank, dtype=torch.float64, generator=generator)
    return Product(B, torch.randn(rank, columns, dtype=torch.float64, generator=generator))


def by_hand(name: str, D: torch.Tensor) -> torch.Tensor:
    """Return the sketch of a dense matrix, element by element, as the docstring of the module has it."""

    def places(side: str, length: int, other: int) -> list[tuple[int, int]]:
        stream = hashlib.shake_128(f"loratools.sketch.v1\0{name}\0{side}\0{length}\0{other}".encode())
        raw = stream.digest(2 * length)
        return [(raw[2 * i], 1 - 2 * (raw[2 * i + 1] & 1)) for i in range(length)]

    made = torch.zeros(SIZE, dtype=torch.float64)
    rows, columns = D.shape
    for i, (bin_i, sign_i) in enumerate(places("rows", rows, columns)):
        for j, (bin_j, sign_j) in enumerate(places("columns", columns, rows)):
            made[(bin_i + bin_j) % SIZE] += sign_i * sign_j * D[i, j]
    return made


def test_it_is_its_definition_of_a_product_and_of_a_matrix() -> None:
    factors = product(0)
    D = factors.B @ factors.A
    expected = by_hand("q", D) + by_hand("v", 2 * D)
    twice = Product(2 * factors.B, factors.A)
    forms: list[list[tuple[str, Delta]]] = [[("q", factors), ("v", twice)], [("v", Dense(2 * D)), ("q", Dense(D))]]
    for changes in forms:
        assert torch.allclose(sketch(changes), expected, rtol=0, atol=1e-12 * float(expected.norm()))


def test_factors_in_another_basis_have_one_sketch() -> None:
    factors = product(1)
    M = product(2, 3, 3, 3).B + 3 * torch.eye(3)
    turned = Product(factors.B @ torch.linalg.inv(M), M @ factors.A)
    one = sketch([("q", factors)])
    assert float((sketch([("q", turned)]) - one).norm() / one.norm()) < 1e-13
    assert float((sketch([("k", factors)]) - one).norm() / one.norm()) > 1, "another module is another change"
    assert float(sketch([]).norm()) == 0


@pytest.mark.parametrize(("modules", "rank", "cosine", "most"), [
    (6, 3, 0.0, 1.25), (6, 3, 0.9, 1.25), (6, 3, 0.99, 1.25), (1, 1, 0.0, 1.25), (1, 1, 0.9, math.sqrt(3) * 1.2),
])  # fmt: skip
def test_the_cosine_errs_as_is_stated(modules: int, rank: int, cosine: float, most: float) -> None:
    """Over 120 pairs, each with hashes of its own; a standard deviation of 120 is itself within a fifth, at 3 sigma."""
    errors = []
    for trial in range(120):
        first, second, inner, norms = [], [], 0.0, [0.0, 0.0]
        for module in range(modules):
            seed = trial * 100 + 2 * module
            x, other = product(seed, rank=rank), product(seed + 1, rank=rank)
            mixed = torch.cat([cosine * x.B, math.sqrt(1 - cosine**2) * other.B], 1)
            y = Product(mixed, torch.cat([x.A, other.A]))
            first.append((f"{trial}.{module}", x))
            second.append((f"{trial}.{module}", y))
            inner, norms = inner + x.inner(y), [norms[0] + x.norm2(), norms[1] + y.norm2()]
        a, b = sketch(first), sketch(second)
        errors.append(float(a @ b / (a.norm() * b.norm())) - inner / math.sqrt(norms[0] * norms[1]))
    stated = standard_error(cosine)
    spread = float(torch.tensor(errors).std())
    assert 0.6 * stated < spread < most * stated
    assert abs(sum(errors) / len(errors)) < 4 * spread / math.sqrt(len(errors)) + 0.1 * stated
