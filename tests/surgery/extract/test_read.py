"""Two tensors side by side: norms, digests where they are wanted, and what is equal, of numbers and of codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import loratools
from loratools.parallel import no_progress
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.header import TensorSpec
from loratools.surgery.extract import extract
from loratools.surgery.extract.read import read_delta, rounding_energy
from loratools.surgery.hash import hash_tensors
from tests.make import fp8, tiny
from tests.surgery.finetunes import pair
from tests.surgery.models import random


def specs(folder: Path, W: Tensor, other: Tensor) -> tuple[TensorSpec, TensorSpec]:
    for name, tensor in (("old", W), ("new", other)):
        save_file({"W": tensor}, folder / f"{name}.safetensors")
    old, new = (Checkpoint.open(folder / f"{name}.safetensors").specs["W"] for name in ("old", "new"))
    return old, new


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_digests_are_taken_where_they_are_wanted_and_nothing_else_changes(tmp_path: Path, dtype: torch.dtype) -> None:
    W, other = random(60, 50, seed=1, dtype=dtype), random(60, 50, seed=2, dtype=dtype)
    old, new = specs(tmp_path, W, other)
    true2 = float((other.double() - W.double()).square().sum())
    digests = tuple(hash_tensors({"": spec})[""] for spec in (old, new))
    for hashed, said in (
        (True, digests), (False, ("", "")),
    ):  # fmt: skip
        found = read_delta(old, new, no_progress, keep=True, hashed=hashed)
        assert found.digests == said
        assert found.norm2 == pytest.approx(true2, rel=1e-6)
        assert found.base_norm2 == pytest.approx(float(W.double().square().sum()), rel=1e-12)
        assert found.D is not None
        D = torch.from_numpy(found.D)
        assert torch.equal(D, other.to(D.dtype) - W.to(D.dtype))
        same = read_delta(old, old, no_progress, keep=True, hashed=hashed)
        assert (same.norm2, same.D) == (0.0, None)


@pytest.mark.parametrize("at", [None, 0, 600_000, 1_199_999])
def test_equal_tiles_are_hashed_once_and_what_differs_twice(tmp_path: Path, at: int | None) -> None:
    """Three tiles, of which the first, the second, the last or none differs."""
    W = random(1200, 1000, seed=1, dtype=torch.bfloat16)
    other = W.clone()
    if at is not None:
        other.view(-1)[at] += 1
    old, new = specs(tmp_path, W, other)
    for keep in (True, False):
        found = read_delta(old, new, no_progress, keep=keep)
        assert found.digests == tuple(hash_tensors({"": spec})[""] for spec in (old, new))
        assert (found.norm2 > 0) == (at is not None)


def test_codes_are_compared_by_what_they_stand_for_though_nobody_wants_digests(tmp_path: Path) -> None:
    """Numbers rounded to 16 bit differ from those of the codes by that rounding, which is no change."""
    fp8.save_llama(tmp_path / "codes", tiny.llama_weights())
    loratools.dequantize(tmp_path / "codes", tmp_path / "numbers")
    codes, numbers = logical(Checkpoint.open(tmp_path / "codes")), Checkpoint.open(tmp_path / "numbers")
    coded = [name for name, spec in codes.specs.items() if spec.encoding]
    assert coded
    for name in coded:
        found = read_delta(codes.specs[name], numbers.specs[name], no_progress, keep=False, hashed=False)
        assert found.norm2 == 0


def test_the_energy_of_rounding_is_that_of_half_units(tmp_path: Path) -> None:
    """A tensor of at most the sample's size is measured whole: Σ ulp²/12, with ulp = 2^(exponent - 7) in bfloat16."""
    W = random(8, 4096, seed=3, dtype=torch.bfloat16)
    old, _ = specs(tmp_path, W, W)
    ulp = torch.frexp(W.double())[1].double().sub(8).exp2()
    assert rounding_energy(old) == pytest.approx(float(ulp.square().sum()) / 12, rel=0.05)


def test_a_stack_is_read_once_and_its_digest_is_that_of_the_whole(tmp_path: Path) -> None:
    """One expert of three changed, of another stack none, of a third none but the sign of a zero."""
    base = {f"layers.{i}.mlp.experts.down_proj": random(3, 12, 8, seed=i) for i in range(3)}
    base["layers.2.mlp.experts.down_proj"][1, 2, 3] = 0.0
    tuned = {name: W.clone() for name, W in base.items()}
    tuned["layers.0.mlp.experts.down_proj"][1] += random(12, 2, seed=8) @ random(2, 8, seed=9)
    tuned["layers.2.mlp.experts.down_proj"][1, 2, 3] = -0.0
    models = pair(tmp_path, base, tuned, model_type="mixtral")
    seen: list[int] = []
    found = extract(*models, tmp_path / "out", 2, progress=seen.append)
    assert [one.outcome for one in found.outcomes] == ["factored", "unchanged", "unchanged"]
    assert (found.base, found.tuned) == tuple(loratools.hash(model, "root").root for model in models)
    assert sum(seen) == 2 * sum(W.nbytes for W in base.values())
    layer = found.outcomes[0].layer
    assert layer is not None
    assert layer.base_norm == pytest.approx(float(base["layers.0.mlp.experts.down_proj"].norm()), rel=1e-6)
    assert layer.error < 1e-5
