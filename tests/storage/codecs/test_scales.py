"""FP8 codes made again: on the own grid and with fresh scales, to the nearest and at random; against torch, float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.errors import UnsupportedAdapter
from loratools.storage.codecs import Encoding, Module, Parts
from loratools.storage.codecs._fp8 import Blocks, fitted
from loratools.storage.codecs._scales import Rule, by_factor, by_inverse, by_power, by_quotient, rounded
from loratools.storage.codecs.tables import table
from loratools.storage.header import read_header

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def stored(path: Path, weight: torch.Tensor, scale: torch.Tensor | None = None) -> Module:
    """Write one module and return it."""
    save_file({"m.weight": weight} | ({} if scale is None else {"m.weight_scale": scale}), path)
    tensors = read_header(path).tensors
    names = {name.removeprefix("m."): name for name in tensors}
    return Module("m", "FP8", names, {part: tensors[name] for part, name in names.items()}, {}, "BF16")


@contextmanager
def read(encoding: Encoding) -> Iterator[tuple[Parts, Array]]:
    rows = int(np.prod(encoding.shape[:-1]))
    W = np.empty((rows, encoding.columns), np.float32)
    with encoding.parts() as parts:
        encoding.decode(parts, 0, W)
        yield parts, W


def tiles(encoding: Encoding, rows: int, about: int) -> Iterator[slice]:
    step = max(encoding.together, about - about % encoding.together)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def written(encoding: Encoding, parts: Parts, W: Array, grid: Any, draw: Any = None, about: int = 64) -> dict[str, Any]:
    """Encode W in tiles; return the parts, and under "W" what the codes stand for."""
    encoder = encoding.encoder(parts, grid, draw)
    if encoder.needs_pass:
        for rows in tiles(encoding, len(W), about):
            encoder.observe(rows.start, W[rows])
    decoded = [encoder.encode(rows.start, W[rows]) for rows in tiles(encoding, len(W), about)]
    return {**encoder.finish(), "W": np.concatenate(decoded)}


def every_code(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    codes = torch.arange(int(np.prod(shape))).mul(37).remainder(256).to(torch.uint8).reshape(shape)
    return codes.view(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "scales", "blocks"),
    [
        ((70, 50), (), Blocks(70, 50)),
        ((70, 50), (70, 1), Blocks(1, 50)),
        ((70, 50), (1, 50), Blocks(70, 1)),
        ((70, 50), (3, 4), Blocks(32, 16)),
        ((3, 70, 50), (3, 3, 4), Blocks(32, 16)),
        ((3, 70, 50), (3, 1, 1), Blocks(70, 50)),
        ((3, 70, 50), (), Blocks(210, 50, 210)),
        ((3, 70, 50), (3, 2, 1), Blocks(35, 50, 35)),
        ((3, 70, 50), (3, 4, 4), Blocks(32, 16, 35)),
        ((3, 70, 50), (3, 50, 1), Blocks(70, 1)),
    ],
)
def test_the_own_grid_gives_every_byte_back(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], scales: tuple[int, ...], blocks: Blocks
) -> None:
    """Of all 256 codes: NaN, infinities and the zero with a sign too; with scales that make numbers underflow."""
    every = every_code(shape, dtype)
    finite = torch.where(every.float().isfinite(), every.float(), 0.0).to(every.dtype)
    for q, size in ((every, 1e-3), (finite, 1e-3), (finite, 1e-40), (finite, 1e32)):
        scale = torch.rand(scales, generator=torch.Generator().manual_seed(1)) * size
        encoding = fitted(stored(tmp_path / "m.safetensors", q, scale), "weight_scale", [blocks], by_quotient)
        for draw in (None, lambda shape: np.random.default_rng(0).random(shape)):
            with read(encoding) as (parts, W):
                made = written(encoding, parts, W, "own", draw)
            assert made.keys() == {"weight", "W"}
            assert made["weight"].tobytes() == q.view(torch.uint8).numpy().tobytes()
            np.testing.assert_array_equal(made["W"], W)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize(
    ("sides", "scale"), [((64, 30), torch.rand(4, 3)), ((1, 90), torch.rand(200, 1)), ((200, 90), torch.rand(()))]
)
def test_a_change_that_is_too_large_for_a_scale_makes_a_new_one(
    tmp_path: Path, sides: tuple[int, int], scale: torch.Tensor, drawn: bool
) -> None:
    """Of that block alone; nothing is clipped, as nothing is where a scale was zero."""
    blocks, shape = Blocks(*sides), (200, 90)
    q = torch.randn(shape, generator=torch.Generator().manual_seed(3)).mul(100).clamp(-448, 448)
    q = q.to(torch.float8_e4m3fn)
    if scale.numel() > 1:
        scale = scale.clone()
        scale[1] = 0
    encoding = fitted(stored(tmp_path / "m.safetensors", q, scale), "weight_scale", [blocks], by_quotient)
    with read(encoding) as (parts, W):
        after = W.copy()
        after[:40, :30] *= 3
        after[65, 5] += 0.5  # of the second block row, whose scale is zero
        after[1, 7] += 0.5
        made = written(encoding, parts, after, "own", (lambda shape: np.full(shape, 0.5)) if drawn else None)
    old = scale.numpy().reshape(blocks.grid(shape))
    wide = np.repeat(np.repeat(old, blocks.height, 0), blocks.width, 1)[:200, :90]
    touched = np.zeros(blocks.grid(shape), bool)
    for row in range(200):
        for column in range(0, 90, blocks.width):
            part = slice(row, row + 1), slice(column, column + blocks.width)
            touched[row // blocks.height, column // blocks.width] |= (np.abs(after[part]) > wide[part] * 464).any()
    assert touched.any()
    new = made["weight_scale"].reshape(blocks.grid(shape))
    assert (new == old)[~touched].all() or drawn
    assert (new != old)[touched].all()
    steps = np.repeat(np.repeat(new, blocks.height, 0), blocks.width, 1)[:200, :90]
    assert (np.abs(made["W"] - after) <= np.maximum(np.abs(after) / 8, steps / 512) * (1 + 1e-6)).all()


def expected(W: Array, blocks: Blocks, rule: str) -> tuple[Array, Array]:
    """Return fresh scales and codes, block by block, in torch."""
    scales, codes = [], torch.zeros(W.shape, dtype=torch.uint8)
    for first in range(0, len(W), blocks.height):
        for column in range(0, W.shape[1], blocks.width):
            place = slice(first, first + blocks.height), slice(column, column + blocks.width)
            block = torch.from_numpy(W[place])
            most = block.abs().max()
            if most == 0:
                scale, x = torch.tensor(1.0), block
            elif rule == "factor":
                scale, x = 1 / (448 / most), block * (448 / most)
            elif rule == "inverse":
                scale = most / 448
                x = block * (1 / scale)
            else:
                scale = 2.0 ** torch.ceil(torch.log2(most / 448)) if rule == "power" else most / 448
                x = block / scale
            scales.append(float(scale))
            codes[place] = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return np.array(scales, np.float32), codes.numpy()


@pytest.mark.parametrize(("name", "rule"), [
    ("quotient", by_quotient), ("factor", by_factor), ("inverse", by_inverse), ("power", by_power),
])  # fmt: skip
@pytest.mark.parametrize("sides", [(200, 90), (1, 90), (64, 32), (64, 1), (200, 1), (1, 32)])
def test_fresh_scales_are_those_of_the_rule(tmp_path: Path, name: str, rule: Rule, sides: tuple[int, int]) -> None:
    blocks, shape = Blocks(*sides), (200, 90)
    W = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    W[:64, :32] = 0
    encoding = fitted(
        stored(tmp_path / "m.safetensors", every_code(shape, "F8_E4M3"), torch.ones(blocks.grid(shape))),
        "weight_scale", [blocks], rule,
    )  # fmt: skip
    scales, codes = expected(W, blocks, name)
    with encoding.parts() as parts:
        for about in (1, 64, 150, 500):
            made = written(encoding, parts, W, "fresh", about=about)
            np.testing.assert_array_equal(made["weight_scale"].reshape(-1), scales)
            np.testing.assert_array_equal(made["weight"], codes)
    save_file({"m.weight": torch.from_numpy(made["weight"]).view(torch.float8_e4m3fn),
               "m.weight_scale": torch.from_numpy(made["weight_scale"])}, tmp_path / "again.safetensors")  # fmt: skip
    again = load_file(tmp_path / "again.safetensors")
    encoding = fitted(
        stored(tmp_path / "n.safetensors", again["m.weight"], again["m.weight_scale"]), "weight_scale", [blocks], rule
    )
    with read(encoding) as (_, decoded):
        np.testing.assert_array_equal(decoded, made["W"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e8m0fnu, torch.uint8])
def test_scales_of_other_dtypes_are_written_and_used_as_they_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    shape = (40, 64)
    W = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    powers = dtype in (torch.float8_e8m0fnu, torch.uint8)
    ones = torch.full((40, 2), 127, dtype=torch.uint8) if powers else torch.ones(40, 2, dtype=dtype)
    ones = ones.view(dtype) if powers else ones
    module = stored(tmp_path / "m.safetensors", every_code(shape, "F8_E4M3"), ones)
    encoding = fitted(module, "weight_scale", [Blocks(1, 32)], by_power if powers else by_factor)
    with encoding.parts() as parts:
        made = written(encoding, parts, W, "fresh")
    bits = torch.from_numpy(made["weight_scale"])
    scales = torch.exp2(bits.double() - 127) if powers else bits.view(dtype).double()
    most = torch.from_numpy(W).reshape(40, 2, 32).abs().amax(-1).double() / 448
    assert ((scales >= most) & (scales < 2 * most)).all() if powers else ((scales / most - 1).abs() < 2**-8).all()
    wanted = (torch.from_numpy(W).reshape(40, 2, 32) / scales[..., None].float()).clamp(-448, 448)
    assert (made["weight"].reshape(40, 2, 32) == wanted.to(torch.float8_e4m3fn).view(torch.uint8).numpy()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding(dtype: str) -> None:
    """To the nearest of all numbers of the dtype; at random the mean is the number."""
    rng = np.random.default_rng(4)
    grid = np.unique(table(dtype).astype(np.float64)[np.isfinite(table(dtype))])
    halves = (grid[1:] + grid[:-1]) / 2
    wide = rng.standard_normal(20_000) * 10.0 ** rng.uniform(-7, 6, 20_000)
    x = np.concatenate([wide, grid, halves, [0.0, -0.0]]).astype(np.float32)
    numbers = table(dtype)[rounded(x.copy(), dtype)].astype(np.float64)
    clipped = np.clip(x.astype(np.float64), grid[0], grid[-1])
    above = grid[np.clip(np.searchsorted(grid, clipped), 1, None)]
    below = grid[np.clip(np.searchsorted(grid, clipped), 1, None) - 1]
    np.testing.assert_array_equal(abs(numbers - clipped), np.minimum(above - clipped, clipped - below))
    even = rounded(halves.astype(np.float32), dtype)
    assert (even[np.isin(halves.astype(np.float32), halves)] % 2 == 0).all()
    assert np.isnan(table(dtype)[rounded(np.array([np.nan], np.float32), dtype)]).all()

    y = np.concatenate([rng.standard_normal(300) * 10, grid[::7]]).astype(np.float32)
    steps = 512
    total = sum(
        table(dtype)[rounded(y.copy(), dtype, np.full(y.shape, (step + 0.5) / steps))].astype(np.float64)
        for step in range(steps)
    )
    spacing = above = (
        grid[np.clip(np.searchsorted(grid, y), 1, None)] - grid[np.clip(np.searchsorted(grid, y), 1, None) - 1]
    )
    assert (abs(total / steps - y) <= spacing / steps).all()


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (torch.zeros(4, 4), torch.ones(1), r"its weight is F32 \[4, 4\], and FP8 of two sides was expected"),
        (torch.zeros(4).to(torch.float8_e4m3fn), torch.ones(1), r"its weight is F8_E4M3 \[4\]"),
        (torch.zeros(0, 4).to(torch.float8_e4m3fn), torch.ones(1), r"its weight is F8_E4M3 \[0, 4\]"),
        (
            torch.zeros(4, 8).to(torch.float8_e4m3fn),
            torch.ones(4, 2),
            r"scales \[4, 2\] do not fit the weight \[4, 8\]",
        ),
        (torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.ones(2, 4).int(), "its scales are I32, which are no numbers"),
    ],
)
def test_what_is_no_fp8_is_refused(tmp_path: Path, weight: torch.Tensor, scale: torch.Tensor, message: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=r"m is quantized with FP8: .*" + message):
        fitted(stored(tmp_path / "m.safetensors", weight, scale), "weight_scale", [Blocks(2, 2)], by_quotient)
