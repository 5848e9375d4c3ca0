"""One tensor with products on its sites: as arrays, as terms of torch, in float64, and run through the tile loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loratools.adapter.kinds import Term
from loratools.adapter.kinds._sum import Product
from loratools.adapter.kinds.dora import Rescaling
from loratools.adapter.site import Site
from loratools.engine.load import SiteProduct
from loratools.engine.task import TensorResult, TensorTask, Tiling
from loratools.engine.tensor import run
from loratools.storage.header import TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
PRECISION = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}
MATRIX = (24, 40)
WHOLE = Site.whole("W", MATRIX)
SITES = {
    "whole": [WHOLE],
    "two parts": [
        Site("W", MATRIX, (0, 8, 1), (0, 40, 1), (0, 8)),
        Site("W", MATRIX, (8, 24, 1), (0, 40, 1), (0, 16)),
    ],
    "one part": [Site("W", MATRIX, (9, 20, 1), (0, 40, 1), (0, 11))],
    "interleaved": [
        Site("W", MATRIX, (0, 24, 2), (0, 40, 1), (0, 12)),
        Site("W", MATRIX, (1, 24, 2), (0, 40, 1), (0, 12)),
    ],
    "columns": [Site("W", MATRIX, (0, 24, 1), (5, 29, 1), (0, 24), True)],
    "every second column": [
        Site("W", MATRIX, (3, 24, 1), (0, 40, 2), (0, 20), True),
        Site("W", MATRIX, (3, 24, 1), (1, 40, 2), (0, 20), True),
    ],
}
TILES = (40, 400, 1 << 20)
"""Bytes: a row of any dtype, some, all."""


def product(site: Site, rank: int, seed: int, dora: bool = False) -> SiteProduct:
    """Return random factors for a site, and magnitudes."""
    random = np.random.default_rng(seed)
    rows, columns = site.shape
    factor, right = (random.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, columns)))
    scale = random.standard_normal(rank) * 0.1
    return SiteProduct(site, factor, scale, right, random.uniform(1, 9, rows) if dora else None)


def products(sites: str, rank: int, seed: int, dora: bool = False) -> list[SiteProduct]:
    """Return random products for every one of these sites."""
    return [product(site, rank, seed + i, dora) for i, site in enumerate(SITES[sites])]


def terms(given: Sequence[SiteProduct], work: torch.dtype = torch.float32) -> list[tuple[Site, Term]]:
    """Return the same as terms of torch."""
    made: list[tuple[Site, Term]] = []
    for item in given:
        factor, right = torch.from_numpy(item.factor).to(work), torch.from_numpy(item.right.copy()).to(work)
        scale = torch.from_numpy(item.scale)
        term = Product((factor.double() * scale).to(work), right, factor, scale)
        if item.magnitude is None:
            made.append((item.site, term))
        else:
            m = torch.from_numpy(item.magnitude)
            made.append((item.site, Rescaling(term, m, item.site, False, torch.zeros_like(m))))
    return made


def expected(W: Array, given: Sequence[SiteProduct]) -> tuple[Array, Array]:
    """Return g∘(W + left·right) on each site in float64, and a bound on the error of float32 sums."""
    out = W.astype(np.float64).copy()
    error = np.zeros_like(out)
    for item in given:
        place = (slice(*item.site.rows), slice(*item.site.columns))
        left = item.factor.astype(np.float64) * item.scale
        changed = out[place] + left @ item.right.astype(np.float64)
        bound = 2.0**-21 * (np.abs(out[place]) + np.abs(left) @ np.abs(item.right.astype(np.float64)))
        if item.magnitude is not None:
            norms = np.sqrt((changed**2).sum(1))
            gain = (item.magnitude / norms)[:, None]
            bound = gain * bound + np.abs(changed * gain) * (np.linalg.norm(bound, axis=1) / norms)[:, None]
            changed = changed * gain
        out[place], error[place] = changed, bound
    return out, error


def save(path: Path, dtype: str, seed: int) -> TensorSpec:
    """Write a random matrix."""
    W = torch.from_numpy(np.random.default_rng(seed).standard_normal(MATRIX)).to(TORCH[dtype])
    path.write_bytes(W.view(torch.uint8).numpy().tobytes())
    return TensorSpec(dtype, MATRIX, path, 0, path.stat().st_size)


def numbers(raw: bytes, dtype: str) -> Array:
    """Return stored numbers in float64, as a matrix."""
    return torch.frombuffer(bytearray(raw), dtype=TORCH[dtype]).double().view(MATRIX).numpy()


def base(spec: TensorSpec) -> Array:
    """Return the saved matrix in float64."""
    return numbers(spec.file.read_bytes(), spec.dtype)


def write(
    spec: TensorSpec,
    make: Callable[[TensorTask], Tiling],
    out: Path,
    tile: int = 1 << 20,
    dtype: str | None = None,
    retention: str = "full",
) -> tuple[bytes, TensorResult]:
    """Change the tensor, and return its bytes and what was measured."""
    target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        task = TensorTask("W", spec, MATRIX, dtype or spec.dtype, target, 0, ["blake3"], retention)
        result = run(task, make(task), lambda _: None, lambda: False, tile)
    finally:
        os.close(target)
    return out.read_bytes(), result


def expect_rounded(raw: bytes, dtype: str, wanted: Array, error: Array) -> None:
    """Assert that numbers are the wanted ones, rounded once to a dtype, but for the error of the sums."""
    lowest = {"F16": -24}.get(dtype, -149)
    unit = 2.0 ** np.maximum(np.frexp(wanted)[1] - PRECISION[dtype], lowest)
    assert (np.abs(numbers(raw, dtype) - wanted) <= 0.5 * unit + error).all()


def expect_measured(result: TensorResult, before: Array, wanted: Array, after: Array) -> None:
    """Assert the sums behind the retention, over the whole tensor."""
    delta, kept = wanted - before, after - before
    assert result.total == np.float64((delta * delta).sum()) or abs(result.total / (delta * delta).sum() - 1) < 1e-4
    assert abs(result.retained - (kept * delta).sum()) < 1e-4 * (delta * delta).sum()
    assert abs(result.changed - np.count_nonzero(kept)) < 1e-6 * kept.size
