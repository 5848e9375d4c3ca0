"""Stacks of experts, combined, resized and compared expert by expert, against explicit ΔW in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.adapter.kinds.experts import ExpertsUpdate, Rule
from loratools.adapter.kinds.lora import LoraUpdate
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.dialects import open_adapter, save_adapter
from loratools.errors import IncompatibleAdapter
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy
from loratools.storage.lazy import LazyTensor
from loratools.surgery.combine import combine
from loratools.surgery.compare import compare
from loratools.surgery.resize import resize
from loratools.surgery.spectrum import spectrum
from tests.surgery.models import random

EXPERTS = 3
NAME = "h.0.mlp.experts"
UP, DOWN = f"{NAME}.gate_up_proj", f"{NAME}.down_proj"
SIDES = {"gate_up_proj": (12, 8), "down_proj": (8, 6)}


def stack(
    parameter: str, seed: int, r: int, scaling: float, sides: tuple[int, int] | None = None, **fields: Any
) -> Any:
    out, inner = sides or SIDES[parameter]
    A, B = (LazyTensor.of(W) for W in (random(EXPERTS * r, inner, seed=seed), random(out, r * EXPERTS, seed=seed + 50)))
    fields = {"transposed": False, **fields}
    return ExpertsUpdate(A, B, scaling, scaling * r, EXPERTS, parameter, **fields)


def adapter(seed: int, r: int = 2, scaling: float = 1.5, parameters: tuple[str, ...] = tuple(SIDES)) -> Adapter:
    """Return an adapter of these parameters under PEFT's names, and of a linear layer."""
    wrappers = {name: NAME + ".base_layer" * depth for depth, name in enumerate(reversed(parameters))}
    updates = {wrappers[name]: stack(name, seed + i, r, scaling) for i, name in enumerate(parameters)}
    A, B = LazyTensor.of(random(r, 5, seed=seed + 7)), LazyTensor.of(random(7, r, seed=seed + 8))
    linear = LoraUpdate(A, B, scaling, scaling * r)
    settings = {"target_parameters": [f"experts.{name}" for name in parameters]}
    return Adapter({**updates, "h.0.q_proj": linear}, base=BaseIdentity("org/base"), settings=settings)


def delta(update: Any) -> Tensor:
    """Return s·Σ_q B[o, q·E + e]·A[e·r + q, i] for each expert, by that formula."""
    A, B, r = update.A.load().double(), update.B.load().double(), update.rank
    each = [
        sum(torch.outer(B[:, q * EXPERTS + e], A[e * r + q]) for q in range(r)) * update.scaling for e in range(EXPERTS)
    ]
    return torch.stack(each)  # type: ignore[arg-type]


def deltas(opened: Adapter | Path) -> dict[str, Tensor]:
    opened = opened if isinstance(opened, Adapter) else open_adapter(opened)
    return {update.path(module): delta(update) for module, update in opened.updates.items() if update.members}


