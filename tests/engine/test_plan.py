"""What a plan says of itself: which tensors change, how they are seen, and what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.plan import Change
from loratools.engine.task import TILE
from loratools.storage.header import TensorSpec
from loratools.surgery.merge import MergeOptions, prepare
from tests.engine import models
from tests.surgery.models import load, save_base


def source(*shape: int) -> TensorSpec:
    return TensorSpec("F32", shape, Path("base"), 0, 4 * torch.Size(shape).numel())


@pytest.mark.parametrize(
    ("shape", "matrix"), [((3, 4), (3, 4)), ((3, 4, 2, 2), (3, 16)), ((5,), (5, 1)), ((), (1, 1)), ((0, 4), (0, 0))]
)
def test_a_tensor_is_seen_as_its_first_side_by_the_rest(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert Change(source(*shape)).matrix == matrix


def test_a_tensor_is_seen_as_its_sites_see_it(tmp_path: Path) -> None:
    plan = prepare(models.base(tmp_path / "base", "F32"), models.adapters(tmp_path)[0], tmp_path / "out").plan
    (_, placement), *_ = plan.changes["a.weight"].placements
    stacked = [Placement("m", placement.update, Site.whole("W", matrix)) for matrix in ((12, 4), (6, 8))]
    assert Change(source(3, 4, 4), ((0, stacked[0]), (1, stacked[0]))).matrix == (12, 4)
    with pytest.raises(ValueError, match=r"sites of different views \[\(6, 8\), \(12, 4\)\]"):
        _ = Change(source(3, 4, 4), tuple(enumerate(stacked))).matrix


def test_changed_cast_and_copied_tensors_are_told_apart(tmp_path: Path) -> None:
    weights = load(models.base(tmp_path / "plain", "BF16")) | {"norm.weight": torch.ones(5), "ids": torch.arange(3)}
    base, (paths, scales) = save_base(tmp_path / "base", weights), models.adapters(tmp_path)
    plan = prepare(base, paths, tmp_path / "out", weights=scales, options=MergeOptions(dtype="BF16")).plan
    assert plan.touched().keys() == {"a.weight", "b.weight", "c.weight", "d.weight"}
    assert plan.rewritten().keys() == plan.touched().keys() | {"norm.weight"}
    document = plan.to_json(2)
    assert document["tensors"] == {"total": 6, "changed": 4, "cast": 1}
    assert document["bytes"]["copied"] == 3 * 8
    assert document["bytes"]["changed"] == 2 * sum(weights[name].numel() for name in plan.rewritten())
    assert document["bytes"]["written"] == document["bytes"]["changed"] + 24
    kinds = [(item["adapter"], item["kind"], item["rank"], item["weight"]) for item in document["changed"]["a.weight"]]
    assert kinds == [(1, "lora", 5, 0.7), (2, "lora", 16, -0.3)]


def test_the_memory_is_that_of_tiles_and_factors_for_each_thread(tmp_path: Path) -> None:
    plan = prepare(models.base(tmp_path / "base", "BF16"), models.adapters(tmp_path)[0], tmp_path / "out").plan
    largest = sum(side * (5 + 16) for side in models.SHAPES["a"]) * (8 + 4)
    for torch_too in (True, False):
        one, three = (plan.peak_memory(threads, torch=torch_too) for threads in (1, 3))
        assert three - one == 2 * (6 * TILE + largest)
    assert plan.peak_memory(1, torch=True) > plan.peak_memory(1, torch=False) + 100_000_000
