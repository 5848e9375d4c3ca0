"""Modules worked on in stacks: the same numbers as alone, in any company, in one pass or two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loratools.adapter.kinds.lora import LoraUpdate
from loratools.adapter.model import Adapter
from loratools.dialects import open_adapter
from loratools.errors import IncompatibleAdapter
from loratools.linalg import stacks
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy, Fixed
from loratools.storage.lazy import LazyTensor
from loratools.surgery.combine import combine
from loratools.surgery.resize import resize
from tests.surgery.models import random

SHAPES = [(24, 16), (24, 16), (16, 24), (24, 16), (8, 16)]
RANKS = [4, 4, 3, 2, 4]


def adapter(seed: int, count: int = 10) -> Adapter:
    """Return an adapter of modules of several shapes and ranks, not in the order of these."""
    updates = {}
    for i in range(count):
        (out, inner), r = SHAPES[i % 5], RANKS[i % 5]
        A, B = random(r, inner, seed=seed + i), random(out, r, seed=seed + i + 100)
        updates[f"layers.{i}.proj"] = LoraUpdate(LazyTensor.of(A), LazyTensor.of(B), 0.5, 0.5 * r)
    return Adapter(updates)


def only(whole: Adapter, module: str) -> Adapter:
    return replace(whole, updates={module: whole.updates[module]})


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, ...]]:
    opened = open_adapter(folder)
    return {
        module: tuple(lazy.load() for lazy in update.parts.values())
        for module, update in opened.updates.items()
    }  # fmt: skip


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [1, 500, 1 << 30])
def test_a_module_has_the_same_bytes_alone_as_in_any_stack(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = adapter(1), adapter(50)
    combine([one, other], tmp_path / "whole", weights=[0.7, -1.3], ranks=3)
    monkeypatch.setattr(stacks, "NUMBERS", size)
    combine([one, other], tmp_path / "again", weights=[0.7, -1.3], ranks=3)
    files = [next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]
    found = factors(tmp_path / "whole")
    for module in ("layers.2.proj", "layers.5.proj"):
        combine([only(one, module), only(other, module)], tmp_path / module, weights=[0.7, -1.3], ranks=3)
        assert same(factors(tmp_path / module)[module], found[module])


def test_modules_of_one_shape_are_decomposed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decompose = stacks.decompose
    monkeypatch.setattr(stacks, "decompose", lambda B, A: sizes.append(len(B)) or decompose(B, A))
    combine([adapter(1, 100), adapter(50, 100)], tmp_path / "sum")
    assert sorted(sizes) == [20, 20, 20, 40]


@pytest.mark.parametrize("twice", [Ranks(Fixed(2), uniform=True), Ranks(budget=10 * 2 * 40)])
def test_factors_that_are_read_again_are_the_same(twice: Ranks, tmp_path: Path) -> None:
    report = resize(adapter(1), tmp_path / "twice", twice)
    ranks = {share.module: share.rank for share in report.shares}
    assert report.parameters == sum(share.rank * sum(share.shape) for share in report.shares)
    for rank in set(ranks.values()):
        resize(adapter(1), tmp_path / f"{rank}", rank)
        at_once = factors(tmp_path / f"{rank}")
        for module, own in factors(tmp_path / "twice").items():
            assert ranks[module] != rank or same(own, at_once[module])


def test_each_module_of_a_stack_keeps_a_rank_of_its_own(tmp_path: Path) -> None:
    whole = adapter(1)
    report = resize(whole, tmp_path / "energy", Ranks(Energy(0.8)))
    assert len({share.rank for share in report.shares}) > 1
    for share in report.shares:
        D = whole.updates[share.module].delta_weight().double()
        S2 = torch.linalg.svdvals(D).square()
        assert share.rank == int((S2.cumsum(0) < 0.8 * S2.sum()).sum()) + 1
        assert share.optimum == pytest.approx(float(S2[share.rank :].sum().sqrt()), rel=1e-6, abs=1e-5)
        found = open_adapter(tmp_path / "energy").updates[share.module].delta_weight().double()
        assert float((found - D).norm()) == pytest.approx(share.error, rel=1e-5, abs=1e-5)


def test_every_module_that_is_not_finite_is_named_with_its_adapter_and_factor(tmp_path: Path) -> None:
    one, other = adapter(1), adapter(50)
    for source, module, part, value in (
        (one, "layers.3.proj", 0, float("nan")), (other, "layers.5.proj", 1, float("inf")),
    ):  # fmt: skip
        list(source.updates[module].parts.values())[part].load()[0, 0] = value
    with pytest.raises(IncompatibleAdapter) as error:
        combine([one, other], tmp_path / "sum")
    assert list(error.value.problems) == [
        "layers.3.proj: adapter 1 has NaN or infinite elements in factor A",
        "layers.5.proj: adapter 2 has NaN or infinite elements in factor B",
    ]
    assert not (tmp_path / "sum").exists()


def test_a_module_that_is_zero_or_weighed_by_0_is_dropped(tmp_path: Path) -> None:
    one = adapter(1)
    next(iter(one.updates["layers.1.proj"].parts.values())).load().zero_()
    report = combine([one, one], tmp_path / "sum", weights=["1,layers.2.proj=0", "1,layers.2.proj=0,layers.4.proj=-1"])
    assert report.dropped == ("layers.1.proj", "layers.2.proj", "layers.4.proj")
    assert {share.true_rank for share in report.shares} == {2, 3, 4}
