"""Corners of an extraction, judged from the files that it wrote: numpy's SVD in float64 is the optimum.

The printed error is never below the true one by more than its four digits, and the printed bound never above the
optimum; ranks are those that were asked for, and for an energy the smallest that reach it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.decisions import warnings_to
from loratools.dialects import open_adapter
from loratools.errors import BadFile
from loratools.format.validate import validate
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy, Fixed, Ratio
from loratools.reports.pages._extracted import certificate
from loratools.surgery.extract import Extraction, extract
from loratools.surgery.extract.certify import certify
from tests.linalg.matrices import power_law, signal_and_noise, with_spectrum
from tests.surgery.models import load, random, save_base

pytestmark = pytest.mark.slow

HALF_A_DIGIT = 5e-5  # of the four that are printed
# What two factors lose of themselves when they are stored, of ‖ΔW‖.
STORED = {"F32": 2e-7, "F16": 2.0**-10, "BF16": 2.0**-7}


def levels(*steps: tuple[float, int]) -> Tensor:
    """Return a matrix (300, 280) whose singular values are each repeated so often."""
    sigma = torch.cat([torch.full((count,), value, dtype=torch.float64) for value, count in steps])
    return with_spectrum(sigma, 300, 280)


def one_entry() -> Tensor:
    D = torch.zeros(30, 20, dtype=torch.float64)
    D[3, 4] = 2.0
    return D


CORNERS: Mapping[str, Tensor] = {
    "row": random(1, 700, seed=1).double(),
    "column": random(700, 1, seed=2).double(),
    "scalar": torch.full((1, 1), 0.37, dtype=torch.float64),
    "very_tall": random(3000, 5, seed=3).double(),
    "very_wide": random(5, 3000, seed=4).double(),
    "conv": random(64, 32, 3, 3, seed=5).double(),
    "conv_1x1": random(40, 30, 1, 1, seed=6).double(),
    "conv_1d": random(24, 16, 5, seed=7).double(),
    "identity": 0.01 * torch.eye(280, dtype=torch.float64),
    "orthogonal": levels((3.0, 280)),
    "two_levels": levels((10.0, 100), (1.0, 180)),
    "three_levels": levels((10.0, 80), (5.0, 80), (1.0, 120)),
    "equal_blocks": torch.block_diag(*[torch.full((8, 8), 0.5, dtype=torch.float64)] * 35),
    "low_rank": with_spectrum(torch.linspace(1, 0.3, 16, dtype=torch.float64), 300, 280),
    "one_entry": one_entry(),
    "noise": signal_and_noise(300, 280, signals=0),
    "steep": power_law(-2.0, 300, 280),
}


def name_of(corner: str) -> str:
    return f"model.layers.0.{corner}.weight"


def written(
    folder: Path, changes: Mapping[str, Tensor], ranks: Ranks, dtype: str, base: Mapping[str, Tensor] | None = None
) -> tuple[Extraction, dict[str, tuple[float, float, list[float]]]]:
    """Extract changes of a base (of zeros, unless given), and return name -> (true error, optimum, spectrum).

    Errors are relative to ‖ΔW‖_F, from the two models and the adapter as they were written.
    """
    zero = {corner: torch.zeros(D.shape) for corner, D in changes.items()}
    before = {corner: W.float() for corner, W in (base or zero).items()}
    after = {corner: (before[corner].double() + D).float() for corner, D in changes.items()}
    folders = [
        save_base(folder / side, {name_of(corner): W.contiguous() for corner, W in weights.items()}, model_type="x")
        for side, weights in (("base", before), ("tuned", after))
    ]
    made = extract(*folders, folder / "adapter", ranks, dtype=dtype)  # type: ignore[arg-type]
    factors = {name.split("layers.0.")[-1]: W.double() for name, W in load(folder / "adapter").items()}
    truths = {}
    for outcome in made.of("factored"):
        corner = outcome.pair.path.removeprefix("model.layers.0.")
        D = (after[corner].double() - before[corner].double()).flatten(1)
        B, A = (factors[f"{corner}.lora_{side}.weight"].flatten(1) for side in "BA")
        sigma = np.linalg.svd(D.numpy(), compute_uv=False)
        norm = float(np.linalg.norm(sigma))
        error = float((D - B @ A).norm()) / norm  # alpha is the rank
        truths[corner] = (error, float(np.linalg.norm(sigma[outcome.rank :])) / norm, (sigma / norm).tolist())
    return made, truths


def judge(made: Extraction, truths: Mapping[str, tuple[float, float, list[float]]], dtype: str) -> dict[str, int]:
    """Hold what was printed against the truth, and return the ranks."""
    ranks = {}
    for outcome in made.of("factored"):
        corner, layer = outcome.pair.path.removeprefix("model.layers.0."), outcome.layer
        assert layer is not None
        true, best, _ = truths[corner]
        assert true * (1 - HALF_A_DIGIT) <= layer.error <= true * 1.0001 + 6.1e-8, corner
        assert layer.error / (1 + layer.excess_bound) <= best * (1 + 1e-6) + 1e-9, corner
        assert true <= 1.0005 * best + STORED[dtype], corner
        assert layer.captured == pytest.approx(1 - layer.error**2, abs=1e-12)
        ranks[corner] = outcome.rank
    energy = sum(outcome.norm2 for outcome in made.of("factored"))
    lost = sum(
        truths[c][0] ** 2 * o.norm2 for o in made.of("factored") for c in [o.pair.path.removeprefix("model.layers.0.")]
    )
    assert made.total.error >= (lost / energy) ** 0.5 * (1 - HALF_A_DIGIT)
    return ranks


def asked(rule: object, sigma: np.ndarray) -> int:
    """Return the rank that a rule asks for, of the whole spectrum with ‖σ‖ = 1."""
    match rule:
        case Fixed(r):
            return min(r, int((sigma > 1e-6 * sigma[0]).sum()))
        case Energy(fraction):
            return int((np.cumsum(sigma**2) < fraction - 1e-7).sum()) + 1
        case Ratio(fraction):
            return int((sigma > fraction * sigma[0]).sum())
    raise AssertionError(rule)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    "ranks", [Ranks(Fixed(1)), Ranks(Fixed(4)), Ranks(Energy(0.5)), Ranks(Energy(0.9)), Ranks(Ratio(0.31))], ids=repr
)
def test_rules(ranks: Ranks, dtype: str, tmp_path: Path) -> None:
    made, truths = written(tmp_path, CORNERS, ranks, dtype)
    found = judge(made, truths, dtype)
    assert found.keys() == CORNERS.keys()
    for corner, rank in found.items():
        sigma = np.array(truths[corner][2])
        assert rank == asked(ranks.rule, sigma), corner


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_budget(dtype: str, tmp_path: Path) -> None:
    made, truths = written(tmp_path, CORNERS, Ranks(budget=60_000), dtype)
    judge(made, truths, dtype)
    assert made.parameters <= 60_000


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_above_the_noise(dtype: str, tmp_path: Path) -> None:
    made, truths = written(tmp_path, CORNERS, Ranks(noise=True), dtype)
    assert judge(made, truths, dtype)["low_rank"] == 16


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("scale", [1e-25, 1e30])
@pytest.mark.parametrize(
    "ranks", [Ranks(Fixed(4)), Ranks(Energy(0.9)), Ranks(Ratio(0.31)), Ranks(budget=900), Ranks(noise=True)], ids=repr
)
def test_numbers_near_the_ends_of_float32(ranks: Ranks, scale: float, dtype: str, tmp_path: Path) -> None:
    D = power_law(-1.0, 80, 60)
    plain = judge(*written(tmp_path / "plain", {"far": D}, ranks, dtype), dtype)
    assert judge(*written(tmp_path / "far", {"far": scale * D}, ranks, dtype), dtype) == plain


@pytest.mark.parametrize("scale", [1e15, 1e17, 3e19, 1e21])
def test_norms_that_a_manifest_has_no_numbers_for_are_in_the_certificate(scale: float, tmp_path: Path) -> None:
    D = scale * power_law(-1.0, 40, 30)
    made, truths = written(tmp_path, {"far": D}, Ranks(Fixed(4)), "F32")
    judge(made, truths, "F32")
    assert validate(tmp_path / "adapter") == []
    (layer,) = certificate(open_adapter(tmp_path / "adapter"))
    assert layer.delta_norm == pytest.approx(float(D.norm()), rel=1e-5)
    assert layer.error == pytest.approx(truths["far"][0], rel=1e-4)


@pytest.mark.parametrize(
    ("scale", "refusal"), [(1e-25, "factors of 1 module.* too small for F16"), (1e30, "1 tensor.* cannot be compared")]
)
@pytest.mark.parametrize("ranks", [Ranks(Fixed(4)), Ranks(Energy(0.9)), Ranks(budget=900)], ids=repr)
def test_factors_that_f16_cannot_hold_are_refused(ranks: Ranks, scale: float, refusal: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile, match=refusal) as caught:
        written(tmp_path, {"far": scale * power_law(-1.0, 80, 60)}, ranks, "F16")
    assert "--dtype" in f"{caught.value}{caught.value.hint}"
    assert not (tmp_path / "adapter").exists()


def test_factors_that_f16_holds_in_part_are_warned_of(tmp_path: Path) -> None:
    told: list[str] = []
    with warnings_to(told.append):
        made, truths = written(tmp_path, {"far": 3e-11 * power_law(-1.0, 80, 60)}, Ranks(Fixed(4)), "F16")
    layer = made.of("factored")[0].layer
    assert layer is not None
    assert truths["far"][0] > 1.001 * truths["far"][1]
    assert layer.error == pytest.approx(truths["far"][0], rel=1e-2)
    assert [text.startswith("factors of 1 module have numbers too small for F16") for text in told] == [True]


def test_a_change_of_exactly_low_rank_of_float32_weights(tmp_path: Path) -> None:
    """ΔW is the difference of two float32 numbers: forming it and factoring it cost float32's rounding, and no more."""
    base = {corner: random(*CORNERS[corner].shape, seed=8) for corner in ("low_rank", "very_wide", "row", "one_entry")}
    for dtype in ("F32", "F16", "BF16"):
        for scale in (1e-3, 1.0, 30.0):
            folder = tmp_path / f"{dtype}{scale}"
            changes = {corner: scale * CORNERS[corner] for corner in base}
            made, truths = written(folder, changes, Ranks(Fixed(16)), dtype, base)
            judge(made, truths, dtype)
            for layer in certify(folder / "tuned", folder / "base", folder / "adapter").layers:
                true, _, _ = truths[layer.module.removeprefix("model.layers.0.")]
                assert layer.error == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_the_excess_on_noise_at_small_ranks(rank: int, tmp_path: Path) -> None:
    """At most 3e-4 of the error, half of the tolerance of its square; the estimate is of that size and no smaller."""
    changes = {"noise": signal_and_noise(700, 600, signals=0), "flat": power_law(-0.05, 700, 600)}
    made, truths = written(tmp_path, changes, Ranks(Fixed(rank)), "F32")
    judge(made, truths, "F32")
    for outcome in made.of("factored"):
        assert outcome.layer is not None
        true, best, _ = truths[outcome.pair.path.removeprefix("model.layers.0.")]
        assert true <= best * (1 + 3e-4)
        assert true / best - 1 <= 2 * outcome.layer.excess + 1e-6
        assert outcome.layer.excess <= 4e-4


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_experts(dtype: str, tmp_path: Path) -> None:
    """Each in a corner of its own: no change, the identity, low rank, one entry, noise."""
    E = torch.zeros(5, 24, 24, dtype=torch.float64)
    E[1], E[2], E[3, 2, 5] = torch.eye(24), with_spectrum(torch.tensor([1.0, 0.5]).double(), 24, 24), 2.0
    E[4] = signal_and_noise(24, 24, signals=0)
    for ranks in (Ranks(Fixed(3)), Ranks(Fixed(24)), Ranks(Energy(0.9))):
        folder = tmp_path / repr(ranks)[:40]
        folders = [
            save_base(folder / side, {"mlp.experts.down_proj": D.float()}, model_type="mixtral")
            for side, D in (("base", 0 * E), ("tuned", E))
        ]
        made = extract(*folders, folder / "adapter", ranks, dtype=dtype)  # type: ignore[arg-type]
        layer = made.of("factored")[0].layer
        assert layer is not None
        lost = 0.0
        for e, part in enumerate(certify(folders[1], folders[0], folder / "adapter").layers):
            norm2 = float(E[e].float().double().square().sum())
            assert part.delta_norm == pytest.approx(norm2**0.5, rel=1e-6)
            lost += part.error**2 * norm2
        true = (lost / float(E.float().double().square().sum())) ** 0.5
        assert true * (1 - HALF_A_DIGIT) <= layer.error <= true * 1.0001 + 6.1e-8
