"""Codes of bitsandbytes made again: every byte on the own grid, the library's with fresh scales, right on average."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.codecs import Grid
from loratools.storage.files import read_tensor
from tests.storage.codecs.bnb_models import SHAPES, M, eight_bit, exact, four_bit
from tests.storage.codecs.recode import held, opened, recoded
from tests.surgery.models import random


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_again_on_the_own_grid_are_every_byte(
    tmp_path: Path, kind: str, double: bool, shape: tuple[int, ...]
) -> None:
    view, encoding = opened(tmp_path / "base", four_bit(random(*shape), kind, double, torch.bfloat16, 128))
    W = read_tensor(view.specs[encoding.name]).numpy()
    before = held(encoding)
    for draw in (None, np.random.default_rng(1).random):
        parts, values = recoded(encoding, W, "own", draw)
        assert parts.keys() == {"weight"}
        assert parts["weight"].dtype == before["weight"].dtype
        assert parts["weight"].tobytes() == before["weight"].tobytes()
        assert np.array_equal(values, W)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_fresh_scales_are_the_librarys(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    W = random(*shape, seed=4, scale=0.02)
    _, other = opened(tmp_path / "base", four_bit(random(*shape), kind, False))
    _, wanted = opened(tmp_path / "wanted", four_bit(W, kind, False))
    parts, values = recoded(other, W.numpy(), "fresh")
    for part, array in held(wanted).items():
        assert (parts[part] if part in parts else held(other)[part]).tobytes() == array.tobytes()
    assert np.array_equal(values, read_tensor(logical(Checkpoint.open(tmp_path / "wanted")).specs[wanted.name]).numpy())


def test_fresh_scales_quantized_twice_are_the_librarys_to_its_rounding(tmp_path: Path) -> None:
    """The codes of the weight are the same; the mean of the scales, in JSON, is exact here and summed there."""
    W = random(256, 336, seed=4, scale=0.02)
    _, other = opened(tmp_path / "base", four_bit(random(256, 336), "nf4", True))
    stored = four_bit(W, "nf4", True)
    _, wanted = opened(tmp_path / "wanted", stored)
    parts, values = recoded(other, W.numpy(), "fresh")
    was, theirs = held(other), held(wanted)
    assert parts["weight"].tobytes() == theirs["weight"].tobytes()
    assert parts.keys() == {"weight", "absmax", "nested_absmax", "nf4"}
    assert all((parts[part].dtype, parts[part].shape) == (was[part].dtype, was[part].shape) for part in parts)
    assert (parts["absmax"] != theirs["absmax"]).mean() <= 5e-3  # its CPU kernel errs beside midpoints
    np.testing.assert_allclose(parts["nested_absmax"], theirs["nested_absmax"], rtol=1e-5)
    state = json.loads(bytes(parts["nf4"]))
    blocks = W.view(-1, 64).double().abs().amax(1)
    assert np.float32(state["nested_offset"]) == np.float32(blocks.mean().item())
    assert state.keys() == json.loads(bytes(theirs["nf4"])).keys()
    assert abs(values - W.numpy()).mean() <= 1.001 * abs(exact(stored, f"{M}.weight") - W).mean().item()
    written = load_file(tmp_path / "base" / "model.safetensors")
    for part, array in parts.items():
        written[other.module.names[part]] = torch.from_numpy(array.copy())
    again, _ = opened(tmp_path / "again", written)
    assert np.array_equal(read_tensor(again.specs[f"{M}.weight"]).numpy(), values)


@pytest.mark.parametrize(("grid", "double"), [("own", False), ("own", True), ("fresh", False), ("fresh", True)])
def test_rounding_at_random_is_right_on_average(tmp_path: Path, grid: Grid, double: bool) -> None:
    _, encoding = opened(tmp_path / "base", four_bit(random(64, 64), "nf4", double))
    with encoding.parts() as parts:
        top = np.empty((64, 64), np.float32)
        encoding.decode(parts, 0, top)
    limit = np.abs(top).max(axis=1, keepdims=True)
    W = np.clip(random(64, 64, seed=9).numpy(), -limit, limit)
    generator = np.random.default_rng(3)
    mean = np.mean([recoded(encoding, W, grid, generator.random)[1] for _ in range(400)], axis=0, dtype=np.float64)
    nearest = recoded(encoding, W, grid)[1]
    assert abs(mean - W).mean() < 0.15 * abs(nearest - W).mean()


@pytest.mark.parametrize("scheme", ["nf4", "nf4 twice", "fp4", "int8"])
def test_what_grows_beyond_the_own_grid_is_not_clipped(tmp_path: Path, scheme: str) -> None:
    """Only blocks and rows that have such a number get another scale; the others keep every byte."""
    W = random(16, 128, scale=0.02)
    stored = eight_bit(W) if scheme == "int8" else four_bit(W, scheme[:3], "twice" in scheme)
    view, encoding = opened(tmp_path / "base", stored)
    before = read_tensor(view.specs[f"{M}.weight"]).numpy()
    grown = before.copy()
    grown[3, :64] *= 1.6
    parts, values = recoded(encoding, grown, "own")
    scale = "SCB" if scheme == "int8" else "absmax"
    assert parts.keys() == {"weight", scale}
    place = 3 if scheme == "int8" else 6
    assert np.flatnonzero(parts[scale] != held(encoding)[scale]).tolist() == [place]
    assert abs(values[3, :64] - grown[3, :64]).max() <= 0.12 * abs(grown[3, :64]).max()
    others = np.delete(values, 3, axis=0)
    assert np.array_equal(others, np.delete(before, 3, axis=0))
    for part, array in parts.items():
        stored[encoding.module.names[part]] = torch.from_numpy(array.copy()).view(
            stored[encoding.module.names[part]].dtype
        )
    again, _ = opened(tmp_path / "again", stored)
    assert np.array_equal(read_tensor(again.specs[f"{M}.weight"]).numpy(), values)
