"""Products apart and together: every ΔW against float64."""

from __future__ import annotations

import pytest
import torch

from loratools.adapter import kinds
from loratools.adapter.fusing import products
from loratools.adapter.kinds import Update
from loratools.adapter.parts import BIAS, MAGNITUDE, A, B
from loratools.storage.lazy import LazyTensor

IN = 6


def update(seed: int, out: int, rank: int = 2, scaling: float = 0.5, **parts: torch.Tensor) -> Update:
    """Return an update in memory; `bias`, `magnitude`, `left` and `right` replace what is random or absent."""
    chance = torch.Generator().manual_seed(seed)
    tensors = {
        A: parts.get("right", torch.randn(rank, IN, generator=chance)),
        B: parts.get("left", torch.randn(out, rank, generator=chance)),
    }
    tensors |= {name: parts[key] for key, name in (("bias", BIAS), ("magnitude", MAGNITUDE)) if key in parts}
    build = kinds.get("dora" if "magnitude" in parts else "lora").build
    built: Update = build({part: LazyTensor.of(x) for part, x in tensors.items()}, scaling, scaling * rank)
    return built


def delta(product: Update) -> torch.Tensor:
    """Return s·B·A in float64."""
    return product.scaling * product.parts[B].load().double() @ product.parts[A].load().double()


def test_blocks_of_rows_are_the_rows_of_the_whole() -> None:
    whole = update(0, 12, bias=torch.arange(12.0))
    blocks = products.apart(whole, (5, 7))
    assert all(block is not None for block in blocks)
    for block, rows in zip(blocks, (slice(0, 5), slice(5, 12)), strict=True):
        assert block is not None
        assert torch.equal(delta(block), delta(whole)[rows])
        assert torch.equal(block.parts[BIAS].load(), torch.arange(12.0)[rows])


def test_a_block_leaves_out_what_is_zero_in_it() -> None:
    left = torch.zeros(9, 3)
    left[:3, 0], left[6:, 1:] = 1.0, 2.0
    first, second, third = products.apart(update(1, 9, left=left, rank=3), (3, 3, 3))
    assert second is None
    assert first is not None
    assert third is not None
    assert (first.rank, third.rank) == (1, 2)
    assert torch.equal(delta(third), delta(update(1, 9, left=left, rank=3))[6:])


def test_an_update_of_nothing_keeps_its_blocks() -> None:
    blocks = products.apart(update(2, 4, left=torch.zeros(4, 2)), (1, 3))
    assert [block.shape for block in blocks if block] == [(1, IN), (3, IN)]


def test_blocks_that_share_a_factor_keep_its_rank() -> None:
    right = torch.randn(2, IN, generator=torch.Generator().manual_seed(3))
    blocks = [update(4, 3, right=right), None, update(5, 4, right=right, scaling=0.125)]
    fused = products.together(blocks, (3, 2, 4))
    assert fused.rank == 2
    expected = torch.cat([delta(blocks[0]), torch.zeros(2, IN, dtype=torch.float64), delta(blocks[2])])  # type: ignore[arg-type]
    assert torch.equal(delta(fused), expected)


def test_blocks_with_factors_of_their_own_add_their_ranks() -> None:
    blocks = [update(6, 3, rank=1), update(7, 4, rank=3, scaling=0.25, bias=torch.ones(4)), None]
    fused = products.together(blocks, (3, 4, 2))
    assert fused.rank == 4
    expected = torch.cat([delta(blocks[0]), delta(blocks[1]), torch.zeros(2, IN, dtype=torch.float64)])  # type: ignore[arg-type]
    torch.testing.assert_close(delta(fused), expected, rtol=1e-12, atol=0)
    bias = fused.scaling * fused.parts[BIAS].load().double()
    assert torch.equal(bias, torch.cat([torch.zeros(3), 0.25 * torch.ones(4), torch.zeros(2)]).double())


def test_a_magnitude_goes_with_its_rows() -> None:
    magnitude = torch.arange(1.0, 9.0)
    whole = update(8, 8, magnitude=magnitude)
    blocks = products.apart(whole, (4, 4))
    fused = products.together(blocks, (4, 4))
    assert (fused.kind, torch.equal(fused.parts[MAGNITUDE].load(), magnitude)) == ("dora", True)
    torch.testing.assert_close(delta(fused), delta(whole), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="only some of them have a magnitude"):
        products.together([blocks[0], update(9, 4)], (4, 4))


def test_halves_swapped() -> None:
    whole = update(10, 8)
    assert torch.equal(delta(products.swapped(whole)), torch.cat([delta(whole)[4:], delta(whole)[:4]]))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8 output features, expected 3 \+ 4"):
        products.apart(update(11, 8), (3, 4))
    with pytest.raises(ValueError, match="plain products of one width"):
        products.together([update(12, 3), update(13, 3, right=torch.ones(2, IN + 1))], (3, 3))
