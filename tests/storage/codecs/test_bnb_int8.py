"""LLM.int8 made again: every byte on the own grid, the library's with fresh scales, right on average."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from loratools.storage.files import read_tensor
from tests.storage.codecs.bnb_models import M, eight_bit
from tests.storage.codecs.recode import opened, recoded
from tests.surgery.models import random


def test_int8_is_written_as_the_librarys(tmp_path: Path) -> None:
    W = random(48, 40, dtype=torch.bfloat16)
    W[5] = 0
    stored = eight_bit(W)
    view, encoding = opened(tmp_path / "base", stored)
    ours = read_tensor(view.specs[f"{M}.weight"])
    parts, values = recoded(encoding, ours.numpy(), "own")
    assert parts.keys() == {"weight"}
    assert np.array_equal(values, ours.numpy())
    assert np.array_equal(parts["weight"], stored[f"{M}.weight"].numpy())
    V = random(48, 40, seed=3)
    wanted = eight_bit(V)
    parts, values = recoded(encoding, V.numpy(), "fresh")
    assert np.array_equal(parts["weight"], wanted[f"{M}.weight"].numpy())
    assert np.array_equal(parts["SCB"], wanted[f"{M}.SCB"].numpy())
    generator = np.random.default_rng(3)
    drawn = np.mean([recoded(encoding, V.numpy() / 9, "own", generator.random)[1] for _ in range(400)], axis=0)
    step = stored[f"{M}.SCB"].numpy()[:, None] / 127
    inside = abs(V.numpy() / 9) < 127 * step
    assert abs(drawn - V.numpy() / 9)[inside].max() < 0.2 * step.max()
