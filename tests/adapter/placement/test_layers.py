"""Layers that an adapter repeats are counted before anything is made of them: a file may ask for any number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.adapter.model import MOST_LAYERS
from loratools.adapter.placement.layers import replicated
from loratools.errors import IncompatibleAdapter
from loratools.storage.checkpoint import Checkpoint

from .placing import adapter


def base(folder: Path) -> Checkpoint:
    save_file({f"model.layers.{i}.q.weight": torch.zeros(2, 2) for i in range(3)}, folder / "model.safetensors")
    return Checkpoint.open(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("layers", "refusal"),
    [
        ([[0, 2**53 - 1]], "repeats layers up to 9007199254740990"),
        ([[0, 1], [2, 2**40]], "repeats layers up to 1099511627775"),
        ([[0, 3]] * (MOST_LAYERS // 3 + 1), "for a model of 4098 layers; 4096 is the most"),
    ],
)
def test_more_layers_than_any_model_has_are_refused(layers: list[list[int]], refusal: str, tmp_path: Path) -> None:
    given = adapter({"model.layers.0.q": (2, 2)}, layer_replication=layers)
    with pytest.raises(IncompatibleAdapter, match=refusal):
        replicated(base(tmp_path), [given])


def test_as_many_as_there_can_be_are_made(tmp_path: Path) -> None:
    given = adapter({"model.layers.0.q": (2, 2)}, layer_replication=[[0, 2]] * (MOST_LAYERS // 2))
    assert len(replicated(base(tmp_path), [given]).specs) == MOST_LAYERS
