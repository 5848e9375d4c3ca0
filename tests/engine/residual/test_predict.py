"""Predictions of a residual: exact sums, whatever their order, and the very change that a merge made."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.residual.predict import _fixed, is_predictable, measure, steps
from tests.adapter.kinds.reference import Parts, build, delta, merged, random
from tests.adapter.kinds.test_kinds import CONV, EMBEDDING, KINDS, LINEAR, weight_of

PARTS = {"lora": LINEAR, "conv": CONV, "embedding": EMBEDDING, **{k: v for k, v in KINDS.items() if "dora" in k}}


def place(parts: Parts, transposed: bool = False) -> Placement:
    rows, columns = weight_of(parts).flatten(1).shape
    matrix = (columns, rows) if transposed else (rows, columns)
    return Placement("m", build(parts), Site.whole("w", matrix, transposed=transposed))


def test_sums_are_exact_in_any_order() -> None:
    """Both factors are in fixed point, so no sum is rounded: the same bits as rational numbers give."""
    parts = {"lora_A.weight": random(70, 9) * 10.0 ** random(70, 1), "lora_B.weight": random(5, 70)}
    (step,) = steps([(place(parts), 0.37)])
    left, right = (
        [[Fraction(value) for value in row] for row in factor.tolist()] for factor in (step.left, step.right)
    )
    exact = [
        [float(sum(a * b for a, b in zip(row, column, strict=True))) for column in zip(*right, strict=True)]
        for row in left
    ]
    assert step.delta(slice(0, 5)).tolist() == exact
    order = np.random.default_rng(3).permutation(70)
    step.left, step.right = step.left[:, order].copy(), step.right[order].copy()
    assert step.delta(slice(0, 5)).tolist() == exact


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", sorted(PARTS))
def test_what_is_taken_back_is_what_a_merge_adds(name: str, transposed: bool) -> None:
    """W' − ΔW, or W'/g − ΔW with the g of the unchanged base, for features along rows and across them."""
    parts = PARTS[name]
    W = weight_of(parts)
    matrix, after = W.flatten(1), merged(W, parts, 0.7 * -0.6).flatten(1)
    if transposed:
        matrix, after = matrix.T, after.T
    placements = [(place(parts, transposed), -0.6)]
    made = steps(placements)
    measure(placements, made, lambda start, stop: matrix[start:stop].numpy(), 3)
    found = after.contiguous().numpy().copy()
    for start in range(0, len(found), 4):
        made[0].take_back(found[start : start + 4], start)
    # The factors have 24 bits or more, g has the 24 of float32.
    assert np.abs(found - matrix.numpy()).max() < 1e-6 * float(matrix.abs().max() + after.abs().max())


def test_products_on_one_site_are_one_step_and_rescaled_ones_their_own() -> None:
    other = {"lora_A.weight": random(2, 10, seed=4), "lora_B.weight": random(7, 2, seed=4)}
    plain = [(place(LINEAR), 1.0), (place(other), 0.5)]
    (step,) = steps(plain)
    expected = delta(LINEAR, 0.7) + 0.5 * delta(other, 0.7)
    torch.testing.assert_close(torch.from_numpy(step.delta(slice(0, 7))), expected, rtol=1e-6, atol=1e-6)
    assert [made.gains is None for made in steps([plain[0], (place(KINDS["dora"]), 1.0)])] == [True, False]


def test_other_changes_are_not_predicted() -> None:
    loha = {
        "hada_w1_a": random(7, 2),
        "hada_w1_b": random(2, 10),
        "hada_w2_a": random(7, 2),
        "hada_w2_b": random(2, 10),
    }
    assert is_predictable([place(LINEAR), place(KINDS["dora"])])
    assert not is_predictable([place(LINEAR), Placement("m", build(loha), Site.whole("w", (7, 10)))])


@pytest.mark.parametrize("exponent", [-1020, -300, 0, 300, 1000])
@pytest.mark.parametrize("axis", [0, 1])
def test_factors_are_rounded_to_so_many_bits_below_the_largest_of_a_row(exponent: int, axis: int) -> None:
    generator = np.random.default_rng(exponent + 2000)
    factor = np.ldexp(generator.standard_normal((9, 7)), exponent - generator.integers(0, 8, (9, 7)))
    factor[2] = 0
    rows, found = (factor, _fixed(factor, 20, 1)) if axis else (factor.T, _fixed(factor, 20, 0).T)
    for row, fixed in zip(rows.tolist(), found.tolist(), strict=True):
        unit = Fraction(2) ** (int(np.frexp(np.abs(row).max())[1]) - 20)
        assert fixed == [float(round(Fraction(number) / unit) * unit) for number in row]
