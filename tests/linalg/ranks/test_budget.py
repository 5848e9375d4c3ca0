"""The shared budget: against brute force, against the simpler ways, and at its limits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg.ranks.budget import uniform, water_filling
from loratools.linalg.ranks.rules import Energy, Spectrum

Shapes = list[tuple[int, int]]


def captured(spectra: Sequence[Sequence[float]], ranks: Sequence[int]) -> float:
    """Return Σ_l Σ_{i≤r_l} σ²."""
    return sum(sum(s * s for s in sigma[:r]) for sigma, r in zip(spectra, ranks, strict=True))


def cost(shapes: Shapes, ranks: Sequence[int]) -> int:
    """Return Σ_l r_l·(m_l + n_l)."""
    return sum(r * (m + n) for r, (m, n) in zip(ranks, shapes, strict=True))


def brute_force(spectra: Sequence[Sequence[float]], shapes: Shapes, parameters: int, step: int = 1) -> float:
    """Return the best energy of all allocations with every rank at least 1 (or the first multiple)."""
    choices = [sorted({min(r, len(s)) for r in range(step, len(s) + step, step)}) for s in spectra]
    allocations = [r for r in itertools.product(*choices) if cost(shapes, r) <= parameters]
    return max(captured(spectra, r) for r in allocations)


spectrum = st.lists(st.floats(0.01, 10), min_size=1, max_size=5).map(lambda s: sorted(s, reverse=True))


@settings(deadline=None)
@given(st.lists(spectrum, min_size=1, max_size=4), st.integers(0, 12))
def test_equals_brute_force_for_equal_shapes(spectra: list[list[float]], more: int) -> None:
    shapes: Shapes = [(6, 4)] * len(spectra)
    parameters = 10 * (len(spectra) + more)
    ranks = water_filling(spectra, shapes, parameters)
    assert cost(shapes, ranks) <= parameters
    assert min(ranks) >= 1
    assert captured(spectra, ranks) == pytest.approx(brute_force(spectra, shapes, parameters), rel=1e-12)


@settings(deadline=None)
@given(
    st.lists(st.tuples(spectrum, st.integers(2, 9), st.integers(2, 9)), min_size=1, max_size=4),
    st.integers(0, 60),
    st.integers(1, 3),
)
def test_unequal_shapes_stay_within_one_step_of_brute_force(
    layers: list[tuple[list[float], int, int]], more: int, step: int
) -> None:
    spectra, shapes = [layer[0] for layer in layers], [(layer[1], layer[2]) for layer in layers]
    parameters = cost(shapes, [min(step, len(s)) for s in spectra]) + more
    ranks = water_filling(spectra, shapes, parameters, multiple_of=step)
    assert cost(shapes, ranks) <= parameters
    assert all(r % step == 0 or r == len(s) for r, s in zip(ranks, spectra, strict=True))
    # Fractional knapsack: what the best allocation has more is at most the one step that no longer fitted.
    steps = [captured([s[i : i + step]], [step]) for s in spectra for i in range(0, len(s), step)]
    assert captured(spectra, ranks) >= brute_force(spectra, shapes, parameters, step) - max(steps) * (1 + 1e-9)
    # And where no better step was passed over, it is the best there is for the parameters that it spends.
    if step == 1 and not _skipped(spectra, shapes, ranks):
        spent = cost(shapes, ranks)
        assert captured(spectra, ranks) == pytest.approx(brute_force(spectra, shapes, spent), rel=1e-12)


def _skipped(spectra: Sequence[Sequence[float]], shapes: Shapes, ranks: Sequence[int]) -> bool:
    """Return whether a step left out beats, per parameter, a step taken beyond the minimum."""
    taken = [s[r - 1] ** 2 / sum(sh) for s, r, sh in zip(spectra, ranks, shapes, strict=True) if r > 1]
    out = [s[r] ** 2 / sum(sh) for s, r, sh in zip(spectra, ranks, shapes, strict=True) if r < len(s)]
    return bool(taken and out) and max(out) > min(taken)


def test_beats_uniform_and_per_layer_energy_at_equal_size() -> None:
    generator = torch.Generator().manual_seed(0)
    spectra, shapes = [], []
    for layer in range(40):
        decay, size = 0.3 + 1.2 * float(torch.rand(1, generator=generator)), float(torch.rand(1, generator=generator))
        spectra.append([10**size * i**-decay for i in range(1, 65)])
        shapes.append([(64, 64), (64, 172), (172, 64)][layer % 3])
    parameters = 16 * cost(shapes, [1] * 40)
    even = uniform(spectra, shapes, parameters)
    assert set(even) == {16}
    sigmas = [torch.tensor(s, dtype=torch.float64) for s in spectra]
    by_energy = (
        tuple(
            Energy(t / 1000).rank(Spectrum(s, float((s**2).sum()), shape)) or 0
            for s, shape in zip(sigmas, shapes, strict=True)
        )
        for t in range(999, 0, -1)
    )
    energy = next(ranks for ranks in by_energy if cost(shapes, ranks) <= parameters)
    best = water_filling(spectra, shapes, parameters)
    assert captured(spectra, best) > 1.03 * captured(spectra, even)
    assert captured(spectra, best) > 1.03 * captured(spectra, energy)


def test_the_threshold_is_one_for_all_layers() -> None:
    # 9, 4, 1 at cost 2 and 16, 1 at cost 8: densities 4.5 2 0.5 and 2 0.125.
    spectra, shapes = [[3.0, 2.0, 1.0], [4.0, 1.0]], [(1, 1), (4, 4)]
    assert water_filling(spectra, shapes, 12) == (2, 1)
    assert water_filling(spectra, shapes, 14) == (3, 1)
    assert water_filling(spectra, shapes, 21) == (3, 1)
    assert water_filling(spectra, shapes, 22) == (3, 2)
    assert water_filling(spectra, shapes, 4, minimum=0) == (2, 0)
    assert water_filling(spectra, shapes, 100, maximum=1) == (1, 1)
    # Energy per parameter, not energy: 4 and 3.61 at cost 2 before 6.25 at cost 8.
    assert water_filling([[3.0, 2.0, 1.9], [4.0, 2.5]], shapes, 18) == (3, 1)


def test_a_layer_that_is_zero_gets_0_and_costs_nothing() -> None:
    assert water_filling([[0.0, 0.0], [2.0, 1.0]], [(9, 9), (2, 2)], 8) == (0, 2)
    assert uniform([[0.0, 0.0], [2.0, 1.0]], [(9, 9), (2, 2)], 8) == (0, 2)
    assert water_filling([], [], 0) == ()


def test_uniform_in_multiples_gives_short_layers_what_they_have() -> None:
    spectra = [[1.0] * 10, [1.0] * 3]
    assert uniform(spectra, [(1, 1), (1, 1)], 22, multiple_of=4) == (8, 3)
    assert uniform(spectra, [(1, 1), (1, 1)], 26, multiple_of=4) == (10, 3)


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"budget of 9 parameters is too small: rank 1 in each of 2 layers takes 10"):
        water_filling([[1.0], [1.0]], [(2, 3), (2, 3)], 9)
    with pytest.raises(ValueError, match=r"too small for rank 2 in 2 layers, which takes 20"):
        uniform([[1.0, 1.0], [1.0, 1.0]], [(2, 3), (2, 3)], 19, multiple_of=2)
    with pytest.raises(ValueError, match="layer 1: singular values must be"):
        water_filling([[1.0], [1.0, 2.0]], [(2, 3), (2, 3)], 99)
    with pytest.raises(ValueError, match="layer 0: singular values must be"):
        water_filling([[float("nan")]], [(2, 3)], 99)
    with pytest.raises(ValueError, match="there are 1 spectra and 2 shapes"):
        water_filling([[1.0]], [(2, 3), (2, 3)], 99)
    with pytest.raises(ValueError, match="ranks between 3 and 2"):
        water_filling([[1.0]], [(2, 3)], 99, minimum=3, maximum=2)
