"""One tensor in C: float64 rounded once, the same bytes for all tiles; what is refused; what it is chosen for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.arithmetic.native import NativeRows, serves
from loratools.engine.load import SiteProduct
from loratools.engine.plan import Change
from loratools.engine.task import TensorTask
from loratools.engine.tensor import InMemory
from loratools.errors import IncompatibleAdapter
from loratools.linalg import native
from loratools.storage.codecs import Module, encoded, floats, fp8
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor
from tests.engine.arithmetic import sites as cases
from tests.engine.arithmetic.sites import MATRIX, SITES, TILES, WHOLE

pytestmark = pytest.mark.skipif(not native.available(), reason="installed without a C compiler")
DTYPES = ["BF16", "F16", "F32"]


def in_c(items: list[SiteProduct]) -> Callable[[TensorTask], InMemory]:
    return lambda task: InMemory(task, NativeRows(task, items, floats.Buffers()))


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from(sorted(SITES)), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_every_site_is_float64_rounded_once_in_any_tiles(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, sites: str, rank: int, seed: int, dora: bool
) -> None:
    folder = tmp_path_factory.mktemp("native")
    spec = cases.save(folder / "W", dtype, seed)
    products = cases.products(sites, rank, seed, dora)
    wanted, error = cases.expected(cases.base(spec), products)
    made = [cases.write(spec, in_c(products), folder / "out", tile) for tile in TILES]
    for raw, result in made:
        assert raw == made[0][0]
        assert result.digests == made[0][1].digests
        cases.expect_measured(result, cases.base(spec), wanted, cases.numbers(raw, dtype))
    cases.expect_rounded(made[0][0], dtype, wanted, error)
    untouched = np.full(MATRIX, True)
    for site in SITES[sites]:
        untouched[slice(*site.rows), slice(*site.columns)] = False
    assert (cases.numbers(made[0][0], dtype) == cases.base(spec))[untouched].all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["BF16", "F16"]), st.sampled_from(sorted(SITES)), st.integers(0, 99), st.booleans())
def test_float32_becomes_16_bit_in_the_same_rounding(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, sites: str, seed: int, dora: bool
) -> None:
    folder = tmp_path_factory.mktemp("narrowed")
    spec = cases.save(folder / "W", "F32", seed)
    products = cases.products(sites, 3, seed, dora)
    wanted, error = cases.expected(cases.base(spec), products)
    made = [cases.write(spec, in_c(products), folder / "out", tile, dtype) for tile in TILES]
    assert all(raw == made[0][0] for raw, _ in made)
    cases.expect_rounded(made[0][0], dtype, wanted, error)
    numbers = cases.numbers(made[0][0], dtype)
    changed = np.full(MATRIX, False)
    for site in SITES[sites]:
        changed[slice(*site.rows), slice(*site.columns)] = True
    delta, kept = (wanted - cases.base(spec))[changed], (numbers - cases.base(spec))[changed]
    for _, result in made:
        assert abs(result.total / (delta * delta).sum() - 1) < 1e-4
        assert abs(result.retained - (kept * delta).sum()) < 1e-4 * (delta * delta).sum()
        assert result.changed == pytest.approx(np.count_nonzero(kept))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_cast_alone_is_torchs_and_counts_what_it_loses(tmp_path: Path, dtype: str) -> None:
    W = np.random.default_rng(3).standard_normal(MATRIX).astype(np.float32)
    W[0, :8] = [-0.0, 0.0, np.inf, -np.inf, np.nan, 3.4e38, 65520.0, 65519.0]
    W[1, :6] = [1e-8, -1e-8, 2.0**-25, 2.0**-24, 1e-45, 2.0**-133]
    W[2, :2] = np.array([0x7FFFFFFF, 0xFFFFFFFF], np.uint32).view(np.float32)  # NaN of other bits
    W.tofile(tmp_path / "W")
    spec = TensorSpec("F32", MATRIX, tmp_path / "W", 0, W.nbytes)
    raw, result = cases.write(spec, in_c([]), tmp_path / "out", 400, dtype)
    theirs = torch.from_numpy(W).to(cases.TORCH[dtype])
    ours = torch.frombuffer(bytearray(raw), dtype=cases.TORCH[dtype]).view(MATRIX)
    assert torch.equal(ours.isnan(), theirs.isnan())
    number = ~theirs.isnan()
    assert torch.equal(ours[number].view(torch.int16), theirs[number].view(torch.int16))  # the sign of zero too
    assert result.overflowed == int(np.count_nonzero(np.isfinite(W) & theirs.isinf().numpy())) > 0
    assert result.flushed == int(np.count_nonzero((W != 0) & (theirs == 0).numpy())) > 0


def test_what_a_cast_loses_is_counted_once_beside_what_changes(tmp_path: Path) -> None:
    W = np.full(MATRIX, 1e-9, np.float32)
    W.tofile(tmp_path / "W")
    spec = TensorSpec("F32", MATRIX, tmp_path / "W", 0, W.nbytes)
    for sites in ("one part", "every second column"):
        _, result = cases.write(spec, in_c(cases.products(sites, 3, 1)), tmp_path / "out", 400, "F16")
        covered = sum(site.shape[0] * site.shape[1] for site in SITES[sites])
        assert result.flushed == W.size - covered


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (12, 30)])
def test_infinities_of_the_base_are_refused_wherever_they_are(
    tmp_path: Path, dtype: str, place: tuple[int, int]
) -> None:
    spec = cases.save(tmp_path / "W", dtype, seed=1)
    W = torch.from_numpy(cases.base(spec)).to(cases.TORCH[dtype])
    W[place] = torch.inf
    spec.file.write_bytes(W.view(torch.uint8).numpy().tobytes())
    with pytest.raises(IncompatibleAdapter, match=f"W: the merged values are not finite in {dtype}"):
        cases.write(spec, in_c(cases.products("one part", 3, 1)), tmp_path / "out", 400)


def test_an_overflow_is_refused(tmp_path: Path) -> None:
    for dtype, size in (("F16", 1e6), ("BF16", 1e40), ("F32", 1e40)):
        spec = cases.save(tmp_path / "W", dtype, seed=1)
        item = cases.product(WHOLE, 2, 1)
        large = SiteProduct(item.site, item.factor, item.scale * size, item.right)
        with pytest.raises(IncompatibleAdapter, match=f"not finite in {dtype}"):
            cases.write(spec, in_c([large]), tmp_path / "out")


def test_a_row_without_direction_is_named(tmp_path: Path) -> None:
    spec = cases.save(tmp_path / "W", "BF16", seed=1)
    raw = np.fromfile(spec.file, np.uint16).reshape(MATRIX)
    raw[9 + 7] = 0
    raw.tofile(spec.file)
    items = cases.products("one part", 3, 1, dora=True)
    items[0].factor[7] = 0
    with pytest.raises(IncompatibleAdapter, match="zero in all of output feature 7"):
        cases.write(spec, in_c(items), tmp_path / "out", 400)


def stored(*shape: int, dtype: str = "F32") -> LazyTensor:
    """Return a factor that is known by its header."""
    return LazyTensor.stored(TensorSpec(dtype, shape, Path("adapter"), 0, int(np.prod(shape)) * 4))


def placed(site: Site = WHOLE, kind: str = "lora", dtype: str = "F32", file: bool = True) -> Placement:
    """Return an update of a site, with factors in files or made in memory."""
    out, columns = site.shape[::-1] if site.transposed else site.shape
    parts = {"lora_A.weight": stored(2, columns, dtype=dtype), "lora_B.weight": stored(out, 2, dtype=dtype)}
    if kind == "dora":
        parts["lora_magnitude_vector"] = stored(out, dtype=dtype)
    if not file:
        parts = {part: lazy.map(lambda tensor: tensor, lazy.shape) for part, lazy in parts.items()}
    update: Update = kinds.get(kind).build(parts, 1.0, 2.0)
    return Placement("W", update, site)


def chosen(*placements: Placement, source: str = "BF16", out: str | None = None) -> bool:
    size = MATRIX[0] * MATRIX[1] * (4 if source == "F32" else 2)
    change = Change(TensorSpec(source, MATRIX, Path("base"), 0, size), tuple(enumerate(placements)))
    return serves(change, out or source)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_stored_products_on_dtypes_that_stay_are_served(source: str, dtype: str, kind: str) -> None:
    assert chosen(placed(kind=kind, dtype=dtype), source=source)
    assert chosen(*(placed(site, kind, dtype) for site in SITES["interleaved"]), source=source)


def test_what_else_is_served_and_what_is_not() -> None:
    turned = SITES["every second column"][0]
    assert chosen(placed(), placed())  # two adapters
    assert chosen(placed(turned))
    conv = {"lora_A.weight": stored(2, 10, 2, 2), "lora_B.weight": stored(24, 2, 1, 1)}
    assert chosen(Placement("W", kinds.get("conv").build(conv, 1.0, 2.0), WHOLE))
    assert not chosen()  # a cast alone
    assert not chosen(placed(), source="F32", out="BF16")
    assert not chosen(placed(), source="F64")
    assert not chosen(placed(dtype="F64"))
    assert not chosen(placed(file=False))
    assert not chosen(placed(turned, "dora"))  # norms across rows
    assert not chosen(placed(), placed(SITES["one part"][0]))  # they overlap
    assert not chosen(placed(kind="dora"), placed())
    embedding = {"lora_embedding_A": stored(2, 24), "lora_embedding_B": stored(40, 2)}
    assert not chosen(Placement("W", kinds.get("embedding").build(embedding, 1.0, 2.0), WHOLE))


def test_what_codes_stand_for_is_served_in_every_dtype_changed_or_not() -> None:
    names = {"weight": "W.weight", "weight_scale": "W.weight_scale"}
    specs = {
        "weight": TensorSpec("F8_E4M3", MATRIX, Path("base"), 0, MATRIX[0] * MATRIX[1]),
        "weight_scale": TensorSpec("F32", (1,), Path("base"), 0, 4),
    }
    spec = encoded(fp8.opened(Module("W", "fp8", names, specs, {}, "BF16")))
    for dtype in DTYPES:
        assert serves(Change(spec), dtype)
        assert serves(Change(spec, ((0, placed()),)), dtype)
        assert not serves(Change(spec, ((0, placed(file=False)),)), dtype)
    assert not serves(Change(spec), "F64")


def test_nothing_is_served_where_nothing_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(placed())
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "librows.so")
    native._library.cache_clear()
    try:
        assert not chosen(placed())
    finally:
        monkeypatch.undo()
        native._library.cache_clear()
