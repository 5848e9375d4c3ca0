"""Experts one by one beside a stack of them: summed and compared expert by expert, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools.adapter.gathered import gathered
from loratools.adapter.kinds.experts import ExpertsUpdate
from loratools.adapter.kinds.lora import LoraUpdate
from loratools.adapter.model import Adapter
from loratools.dialects import open_adapter
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor
from loratools.surgery.combine import combine
from loratools.surgery.compare import compare
from tests.surgery.models import random

EXPERTS, RANK, NAME = 3, 2, "model.layers.0.mlp.experts"
SIDES = {"gate_up_proj": (12, 8), "down_proj": (8, 6)}
MODULES = {"gate_up_proj": f"{NAME}.base_layer", "down_proj": NAME}


def stacks(seed: int) -> Adapter:
    updates = {}
    for i, (parameter, (out, inner)) in enumerate(SIDES.items()):
        A, B = random(EXPERTS * RANK, inner, seed=seed + i), random(out, RANK * EXPERTS, seed=seed + i + 50)
        update = ExpertsUpdate(LazyTensor.of(A), LazyTensor.of(B), 1.5, 3.0, EXPERTS, parameter)
        updates[MODULES[parameter]] = update
    return Adapter(updates, settings={"target_parameters": [f"mlp.experts.{name}" for name in SIDES]})


def single(out: int, inner: int, seed: int, r: int = RANK, scaling: float = 2.0) -> LoraUpdate:
    A, B = random(r, inner, seed=seed), random(out, r, seed=seed + 90)
    return LoraUpdate(LazyTensor.of(A), LazyTensor.of(B), scaling, scaling * r)


def each(names: tuple[str, str, str], block: str, without: tuple[str, ...] = ()) -> Adapter:
    """Return an adapter of every expert's projections, of different ranks and scalings."""
    updates = {}
    for e in range(EXPERTS):
        for i, (name, sides) in enumerate(zip(names, ((6, 8), (6, 8), (8, 6)), strict=True)):
            updates[f"model.layers.0.{block}.experts.{e}.{name}"] = single(*sides, 10 * e + i, 1 + (e + i) % 3, 1.0 + e)
    return Adapter(
        {module: update for module, update in updates.items() if not module.endswith(without)},
        settings={"target_modules": list(names)},
    )


def deltas(adapter: Adapter, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> dict[str, Tensor]:
    """Return the ΔW of each parameter, (E, out, in), in float64, by the modules' own factors."""
    found = {name: torch.zeros(EXPERTS, *sides, dtype=torch.float64) for name, sides in SIDES.items()}
    for module, update in adapter.updates.items():
        if update.members:
            for e, expert in enumerate(update.members):
                left, right = expert.factored().load()
                found[update.layout["parameter"]][e] = update.scaling * (left.double() @ right.double())
            continue
        number, last = module.split(".")[-2:]
        A, B = (update.parts[f"lora_{factor}.weight"].load().double() for factor in "AB")
        place = names.index(last)
        target = found["down_proj"] if place == 2 else found["gate_up_proj"][:, 6 * place : 6 * place + 6]
        target[int(number)] = update.scaling * (B @ A)
    return found


@pytest.mark.parametrize("without", [(), ("0.up_proj", "0.w3"), ("1.down_proj", "1.w2", "2.down_proj", "2.w2")])
@pytest.mark.parametrize("old", [False, True])
def test_a_sum_with_a_stack_is_that_of_every_expert(old: bool, without: tuple[str, ...], tmp_path: Path) -> None:
    names = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
    one, other = stacks(1), each(names, "block_sparse_moe" if old else "mlp", without)
    a, b = deltas(one), deltas(other, names)
    for number, order in enumerate(([one, other], [other, one])):
        weights = [0.5, -2.0] if order[0] is one else [-2.0, 0.5]
        combine(order, tmp_path / f"{number}", weights=weights)
        found = open_adapter(tmp_path / f"{number}")
        assert set(found.updates) == set(MODULES.values())
        for parameter, D in deltas(found).items():
            wanted = 0.5 * a[parameter] - 2.0 * b[parameter]
            assert float((D - wanted).norm()) <= 1e-6 * float(wanted.norm())


def test_compared_with_a_stack_it_is_measured_expert_by_expert() -> None:
    one, other = stacks(1), each(("gate_proj", "up_proj", "down_proj"), "mlp")
    report = compare(one, other)
    a, b = deltas(one), deltas(other)
    assert report.only == ((), ())
    assert len(report.modules) == 2 * EXPERTS
    for module in report.modules:
        parameter, e = module.module.split(".")[-2:]
        D1, D2 = a[parameter][int(e)], b[parameter][int(e)]
        assert module.cosine == pytest.approx(float((D1 * D2).sum() / D1.norm() / D2.norm()), abs=1e-6)
        assert module.norms == pytest.approx((float(D1.norm()), float(D2.norm())), rel=1e-6)


def test_linear_layers_of_gpt_oss_beside_its_stack() -> None:
    down = {f"{NAME}.down_projs.{e}": single(8, 6, e) for e in range(EXPERTS)}
    (_, other) = gathered([stacks(1), Adapter(down)])
    assert list(other.updates) == [NAME]
    for e, expert in enumerate(other.updates[NAME].members):
        assert torch.allclose(expert.delta_weight(), down[f"{NAME}.down_projs.{e}"].delta_weight(), atol=1e-6)


def test_without_a_stack_nothing_is_gathered() -> None:
    adapter = each(("gate_proj", "up_proj", "down_proj"), "mlp")
    assert gathered([adapter, adapter]) == [adapter, adapter]


def test_experts_of_different_shapes_are_refused() -> None:
    odd = {f"{NAME}.0.down_proj": single(8, 6, 1), f"{NAME}.1.down_proj": single(8, 7, 2)}
    with pytest.raises(IncompatibleAdapter, match="experts of different shapes"):
        compare(stacks(1), Adapter(odd))
