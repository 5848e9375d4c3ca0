"""All kinds that PEFT writes against float64 definitions: any tile, any orientation, alone and after each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.adapter import kinds
from loratools.adapter.kinds import Term
from loratools.storage.files import read_tensor
from loratools.storage.header import read_header
from loratools.storage.lazy import LazyTensor
from tests.adapter.kinds.reference import Parts, applied, build, delta, merged, projected, random

LINEAR: Parts = {"lora_A.weight": random(3, 10), "lora_B.weight": random(7, 3)}
EMBEDDING: Parts = {"lora_embedding_A": random(3, 7), "lora_embedding_B": random(10, 3)}
CONV: Parts = {"lora_A.weight": random(3, 5, 2, 4), "lora_B.weight": random(7, 3, 1, 1)}
CONV1: Parts = {"lora_A.weight": random(3, 5, 2), "lora_B.weight": random(7, 3, 1)}
CONV3: Parts = {"lora_A.weight": random(3, 5, 1, 2, 3), "lora_B.weight": random(7, 3, 1, 1, 1)}
POINT: Parts = {"lora_A.weight": random(3, 5, 1, 1), "lora_B.weight": random(7, 3, 1, 1)}
PLAIN = {
    "lora": LINEAR, "embedding": EMBEDDING, "conv1d": CONV1, "conv2d": CONV, "conv3d": CONV3, "conv1x1": POINT,
}  # fmt: skip


def magnitude(parts: Parts, *shape: int) -> Parts:
    """Return the parts with a magnitude; its shape is that of PEFT unless another is asked for."""
    features = parts["lora_embedding_B"].shape[0] if "lora_embedding_B" in parts else parts["lora_B.weight"].shape[0]
    return {**parts, "lora_magnitude_vector": 1 + random(features).abs().reshape(shape or (features,))}


KINDS = PLAIN | {
    "dora": magnitude(LINEAR), "dora-embedding": magnitude(EMBEDDING), "dora-conv1d": magnitude(CONV1, 1, 7, 1),
    "dora-conv2d": magnitude(CONV, 1, 7, 1, 1), "dora-conv3d": magnitude(CONV3, 1, 7, 1, 1, 1),
    "dora-conv1x1": magnitude(POINT, 1, 7, 1, 1),
}  # fmt: skip


def weight_of(parts: Parts) -> torch.Tensor:
    """Return a random weight for parts, as their module defines it."""
    return random(*delta(parts, 1.0).shape, seed=5)


STORED = [(name, False) for name in sorted(KINDS)] + [("lora", True), ("dora", True)]  # transposed: as GPT-2 stores it


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize(("name", "transposed"), STORED)
def test_tiles_of_any_size(name: str, transposed: bool, rows: int) -> None:
    parts = KINDS[name]
    W = weight_of(parts)
    for weight, dtype, tolerance in ((1.0, torch.float64, 1e-14), (-0.4, torch.float32, 2e-6)):
        found = applied(W, [(build(parts), weight)], transposed=transposed, rows=rows, dtype=dtype)
        expected = merged(W, parts, 0.7 * weight)
        assert float((found.double() - expected).abs().max() / expected.abs().max()) <= tolerance


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_norms_come_from_the_unchanged_base(order: tuple[int, int], transposed: bool) -> None:
    """W ← g₂·(g₁·(W₀ + Δ₁) + Δ₂), whatever has changed W before; a plain update goes between as it comes."""
    both = (KINDS["dora"], {"lora_A.weight": random(2, 10, seed=9), "lora_B.weight": random(7, 2, seed=9)})
    both = (both[0], magnitude(both[1])) if order[0] else both
    given = [(both[i], 0.5 + i) for i in order]
    W = weight_of(LINEAR)
    expected = W
    for parts, weight in given:
        expected = merged(W, parts, 0.7 * weight, expected)
    pairs = [(build(parts), weight) for parts, weight in given]
    found = applied(W, pairs, transposed=transposed, rows=2, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
    X = random(6, 10, seed=2)
    torch.testing.assert_close(projected(W, pairs, X), X @ expected.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_projections_are_those_of_the_merged_weight(name: str) -> None:
    parts = KINDS[name]
    W = weight_of(parts)
    X = random(4, W.flatten(1).shape[1], seed=1)
    expected = X @ merged(W, parts, 0.7 * 1.5).flatten(1).T
    torch.testing.assert_close(projected(W, [(build(parts), 1.5)], X), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_delta_weights_ranks_and_shapes(name: str) -> None:
    update = build(PLAIN[name])
    assert (update.rank, update.additive, update.shape) == (3, True, tuple(weight_of(PLAIN[name]).shape))
    torch.testing.assert_close(update.delta_weight().double(), delta(PLAIN[name], 0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_factors_are_the_change_and_stay_bytes_of_a_file(name: str, tmp_path: Path) -> None:
    """ΔW = scale·left·right as a matrix; all but the transposed factors of an embedding can be read without torch."""
    save_file(KINDS[name], tmp_path / "a.safetensors")
    stored = {part: LazyTensor.stored(spec) for part, spec in read_header(tmp_path / "a.safetensors").tensors.items()}
    factors = kinds.get(str(kinds.claim(stored))).build(stored, 0.7, 2.1).factored()
    left, right = factors.load()
    expected = delta(KINDS[name], 0.7)
    by_column = "embedding" in name
    torch.testing.assert_close(factors.scale * left @ right, expected.flatten(1), rtol=1e-14, atol=1e-14)
    for lazy in (factors.left, factors.right):
        assert (lazy.spec is None) == by_column
        if lazy.spec:
            assert lazy.spec.shape == lazy.shape
            assert torch.equal(read_tensor(lazy.spec), lazy.load())
    m = KINDS[name].get("lora_magnitude_vector")
    assert (factors.magnitude is None) == (m is None)
    if m is not None:
        assert (factors.by_column, factors.magnitude.shape) == (by_column, (m.numel(),))
        assert torch.equal(read_tensor(factors.magnitude.spec), m.flatten())


@pytest.mark.parametrize("name", sorted(KINDS))
def test_single_results_in_float64(name: str) -> None:
    """What a merge computes again where float32 does not do, is the exact result."""
    from loratools.adapter.kinds import Refinable
    from loratools.adapter.site import Site

    parts = KINDS[name]
    W = weight_of(parts).flatten(1)
    site = Site.whole("w", (W.shape[0], W.shape[1]))
    term: Term = build(parts).term(site, 1.0, torch.float32, torch.device("cpu"))
    assert isinstance(term, Refinable)
    everything = slice(0, len(W))
    if term.needs_pass:
        term.observe_rows(W.float(), everything)
    changed = W.float()
    term.apply_rows(changed, everything, None)
    rows, columns = torch.tensor([0, 3, 6]), torch.tensor([4, 0, 3])
    expected = merged(weight_of(parts), parts, 0.7).flatten(1)
    torch.testing.assert_close(
        term.elements(W[rows, columns], rows, columns), expected[rows, columns], rtol=1e-6, atol=1e-7
    )
    change = delta(parts, 0.7)
    assert term.bound() >= float(change.abs().max()) * (1 - 1e-6)
    gain = (expected / (W + change.flatten(1))).abs().max()
    assert term.gain(everything) == pytest.approx(float(gain), rel=1e-6)
