"""Certificates of adapters that others made, against dense matrices in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools.errors import IncompatibleAdapter
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Fixed
from loratools.surgery.extract import extract
from loratools.surgery.extract.certify import certify
from tests.surgery.finetunes import llama, moved, optimum, pair
from tests.surgery.models import Lora, lora, random, save_adapter

UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"


def test_errors_are_those_of_the_factors_and_of_the_best_ones(tmp_path: Path) -> None:
    base = llama()
    tuned = moved(base, "up_proj.weight", "q_proj.weight", rank=8)
    models = pair(tmp_path, base, tuned)
    given = lora({UP: (36, 24), Q: (24, 24)}, rank=4, scale=0.2)
    found = certify(models[1], models[0], save_adapter(tmp_path / "a", given))
    assert [one.module for one in found.layers] == [UP, Q]
    for one, best in zip(found.layers, found.optimal, strict=True):
        D = tuned[f"{one.module}.weight"].double() - base[f"{one.module}.weight"].double()
        assert one.delta_norm == pytest.approx(float(D.norm()), rel=1e-6)
        assert one.base_norm == pytest.approx(float(base[f"{one.module}.weight"].double().norm()), rel=1e-9)
        error = float((D - given.delta(one.module)).norm() / D.norm())
        assert one.error == pytest.approx(error, rel=1e-6)
        assert best == pytest.approx(optimum(D, 4) / float(D.norm()), rel=1e-5)
        assert one.error / (1 + one.excess_bound) == pytest.approx(best, rel=1e-4)


def test_an_extracted_adapter_gets_the_certificate_that_it_was_given(tmp_path: Path) -> None:
    base = llama(torch.bfloat16)
    models = pair(tmp_path, base, moved(base, "up_proj.weight", "q_proj.weight", "norm.weight", rank=9))
    made = extract(*models, tmp_path / "out", Ranks(Fixed(4)), dtype="BF16")
    found = certify(models[1], models[0], tmp_path / "out")
    printed = {one.layer.module: one.layer for one in made.outcomes if one.layer}
    for one in found.layers:
        assert one.error == pytest.approx(printed[one.module].error, rel=1e-5)
        assert one.noise == pytest.approx(printed[one.module].noise, rel=1e-9)
        assert one.stable_rank == pytest.approx(printed[one.module].stable_rank, rel=1e-5)
    assert found.total.error == pytest.approx(made.total.error, rel=1e-5)
    assert (found.whole, found.uncovered) == (("model.layers.0.input_layernorm.weight", "model.norm.weight"), ())


def test_what_the_adapter_does_not_hold_is_named(tmp_path: Path) -> None:
    base = llama()
    tuned = moved(base, "up_proj.weight", "norm.weight", "lm_head.weight")
    models = pair(tmp_path, base, tuned)
    found = certify(models[1], models[0], save_adapter(tmp_path / "a", lora({UP: (36, 24)}, rank=2)))
    norms = {name: float((tuned[name].double() - W.double()).norm()) for name, W in base.items()}
    assert dict(found.uncovered) == pytest.approx(
        {name: norm for name, norm in norms.items() if norm and UP not in name}, rel=1e-6
    )
    energy = {name: norm**2 for name, norm in norms.items()}
    lost = sum(energy.values()) - energy[f"{UP}.weight"]
    assert found.uncovered_energy == pytest.approx(lost / sum(energy.values()), rel=1e-6)


def test_fused_bases_and_layers_that_did_not_change(tmp_path: Path) -> None:
    parts = {"gate_proj": random(20, 12, seed=1), "up_proj": random(20, 12, seed=2)}
    base = {"layers.0.mlp.gate_up_proj.weight": torch.cat(list(parts.values()))}
    D = random(20, 2, seed=3) @ random(2, 12, seed=4)
    tuned = {"layers.0.mlp.gate_up_proj.weight": torch.cat([parts["gate_proj"], parts["up_proj"] + D])}
    models = pair(tmp_path, base, tuned, model_type="phi3")
    factors = {
        "layers.0.mlp.up_proj": (random(2, 12, seed=4), random(20, 2, seed=3)),
        "layers.0.mlp.gate_proj": (random(2, 12), random(20, 2)),
    }
    gate, up = certify(models[1], models[0], save_adapter(tmp_path / "a", Lora(factors, alpha=2))).layers
    assert up.error < 1e-6
    assert (gate.delta_norm, gate.error) == (0, 0)


def test_strangers_are_refused(tmp_path: Path) -> None:
    base = llama()
    tuned = moved(base, "q_proj.weight")
    del tuned[f"{UP}.weight"]
    models = pair(tmp_path, base, tuned)
    with pytest.raises(IncompatibleAdapter, match="lacks what the adapter changes"):
        certify(models[1], models[0], save_adapter(tmp_path / "a", lora({UP: (36, 24)})))


def test_experts_are_certified_one_by_one(tmp_path: Path) -> None:
    base = {"mlp.experts.down_proj": random(3, 12, 8, seed=1)}
    D = random(3, 12, 8, seed=2)
    models = pair(tmp_path, base, {"mlp.experts.down_proj": base["mlp.experts.down_proj"] + D}, model_type="mixtral")
    extract(*models, tmp_path / "out", Ranks(Fixed(3)))
    for e, one in enumerate(certify(models[1], models[0], tmp_path / "out").layers):
        assert one.module == f"mlp.experts.down_proj.{e}"
        assert one.error == pytest.approx(optimum(D[e], 3) / float(D[e].norm()), rel=1e-5)
