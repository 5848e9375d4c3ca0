"""The weight under an update, laid out as its ΔW is."""

from __future__ import annotations

from pathlib import Path

import torch

from loratools.adapter.kinds import get
from loratools.adapter.model import Adapter
from loratools.adapter.placement.resolve import resolve
from loratools.adapter.placement.weight import base_matrix, by_module
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor
from tests.surgery.models import random, save_base


def test_the_bias_beside_a_weight_is_no_part_of_it(tmp_path: Path) -> None:
    """With `lora_bias` a module has two placements; only that of the weight says what the base has there."""
    W = random(6, 4, seed=1)
    base = Checkpoint.open(save_base(tmp_path / "base", {"fc.weight": W, "fc.bias": random(6, seed=2)}))
    parts = {"lora_A.weight": random(2, 4), "lora_B.weight": random(6, 2), "lora_B.bias": random(6, seed=3)}
    update = get("lora").build({part: LazyTensor.of(tensor) for part, tensor in parts.items()}, 1.0, 2.0)
    placements = resolve(Adapter({"fc": update}), {name: spec.shape for name, spec in base.specs.items()})
    assert [placement.site.tensor for placement in placements] == ["fc.weight", "fc.bias"]
    (module, weights), *rest = by_module(placements).items()
    assert (module, rest) == ("fc", [])
    assert torch.equal(base_matrix(base, weights), W.double())
