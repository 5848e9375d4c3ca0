"""Extraction from a real full fine-tune: near the optimum, budgets that pay, ranks found in real noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratools.adapter.low_rank import load, products
from loratools.adapter.naming.selection import Selection
from loratools.dialects import open_adapter
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy, Fixed
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.extract import extract
from loratools.surgery.merge import merge
from tests.surgery.finetunes import optimum

ATTENTION = Selection(include=("self_attn.*",), drop_whole=True)
"""Small layers only, so that the test is quick."""


def test_rank_32_is_within_a_two_thousandth_of_the_optimum(real_models: Any, tmp_path: Path) -> None:
    base, tuned = real_models / "smol-base", real_models / "smol-tuned"
    found = extract(base, tuned, tmp_path / "out", Ranks(Fixed(32)))
    layers = {one.layer.module: one.layer for one in found.outcomes if one.layer}
    assert len(layers) == 210
    assert len(found.of("factored")) == 210
    assert {one.outcome for one in found.outcomes} <= {"factored", "whole", "unchanged"}  # a norm may stay as it was
    before, after, parts = Checkpoint.open(base), Checkpoint.open(tuned), products(open_adapter(tmp_path / "out"))
    for module in sorted(layers)[::30]:
        D = after.read(f"{module}.weight").double() - before.read(f"{module}.weight").double()
        B, A = load(parts[module])
        error = float((D - B @ A).norm())
        assert error <= 1.0005 * optimum(D, 32)
        assert layers[module].error == pytest.approx(error / float(D.norm()), rel=1e-3)


def test_a_budget_captures_more_than_uniform_ranks_or_energy_thresholds(real_models: Any, tmp_path: Path) -> None:
    base, tuned = real_models / "smol-base", real_models / "smol-tuned"

    def captured(name: str, ranks: Ranks) -> tuple[int, float]:
        total = extract(base, tuned, tmp_path / name, ranks, selection=ATTENTION).total
        return total.parameters, total.captured

    parameters, even = captured("even", Ranks(Fixed(12)))
    spent, filled = captured("filled", Ranks(budget=parameters))
    generous, threshold = captured("threshold", Ranks(Energy(even)))
    assert parameters - 1200 < spent <= parameters < generous
    assert filled > even + 0.005
    assert filled > threshold  # although the thresholds spent more


def test_noise_finds_the_ranks_of_a_trained_adapter_in_its_bf16_merge(real_models: Any, tmp_path: Path) -> None:
    base, adapter = real_models / "smol-base", real_models / "smol-rslora"
    merge(base, [adapter], tmp_path / "merged", retention="off")
    found = extract(base, tmp_path / "merged", tmp_path / "out", Ranks(noise=True))
    wanted = {module: update.rank for module, update in open_adapter(adapter).updates.items()}
    ranks = {one.pair.path: one.rank for one in found.of("factored")}
    right = sum(ranks.get(module) == rank for module, rank in wanted.items())
    assert right >= 0.95 * len(wanted)
