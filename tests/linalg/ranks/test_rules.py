"""Rules for ranks, on spectra small enough to work out by hand."""

from __future__ import annotations

import pytest
import torch

from loratools.linalg.ranks.rules import (
    Absolute,
    Bounded,
    Energy,
    Fixed,
    RankRule,
    Ratio,
    Spectrum,
    SvCumulative,
    SvFro,
    SvRatio,
)

SIGMA = torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64)  # squares 16 4 4 1 = 25, sum 9
WHOLE = Spectrum(SIGMA, 25.0, (10, 8))
LEADING = Spectrum(SIGMA[:2], 25.0, (10, 8), complete=False)


@pytest.mark.parametrize(
    ("rule", "whole", "leading"),
    [
        (Fixed(2), 2, 2),
        (Fixed(3), 3, None),
        (Fixed(9), 4, None),
        (Energy(0.64), 1, 1),
        (Energy(0.65), 2, 2),
        (Energy(0.8), 2, 2),
        (Energy(0.81), 3, None),
        (Energy(1.0), 4, None),
        (Ratio(0.5), 1, 1),
        (Ratio(0.49), 3, None),
        (Absolute(2.0), 1, 1),
        (Absolute(0.5), 4, None),
        (Absolute(100.0), 1, 1),
        (SvRatio(2.0), 1, 1),
        (SvRatio(2.1), 3, None),
        (SvRatio(1.0), 1, 1),
        (SvFro(0.8), 1, 1),  # 0.8² = 0.64
        (SvFro(0.9), 3, None),  # 0.81: above the 0.8 of two values
        (Bounded(Fixed(1), minimum=2), 2, 2),
        (Bounded(Energy(0.81), maximum=2), 2, 2),
        (Bounded(Energy(0.65), multiple_of=4), 4, None),
        (Bounded(Energy(0.65), multiple_of=4, maximum=3), 3, None),
        (Bounded(Fixed(1), minimum=7), 4, None),
    ],
)
def test_rules_by_hand(rule: RankRule, whole: int, leading: int | None) -> None:
    assert rule.rank(WHOLE) == whole
    assert rule.rank(LEADING) == leading


def test_sv_cumulative_is_the_smallest_rank_that_reaches_the_sum() -> None:
    # Of 9: 4, 6, 8, 9.
    assert [SvCumulative(t).rank(WHOLE) for t in (0.4, 0.45, 6 / 9, 0.67, 0.9, 1.0)] == [1, 2, 2, 3, 4, 4]
    with pytest.raises(ValueError, match="sv_cumulative needs every singular value"):
        SvCumulative(0.9).rank(LEADING)


@pytest.mark.parametrize("seed", range(5))
def test_kohyas_rules_give_the_ranks_of_its_script(seed: int) -> None:
    """sd-scripts' networks/resize_lora.py keeps `index + 1` values, where the index is the first that reaches t."""
    sigma = torch.rand(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(descending=True)[0]
    norm2 = float(sigma.square().sum())
    spectrum = Spectrum(sigma, norm2, (40, 30))
    for t in (0.3, 0.5, 0.8, 0.9, 0.99):
        by_norm = int(torch.searchsorted(sigma.square().cumsum(0) / norm2, t**2)) + 1
        by_sum = int(torch.searchsorted(sigma.cumsum(0) / sigma.sum(), t)) + 1
        assert (SvFro(t).rank(spectrum), SvCumulative(t).rank(spectrum)) == (by_norm, by_sum)
    for t in (1.5, 2.0, 3.0, 20.0):
        assert SvRatio(t).rank(spectrum) == max(1, int((sigma > sigma[0] / t).sum()))


def test_all_of_the_energy_is_reached_despite_rounding() -> None:
    sigma = torch.full((1000,), 0.1, dtype=torch.float64)
    assert Energy(1.0).rank(Spectrum(sigma, 10.0, (1000, 1000))) == 1000


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Fixed(0), "a rank must be at least 1, not 0"),
        (lambda: Energy(0), "energy is a share"),
        (lambda: Energy(1.01), "energy is a share"),
        (lambda: Ratio(float("nan")), "ratio is a share"),
        (lambda: SvFro(2), "sv_fro is a share"),
        (lambda: SvCumulative(-1), "sv_cumulative is a share"),
        (lambda: SvRatio(0.5), "sv_ratio is"),
        (lambda: Absolute(-1.0), "a floor for singular values"),
        (lambda: Bounded(Fixed(1), minimum=5, maximum=4), "ranks between 5 and 4"),
        (lambda: Bounded(Fixed(1), multiple_of=0), "in multiples of 0"),
        (lambda: Spectrum(torch.zeros(3, dtype=torch.float64), 0.0, (3, 3)), "a matrix that is zero has no rank"),
        (lambda: Spectrum(torch.zeros(0, dtype=torch.float64), 0.0, (3, 3)), "a matrix that is zero has no rank"),
    ],
)
def test_impossible_rules_are_refused(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()  # type: ignore[operator]
