"""Stochastic rounding: neighbours only, right on average, and the same for any threads and tiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loratools.engine.run import Settings, write_weights
from loratools.engine.stochastic import Stochastic
from loratools.surgery.merge import MergeOptions, merge, prepare
from tests.surgery.models import DTYPES, PRECISION, load, lora, merged, random, save_adapter, save_base, units_off

SHAPE = (48, 56)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_expectation_is_the_number_itself(dtype: str) -> None:
    """The mean over many draws, against the spread that it must have: √(p(1 − p)) units for each number."""
    values = torch.cat([random(300), random(300, seed=1, scale=1e-3), random(300, seed=2, scale=2e-6), torch.zeros(4)])
    values = torch.cat([values, torch.tensor([1.0, -0.5, 65280.0, -(2.0**-14), 2.0**-24])])
    draws = torch.stack([Stochastic(seed, "t", dtype)(values, 0).double() for seed in range(2000)])
    rounded = draws.to(DTYPES[dtype])
    assert torch.equal(rounded.double(), draws), "not a number of the dtype"
    exact = values.double().abs()
    lowest = -14 if dtype == "F16" else -126
    unit = 2.0 ** (exact.clamp(min=2.0**-126).log2().floor().clamp(min=lowest) + 1 - PRECISION[DTYPES[dtype]])
    fraction = (exact / unit) % 1
    error = (draws.mean(0) - values.double()).abs()
    spread = (fraction * (1 - fraction) / 2000).sqrt()
    assert bool((error <= (5 * spread + 5 / 2000) * unit).all())
    assert abs(float(((draws.mean(0) - values.double()) / unit).mean())) < 5 * float(spread.mean()) / len(values) ** 0.5
    assert int(units_off(rounded.amax(0), rounded.amin(0)).max()) <= 1
    assert torch.equal(draws[:, -5:-2].unique(dim=0)[0], values[-5:-2].double())


def test_position_decides_not_the_piece() -> None:
    values = random(1000, scale=0.3)
    draw = Stochastic(3, "a", "BF16")
    whole = draw(values, 0)
    for start in (1, 15, 16, 17, 500, 999):
        assert torch.equal(draw(values[start:], start), whole[start:])
    assert not torch.equal(Stochastic(4, "a", "BF16")(values, 0), whole)
    assert not torch.equal(Stochastic(3, "b", "BF16")(values, 0), whole)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_changes_below_half_a_unit_survive(dtype: str, tmp_path: Path) -> None:
    weights = {
        f"{name}.weight": random(256, 320, seed=i, scale=0.05, dtype=DTYPES[dtype]) for i, name in enumerate("ab")
    }
    one = lora({"a": (256, 320), "b": (256, 320)}, rank=4, scale=0.0008)
    base, adapter = save_base(tmp_path / "base", weights), save_adapter(tmp_path / "adapter", one)
    nearest = merge(base, [adapter], tmp_path / "nearest", retention="full")
    report = merge(base, [adapter], tmp_path / "out", rounding="stochastic", seed=5, retention="full")
    assert report.retention is not None
    assert nearest.retention is not None
    assert abs(report.retention - 1) < 0.05
    if dtype == "BF16":
        assert nearest.retention < 0.7
    wanted, found = merged(weights, [one], torch.float64), load(tmp_path / "out")
    for name in weights:
        low = merged(weights, [one])[name]
        assert int(units_off(found[name], low).max()) <= 1
        error, unit = (found[name].double() - wanted[name]), low.abs().double() * 2.0**-7
        assert abs(float((error / unit).mean())) < 0.01
    record = json.loads((tmp_path / "out" / "loratools.json").read_text())
    assert record["rounding"] == {"method": "stochastic", "seed": 5}


def test_wider_dtypes_are_rounded_to_nearest(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {"a.weight": random(*SHAPE)})
    adapter = save_adapter(tmp_path / "adapter", lora({"a": SHAPE}, scale=0.01))
    plan = prepare(base, [adapter], tmp_path / "out", options=MergeOptions(dtype="F64")).plan
    for rounding in ("nearest", "stochastic"):
        (tmp_path / rounding).mkdir()
        write_weights(plan, tmp_path / rounding, Settings(1, rounding=rounding), lambda _: None)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("nearest", "stochastic"))
    assert one == other


def test_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {"a.weight": random(*SHAPE, dtype=torch.bfloat16)})
    adapter = save_adapter(tmp_path / "adapter", lora({"a": SHAPE}, scale=0.01))
    plan = prepare(base, [adapter], tmp_path / "out")
    made = {}
    for name, settings in {
        "one": Settings(1, rounding="stochastic", seed=1),
        "threads": Settings(3, rounding="stochastic", seed=1),
        "tiles": Settings(2, rounding="stochastic", seed=1, tile_bytes=56 * 2 * 5),
        "seed": Settings(1, rounding="stochastic", seed=2),
    }.items():
        (tmp_path / name).mkdir()
        write_weights(plan.plan, tmp_path / name, settings, lambda _: None)
        made[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert made["one"] == made["threads"] == made["tiles"] != made["seed"]
