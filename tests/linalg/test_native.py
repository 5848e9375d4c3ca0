"""The C code against float64, rounded once: every remainder of its blocks, ties, cancellation, what is not finite."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import sysconfig
from itertools import product
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.engine.task import near_zero
from loratools.linalg import native

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C compiler")

Array = np.ndarray[Any, np.dtype[Any]]
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BITS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
PRECISION = {"BF16": 8, "F16": 11, "F32": 24}
SMALLEST = {"BF16": -133, "F16": -24, "F32": -149}
"""The power of two of the smallest subnormal number."""
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def stored(values: Array, dtype: str) -> Array:
    """Return numbers rounded by torch, BF16 as the integers of their bits."""
    tensor = torch.from_numpy(np.asarray(values)).to(TORCH[dtype])
    return (tensor.view(torch.uint16) if dtype == "BF16" else tensor).numpy()


def numbers(array: Array) -> Array:
    """Return stored numbers in float64."""
    tensor = torch.from_numpy(array.copy())
    return (tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor).double().numpy()


def unit(values: Array, dtype: str) -> Array:
    """Return the distance of neighbours of a dtype at these numbers."""
    return 2.0 ** np.maximum(np.frexp(values)[1] - PRECISION[dtype], SMALLEST[dtype])


def run(
    W: Array, B: Array, A: Array, scale: Array, m: Array | None = None, rows: slice | None = None, measured: int = 0
) -> tuple[Array, native.Outcome, Array]:
    """Return what the C code makes of rows of a matrix, what it met, and the gains."""
    dtype = next(name for name, bits in BITS.items() if bits == W.dtype)
    with np.errstate(over="ignore"):
        left = (B * scale).astype(np.float32)
        bound = float(np.linalg.norm(left, axis=1).max() * np.linalg.norm(A, axis=0).max()) * (near_zero(dtype) or 0)
    terms = native.products(left, A, B, scale, m)
    rows = rows or slice(0, len(W))
    out, gains = np.zeros_like(W), np.zeros(len(left))
    outcome = native.add_products(
        W, out, terms, rows, np.empty(terms.memory, np.float32),
        bound=bound, gains=None if m is None else gains, measured=measured,
    )  # fmt: skip
    return out, outcome, gains


def dense(W: Array, B: Array, A: Array, scale: Array, m: Array | None) -> Array:
    """Return g∘(W + B·diag(scale)·A) in float64."""
    W = numbers(W) + (B.astype(np.float64) * scale) @ A.astype(np.float64)
    return W if m is None else W * (m / np.sqrt((W * W).sum(1)))[:, None]


def draw(dtype: str, rows: int, columns: int, rank: int, seed: int) -> tuple[Array, Array, Array, Array, Array]:
    """Return random W, B, A, scale and m."""
    random = np.random.default_rng(seed)
    W = stored(random.standard_normal((rows, columns)), dtype)
    B, A = (random.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, columns)))
    return W, B, A, random.standard_normal(rank) * 0.3, random.uniform(0.5, 2, rows) * np.sqrt(columns)


dtypes = st.sampled_from(sorted(TORCH))
each_dtype = pytest.mark.parametrize("dtype", sorted(TORCH))


@settings(max_examples=300, deadline=None)
@given(dtypes, st.integers(1, 19), st.integers(1, 100), st.integers(1, 64), st.integers(0, 999), st.booleans())
def test_every_size_equals_float64_rounded_once(
    dtype: str, rows: int, columns: int, rank: int, seed: int, dora: bool
) -> None:
    W, B, A, scale, m = draw(dtype, rows, columns, rank, seed)
    out, outcome, gains = run(W, B, A, scale, m if dora else None, measured=rows)
    wanted = dense(W, B, A, scale, m if dora else None)
    # Float32 sums err by the last digits of their terms at each step, and norms as the elements do.
    error = (rank + 2) * 2.0**-24 * (np.abs(numbers(W)) + np.abs(B * scale) @ np.abs(A))
    whole = dense(W, B, A, scale, None)
    norm, norm_error = np.linalg.norm(whole, axis=1), np.linalg.norm(error, axis=1)
    if dora:
        assert (np.abs(m / gains - norm) <= norm_error + 1e-9 * norm).all()
        error = gains[:, None] * error + np.abs(wanted) * (norm_error / norm)[:, None]
    assert (np.abs(numbers(out) - wanted) <= 0.5 * unit(wanted, dtype) + error).all()
    bits = out.view(np.uint32 if dtype == "F32" else np.uint16)
    assert outcome.largest == int((bits & (0x7FFFFFFF if dtype == "F32" else 0x7FFF)).max())
    assert outcome.zero_row is None
    delta, kept = wanted - numbers(W), numbers(out) - numbers(W)
    assert outcome.total == pytest.approx(float((delta * delta).sum()), rel=1e-4, abs=1e-8)
    assert outcome.retained == pytest.approx(float((kept * delta).sum()), rel=1e-4, abs=1e-5)
    assert outcome.changed == np.count_nonzero(kept)


@settings(max_examples=100, deadline=None)
@given(dtypes, st.integers(1, 11), st.integers(1, 50), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_a_rectangle_of_rows_and_columns_apart_leaves_the_rest_alone(
    dtype: str, rows: int, columns: int, row_step: int, column_step: int, dora: bool
) -> None:
    W, B, A, scale, m = draw(dtype, rows, columns, 5, seed=1)
    whole = stored(np.full((2 + rows * row_step, 3 + columns * column_step), 7.0), dtype)
    place = (slice(1, 1 + rows * row_step, row_step), slice(2, 2 + columns * column_step, column_step))
    whole[place] = W
    out = whole.copy()
    terms, gains = native.products((B * scale).astype(np.float32), A, B, scale, m if dora else None), np.zeros(rows)
    sums = np.empty(terms.memory, np.float32)
    native.add_products(whole[place], out[place], terms, slice(0, rows), sums, gains=gains if dora else None)
    wanted = np.zeros_like(W)  # the same rows alone, one after another
    for row in range(rows):
        native.add_products(
            W[row : row + 1], wanted[row : row + 1], terms, slice(row, row + 1), sums, gains=gains if dora else None
        )
    np.testing.assert_array_equal(out[place], wanted)
    out[place] = whole[place]
    np.testing.assert_array_equal(out, whole)


@each_dtype
def test_rows_and_columns_do_not_depend_on_their_neighbours(dtype: str) -> None:
    """The same bits in any block of rows, in any panel of columns, and at the end of it."""
    W, B, A, scale, _ = draw(dtype, 19, 100, 7, seed=6)
    whole, _, _ = run(W, B, A, scale)
    for first, last in ((0, 1), (3, 8), (5, 19)):
        rows = slice(first, last)
        np.testing.assert_array_equal(run(W[rows], B, A, scale, rows=rows)[0], whole[rows])
    for columns in (slice(0, 1), slice(17, 64), slice(33, 100)):
        part, _, _ = run(np.ascontiguousarray(W[:, columns]), B, A[:, columns], scale)
        np.testing.assert_array_equal(part, whole[:, columns])


@each_dtype
def test_sums_are_fused_multiply_adds_in_the_order_of_the_rank(dtype: str) -> None:
    """Bit by bit what float64 makes of them when it rounds to float32 after each: twice 24 bits fit into 53."""
    W, B, A, scale, _ = draw("F32", 5, 40, 9, seed=7)
    W = stored(W, dtype)
    left, sums = (B * scale).astype(np.float32), np.zeros((5, 40), np.float32)
    for k in range(9):
        product = left[:, k, None].astype(np.float64) * A[k]
        sums = (sums + product).astype(np.float32)  # a double rounding in one of 2^29 sums
    terms = native.products(left, A, B, scale)
    out = np.zeros_like(W)
    native.add_products(W, out, terms, slice(0, 5), np.empty(terms.memory, np.float32))
    np.testing.assert_array_equal(out, stored(numbers(W).astype(np.float32) + sums, dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("dora", [False, True])
def test_what_cancels_is_computed_in_float64(dtype: str, dora: bool) -> None:
    # ΔW is −W but for its last digits: the float32 sum is off by many units in the last place of what is left.
    W, B, A, scale, m = draw(dtype, 8, 64, 6, seed=2)
    W = stored(-((B.astype(np.float64) * scale) @ A.astype(np.float64)), dtype)
    out, _, _ = run(W, B, A, scale, m if dora else None)
    wanted = dense(W, B, A, scale, m if dora else None)
    near = np.abs(wanted) < 1e-4 * np.abs(wanted).max() if dora else np.full(W.shape, True)
    error = np.abs(numbers(out) - wanted)
    assert (error <= 0.75 * unit(wanted, dtype) + 1e-4 * dora * np.abs(wanted))[near].all()
    float32 = numbers(W).astype(np.float32) + (B * scale).astype(np.float32) @ A
    assert (stored(float32, dtype) != stored(wanted.astype(np.float32), dtype)).any() or dora  # it would not do


@pytest.mark.parametrize(
    ("dtype", "W", "change", "wanted"),
    [
        (
            "BF16",
            [1.0, 1.0078125, -1.0, -1.0078125],
            [2.0**-8] * 2 + [-(2.0**-8)] * 2,
            [1.0, 1.015625, -1.0, -1.015625],
        ),
        ("BF16", [1e-39, -1e-40, 0.0, -0.0, 2.0**-133], [1e-39, 0, 0, 0, 2.0**-134], None),
        ("F16", [1.0, 1 + 2.0**-10, -1.0, 2048.0], [2.0**-11, 2.0**-11, -(2.0**-11), 1.0], [1, 1 + 2.0**-9, -1, 2048]),
        ("F16", [2.0**-24, 2.0**-24, -(2.0**-24), 2.0**-14], [2.0**-25, -(2.0**-25), 2.0**-26, -(2.0**-25)], None),
        ("F16", [65504.0, -65504.0], [15.99, -15.99], [65504.0, -65504.0]),
        ("F32", [1.0, 1 + 2.0**-23, 1e-45, -0.0], [2.0**-24, 2.0**-24, 1e-45, 0], [1, 1 + 2.0**-22, 2.8e-45, 0]),
    ],
)
def test_ties_go_to_even_and_subnormals_stay(
    dtype: str, W: list[float], change: list[float], wanted: list[float] | None
) -> None:
    base, right = stored(np.array([W]), dtype), np.array([change], np.float32)
    out, _, _ = run(base, np.ones((1, 1), np.float32), right, np.ones(1))
    np.testing.assert_array_equal(out, stored((numbers(base) + right).astype(np.float32), dtype))
    if wanted is not None:
        np.testing.assert_array_equal(out, stored(np.array([wanted]), dtype))


def test_every_half_is_widened_and_rounded_as_torch_does_it() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    zeros = np.zeros((1, 1 << 16), np.float32)
    for dtype in ("BF16", "F16"):
        W = (every if dtype == "BF16" else every.view(np.float16)).reshape(1, -1)
        out, _, _ = run(W, np.ones((1, 1), np.float32), zeros, np.ones(1))
        W, out = numbers(W), numbers(out)
        np.testing.assert_array_equal(out[~np.isnan(W)], W[~np.isnan(W)])
        assert np.isnan(out[np.isnan(W)]).all()
    random = np.random.default_rng(9)
    change = np.ldexp(random.uniform(-2, 2, (1, 1 << 16)), random.integers(-30, 17, (1, 1 << 16))).astype(np.float32)
    for dtype in TORCH:
        out, _, _ = run(stored(np.zeros_like(change), dtype), np.ones((1, 1), np.float32), change, np.ones(1))
        np.testing.assert_array_equal(out, stored(change, dtype))


@each_dtype
def test_what_is_not_finite_shows_in_the_largest(dtype: str) -> None:
    W, B, A, scale, m = draw(dtype, 5, 18, 3, seed=3)
    infinity = INFINITY[dtype]
    assert run(W, B, A, scale)[1].largest < infinity
    for bad in (np.inf, -np.inf, np.nan):
        damaged = W.copy()
        damaged[4, 17] = stored(np.array(bad), dtype)
        assert run(damaged, B, A, scale)[1].largest >= infinity
        assert run(damaged, B, A, scale, m)[1].largest >= infinity
    assert run(W, B, A, scale * 1e39)[1].largest >= infinity


def test_an_overflow_in_the_rounding_to_f16_shows() -> None:
    W = stored(np.array([[65504.0, 1.0]]), "F16")
    one, change = np.ones((1, 1), np.float32), np.array([[16.0, 0.0]], np.float32)
    assert run(W, one, change, np.ones(1))[1].largest == INFINITY["F16"]
    assert run(W, one, change * np.float32(0.999), np.ones(1))[1].largest == 0x7BFF


@each_dtype
def test_a_row_without_direction_is_found(dtype: str) -> None:
    W, B, A, scale, m = draw(dtype, 7, 18, 3, seed=4)
    W[5], B[5] = 0, 0
    assert run(W, B, A, scale, m)[1].zero_row == 5
    assert run(W[4:], B, A, scale, m, slice(4, 7))[1].zero_row == 5


@pytest.mark.slow
def test_narrow_vectors_write_what_wide_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library, compiled so that it takes one of its two paths on x86, then the other."""
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]
    if "avx512bw" not in (Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else "") or not which(compiler):
        pytest.skip("no compiler, or a processor with vectors of one width")
    for header in native.LIBRARY.parent.glob("*.h"):
        shutil.copy(header, tmp_path)
    source = native.LIBRARY.with_name("rows.c").read_text()
    made = []
    for wide in ("0", "1"):
        assert "wide() ?" in source
        (tmp_path / "rows.c").write_text(source.replace("wide() ?", f"{wide} ?"))
        library = tmp_path / f"rows{wide}.so"
        flags = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-fPIC", "-shared"]
        subprocess.run([compiler, *flags, str(tmp_path / "rows.c"), "-o", str(library), "-lm"], check=True)
        monkeypatch.setattr(native, "LIBRARY", library)
        native._library.cache_clear()
        results = []
        for dtype, (rows, columns), dora in product(sorted(TORCH), ((11, 100), (8, 64)), (False, True)):
            W, B, A, scale, m = draw(dtype, rows, columns, 6, seed=8)
            out, outcome, gains = run(W, B, A, scale, m if dora else None, measured=3)
            results.append((out.tobytes(), gains.tolist(), outcome))
        made.append(results)
    monkeypatch.undo()
    native._library.cache_clear()
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (None, "the C code is not compiled here"),
        ("1", "the C code was compiled from another rows.c"),
        ("0", "torch is faster on this processor"),
    ],
)
def test_why_the_c_code_does_not_serve_is_said(
    size: str | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "librows.so"
    if size is not None:
        compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")[0]
        if not which(compiler):
            pytest.skip("no compiler")
        (tmp_path / "rows.c").write_text(f"unsigned long loratools_rows_size(void) {{ return {size}; }}\n")
        flags = ["-fPIC", "-shared"]
        subprocess.run([compiler, *flags, str(tmp_path / "rows.c"), "-o", str(library)], check=True)
    assert native.why_not() == ""
    monkeypatch.setattr(native, "LIBRARY", library)
    native._library.cache_clear()
    try:
        assert (native.available(), native.why_not()) == (False, reason)
        monkeypatch.setattr(native, "LIBRARY", tmp_path / "damaged.so")
        native.LIBRARY.write_bytes(b"no library")
        native._library.cache_clear()
        assert native.why_not().startswith("the compiled C code does not load: ")
    finally:
        monkeypatch.undo()
        native._library.cache_clear()


def test_arrays_that_do_not_fit_are_refused() -> None:
    W, B, A, scale, m = draw("BF16", 4, 6, 2, seed=5)
    terms = native.products(B, A, B, scale, m)
    sums, gains, rows = np.empty(terms.memory, np.float32), np.ones(4), slice(0, 4)
    for out in (np.zeros((4, 12), np.uint16)[:, ::2], np.zeros((4, 6), np.float16), np.zeros((3, 6), np.uint16)):
        with pytest.raises(ValueError, match="rows laid out alike"):
            native.add_products(W, out, terms, rows, sums, gains=gains)
    with pytest.raises(ValueError, match=r"W \(3, 6\) is not \(4, 6\)"):
        run(W[:3], B, A, scale, rows=slice(0, 4))
    with pytest.raises(ValueError, match="are not rows of left"):
        run(W, B, A, scale, rows=slice(2, 6))
    for wrong in ((B[1:], B, scale, m), (B, B[:, :1], scale, m), (B, B, scale[1:], m), (B, B, scale, m[1:])):
        with pytest.raises(ValueError, match="left, factor, scale and magnitude have the shapes"):
            native.products(wrong[0], A, *wrong[1:])
    with pytest.raises(ValueError, match="gains go with a magnitude"):
        native.add_products(W, W.copy(), terms, rows, sums)
    with pytest.raises(ValueError, match="sums take 320 numbers, not 6"):
        native.add_products(W, W.copy(), terms, rows, np.empty(6, np.float32), gains=gains)