def truncated(D: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def near(found: Tensor, wanted: Tensor) -> bool:
    return float((found - wanted).norm()) <= 1e-6 * float(wanted.norm())


def test_the_sum_is_that_of_every_expert(tmp_path: Path) -> None:
    one, other = adapter(1), adapter(20, r=4, scaling=0.3)
    report = combine([one, other], tmp_path / "sum", weights=[0.7, -1.3])
    found, a, b = deltas(tmp_path / "sum"), deltas(one), deltas(other)
    assert found.keys() == {UP, DOWN}
    assert all(near(found[path], 0.7 * a[path] - 1.3 * b[path]) for path in found)
    assert report.error < 1e-6
    half = combine([one, one], tmp_path / "half", weights=[0.5, 0.5])
    assert all(near(each, a[path]) for path, each in deltas(tmp_path / "half").items())
    assert {share.rank for share in half.shares} == {2}


def test_adapters_that_wrap_other_parameters_of_one_module_are_not_mixed_up(tmp_path: Path) -> None:
    """Alone, each parameter is wrapped under the module's own name."""
    up, down = adapter(1, parameters=("gate_up_proj",)), adapter(2, parameters=("down_proj",))
    assert up.updates.keys() == down.updates.keys()
    combine([up, down], tmp_path / "both")
    found = deltas(tmp_path / "both")
    assert near(found[UP], deltas(up)[UP])
    assert near(found[DOWN], deltas(down)[DOWN])
    opened = open_adapter(tmp_path / "both")
    assert opened.updates[f"{NAME}.base_layer"].layout["parameter"] == "gate_up_proj"
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [DOWN, UP]
    combine([adapter(1), up], tmp_path / "less", weights=[1, -1])  # gate_up_proj is taken away completely
    assert deltas(tmp_path / "less").keys() == {DOWN}
    assert "gate_up_proj" not in str(json.loads((tmp_path / "less" / "adapter_config.json").read_text()))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_smaller_rank_is_the_best_of_every_expert(rank: int, tmp_path: Path) -> None:
    one = adapter(3, r=4)
    report = resize(one, tmp_path / "small", rank)
    error = 0.0
    for path, D in deltas(one).items():
        best = truncated(D, rank)
        assert near(deltas(tmp_path / "small")[path], best)
        (share,) = (share for share in report.shares if share.module == path)
        assert share.norm == pytest.approx(float(D.norm()), rel=1e-12)
        assert share.error == pytest.approx(float((D - best).norm()), rel=1e-5)
        assert (share.rank, share.true_rank, share.shape) == (rank, 4, tuple(D.shape))
        error += float((D - best).norm()) ** 2
    linear = report.shares[[share.module for share in report.shares].index("h.0.q_proj")]
    total = error + linear.error**2
    assert report.error * sum(share.norm**2 for share in report.shares) ** 0.5 == pytest.approx(total**0.5, rel=1e-5)


def test_an_energy_is_kept_of_every_expert_and_experts_may_be_zero(tmp_path: Path) -> None:
    one = adapter(3, r=4, parameters=("down_proj",))
    update: Any = one.updates[NAME]
    A = update.A.load().clone()
    A[:4], A[4:6] = 0, 1000 * A[4:6]  # the first expert is zero, the second almost of rank 2
    one = replace(one, updates={NAME: replace(update, A=LazyTensor.of(A))})
    (D,) = deltas(one).values()
    S2 = torch.linalg.svdvals(D[1:]).square()
    wanted = int((S2.cumsum(-1) >= 0.9 * S2.sum(-1, keepdim=True)).int().argmax(-1).max()) + 1
    report = resize(one, tmp_path / "small", Ranks(Energy(0.9)))
    assert report.shares[0].rank == wanted
    assert near(deltas(tmp_path / "small")[DOWN], truncated(D, wanted))


def test_a_budget_counts_every_expert(tmp_path: Path) -> None:
    report = resize(adapter(3, r=4), tmp_path / "small", Ranks(budget=200))
    assert report.parameters <= 200
    cost = {UP: EXPERTS * 20, DOWN: EXPERTS * 14, "h.0.q_proj": 12}
    assert report.parameters == sum(share.rank * cost[share.module] for share in report.shares)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "breadcrumbs", "sce", "knots", "core_space"])
def test_a_method_does_to_each_expert_what_it_does_to_a_module(method: str, tmp_path: Path) -> None:
    both = [adapter(1, r=2, parameters=("down_proj",)), adapter(5, r=2, parameters=("down_proj",))]
    weights = [1.0, 1.0] if method == "sce" else [1.0, 0.4]  # SCE works out its own
    combine(both, tmp_path / "stack", method=method, density=0.5, weights=weights)
    found = deltas(tmp_path / "stack")[DOWN]
    for e in range(EXPERTS):
        alone = []
        for each in both:
            left, right = each.updates[NAME].members[e].factored().load()  # type: ignore[union-attr]
            alone.append(Adapter({"m": LoraUpdate(LazyTensor.of(right), LazyTensor.of(left), 1.5, 3.0)}))
        combine(alone, tmp_path / f"{e}", method=method, density=0.5, weights=weights)
        wanted = open_adapter(tmp_path / f"{e}").updates["m"].delta_weight().double()
        assert near(found[e], wanted)


def test_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    for threads in (1, 3):
        combine([adapter(1), adapter(9)], tmp_path / f"{threads}", threads=threads, ranks=2)
    one, three = (next((tmp_path / n).glob("*.safetensors")).read_bytes() for n in ("1", "3"))
    assert one == three


