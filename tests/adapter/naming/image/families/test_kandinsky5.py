"""Kandinsky 5: the names are the model's own, in both namings."""

from __future__ import annotations

import pytest

from loratools.adapter.naming.image.families.kandinsky5 import FAMILY
from tests.make.image_families import model_of, prove

diffusers = pytest.importorskip("diffusers")


def test_all_modules_keep_their_names() -> None:
    model = model_of(
        diffusers.Kandinsky5Transformer3DModel, in_text_dim=12, in_text_dim2=6, time_dim=8, model_dim=16, ff_dim=24,
        num_text_blocks=2, num_visual_blocks=2, axes_dims=(2, 2, 4),
    )  # fmt: skip
    prove(FAMILY, model, dict)