def square(seed: int, rule: Rule, stated: bool | None = None) -> Adapter:
    update = stack("down_proj", seed, 2, 1.0, (6, 6), transposed=stated, rule=rule)
    return Adapter({NAME: update}, base=BaseIdentity("org/base"), settings={"target_parameters": ["experts.down_proj"]})


@pytest.mark.parametrize(
    ("first", "second", "turned"),
    [
        (("model", None), ("model", None), False), (("model", None), ("inverse", None), True),
        (("model", False), ("model", True), True), (("in_out", True), ("model", True), False),
        (("model", None), ("in_out", True), None), (("unknown", None), ("unknown", None), None),
        (("model", False), ("inverse", None), None),
    ],
)  # fmt: skip
def test_square_stacks_of_different_peft_are_turned_or_refused(
    first: tuple[Rule, bool | None], second: tuple[Rule, bool | None], turned: bool | None, tmp_path: Path
) -> None:
    one, other = square(1, *first), square(2, *second)
    if turned is None:
        with pytest.raises(IncompatibleAdapter, match="versions of PEFT"):
            combine([one, other], tmp_path / "sum")
        with pytest.raises(IncompatibleAdapter, match="versions of PEFT"):
            compare(one, other)
        return
    combine([one, other], tmp_path / "sum", weights=[1, 2])
    (a,), (b,) = deltas(one).values(), deltas(other).values()
    b = b.transpose(1, 2) if turned else b
    (found,) = deltas(tmp_path / "sum").values()
    assert near(found, a + 2 * b)
    angle = compare(one, other).cosine
    assert angle == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=1e-12)


def test_shapes_tell_that_stacks_lie_the_other_way_round(tmp_path: Path) -> None:
    one = Adapter(
        {NAME: stack("down_proj", 1, 2, 1.0, transposed=None)}, settings={"target_parameters": ["experts.down_proj"]}
    )
    other = Adapter(
        {NAME: stack("down_proj", 2, 2, 1.0, (6, 8), transposed=True, rule="in_out")}, settings=one.settings
    )
    combine([one, other], tmp_path / "sum")
    (a,), (b,) = deltas(one).values(), deltas(other).values()
    (found,) = deltas(tmp_path / "sum").values()
    assert near(found, a + b.transpose(1, 2))
    assert compare(one, other).distance == pytest.approx(float((a - b.transpose(1, 2)).norm() / a.norm()), rel=1e-9)


def test_what_only_the_base_tells_stays_so(tmp_path: Path) -> None:
    """The format says of every stack how it lies, and PEFT's files do with its version."""
    one = square(1, "inverse")
    report = resize(one, tmp_path / "small", 1)
    assert "convert --base" in report.warnings[-1]
    opened: Any = open_adapter(tmp_path / "small")
    assert opened.dialect == "peft"
    update = opened.updates[NAME]
    assert (update.transposed, update.rule, update.rank) == (None, "inverse", 1)
    assert near(delta(update), truncated(delta(one.updates[NAME]), 1))


def test_compare_and_spectrum_name_the_parameter(tmp_path: Path) -> None:
    one, other = adapter(1), adapter(2, r=3)
    save_adapter(one, tmp_path / "one")
    report = compare(tmp_path / "one", other)
    a, b = deltas(one), deltas(other)
    by_name = {each.module: each for each in report.modules}
    assert set(by_name) == {f"{path}.{e}" for path in (UP, DOWN) for e in range(EXPERTS)} | {"h.0.q_proj"}
    for path in (UP, DOWN):
        for e in range(EXPERTS):
            D1, D2 = a[path][e], b[path][e]
            assert by_name[f"{path}.{e}"].cosine == pytest.approx(
                float((D1 * D2).sum() / D1.norm() / D2.norm()), abs=1e-6
            )
    found = spectrum(tmp_path / "one")
    assert not found.skipped
    for each in found.modules:
        if each.kind == "experts":
            path, _, e = each.module.rpartition(".")
            wanted = torch.linalg.svdvals(a[path][int(e)])[:2]
            assert each.sigma == pytest.approx(wanted.tolist(), rel=1e-5)
