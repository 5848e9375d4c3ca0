"""One tensor in torch: float64 rounded once for every dtype, the same bytes for all tiles; what the C code writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter.kinds import Term
from loratools.adapter.kinds._sum import Product
from loratools.adapter.kinds.dora import Rescaling
from loratools.adapter.site import Site
from loratools.engine import device
from loratools.engine.arithmetic.native import NativeRows
from loratools.engine.arithmetic.torch import TorchRows, Workspace
from loratools.engine.task import TensorTask
from loratools.engine.tensor import InMemory
from loratools.errors import IncompatibleAdapter
from loratools.linalg import native
from loratools.storage.codecs import floats
from tests.engine.arithmetic import sites as cases
from tests.engine.arithmetic.sites import MATRIX, SITES, TILES, TORCH, WHOLE

CPU = torch.device("cpu")
WORKSPACE = Workspace(CPU)
DTYPES = sorted(TORCH)


def in_torch(
    items: Sequence[tuple[Site, Term]], wide: bool = False, moves: bool = False
) -> Callable[[TensorTask], InMemory]:
    workspace = Workspace(CPU, moves=True) if moves else WORKSPACE
    return lambda task: InMemory(task, TorchRows(task, items, workspace, wide=wide))


def work_of(*dtypes: str) -> torch.dtype:
    return torch.float64 if "F64" in dtypes else torch.float32


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(sorted(SITES)), st.integers(1, 9),
    st.integers(0, 99), st.booleans(), st.booleans(), st.sampled_from(TILES),
)  # fmt: skip
def test_every_site_is_float64_rounded_once_in_any_blocks(
    tmp_path_factory: pytest.TempPathFactory, source: str, out: str, sites: str, rank: int, seed: int,
    dora: bool, moves: bool, block: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("torch")
    spec = cases.save(folder / "W", source, seed)
    products = cases.products(sites, rank, seed, dora)
    wanted, error = cases.expected(cases.base(spec), products)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(device.TILES, "cpu", block)
        made = [
            cases.write(
                spec, in_torch(cases.terms(products, work_of(source, out)), moves=moves), folder / "out", tile, out
            )
            for tile in TILES
        ]
    for raw, result in made:
        assert raw == made[0][0]
        assert result.digests == made[0][1].digests
        cases.expect_measured(result, cases.base(spec), wanted, cases.numbers(raw, out))
    if "F64" in (source, out):
        error = 1e-8 * error + (2.0**-24 * np.abs(wanted) if out in ("BF16", "F16") else 0)  # by way of float32
    cases.expect_rounded(made[0][0], out, wanted, error)


@pytest.mark.skipif(not native.available(), reason="installed without a C compiler")
@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["BF16", "F16", "F32"]), st.sampled_from(sorted(SITES)), st.integers(1, 40), st.integers(0, 99),
    st.booleans(),
)  # fmt: skip
def test_the_c_code_writes_the_same_but_for_the_last_bit_of_a_float32_sum(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, sites: str, rank: int, seed: int, dora: bool
) -> None:
    folder = tmp_path_factory.mktemp("both")
    spec = cases.save(folder / "W", dtype, seed)
    products = cases.products(sites, rank, seed, dora)
    _, error = cases.expected(cases.base(spec), products)

    def in_c(task: TensorTask) -> InMemory:
        return InMemory(task, NativeRows(task, products, floats.Buffers()))

    here, result = cases.write(spec, in_torch(cases.terms(products)), folder / "out")
    there, other = cases.write(spec, in_c, folder / "out", retention="full")
    numbers, others = cases.numbers(here, dtype), cases.numbers(there, dtype)
    if dtype == "F32":
        assert (np.abs(numbers - others) <= 2 * error).all()
    else:
        bits = [np.frombuffer(raw, np.uint16).astype(np.int64) for raw in (here, there)]
        assert np.abs(bits[0] - bits[1]).max() <= 1
        assert (bits[0] != bits[1]).sum() <= (1 if dtype == "BF16" else 4)
    assert result.digests == other.digests
    assert (result.retained, result.total) == pytest.approx((other.retained, other.total), rel=1e-4)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("block", TILES)
def test_norms_across_rows_take_a_pass_of_their_own(
    tmp_path: Path, source: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(device.TILES, "cpu", block)
    spec = cases.save(tmp_path / "W", source, seed=3)
    site = SITES["columns"][0]
    item = cases.product(site, 3, 3)
    m = torch.rand(site.shape[1], dtype=torch.float64) + 1
    (_, product), *_ = cases.terms([item], work_of(source))
    assert isinstance(product, Product)
    term = Rescaling(product, m, site, True, torch.zeros_like(m))
    raw, _ = cases.write(spec, in_torch([(site, term)]), tmp_path / "out", 400)
    wanted, _ = cases.expected(cases.base(spec), [item])
    part = wanted[:, 5:29]
    part *= m.numpy() / np.sqrt((part**2).sum(0))
    cases.expect_rounded(raw, source, wanted, 2.0 ** (-46 if source == "F64" else -20) * (1 + np.abs(wanted)))


def test_updates_that_meet_act_one_after_another_in_float64(tmp_path: Path) -> None:
    """The second DoRA's norm is that of the unchanged base and its own product."""
    spec = cases.save(tmp_path / "W", "F32", seed=4)
    first, second = cases.product(WHOLE, 3, 1, dora=True), cases.product(WHOLE, 2, 2, dora=True)
    items = cases.terms([first, second], torch.float64)
    raw, _ = cases.write(spec, in_torch(items, wide=True), tmp_path / "out", 400)
    W = cases.base(spec)
    once, _ = cases.expected(W, [first])
    alone, _ = cases.expected(W, [second])
    left = second.factor.astype(np.float64) * second.scale @ second.right
    wanted = (once + left) * (alone / (W + left))
    cases.expect_rounded(raw, "F32", wanted, 1e-12 * np.abs(wanted))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_what_cancels_is_computed_in_float64(tmp_path: Path, dtype: str) -> None:
    spec = cases.save(tmp_path / "W", dtype, seed=5)
    item = cases.product(WHOLE, 6, 5)
    change = item.factor.astype(np.float64) * item.scale @ item.right.astype(np.float64)
    spec.file.write_bytes(torch.from_numpy(-change).to(TORCH[dtype]).view(torch.uint8).numpy().tobytes())
    raw, _ = cases.write(spec, in_torch(cases.terms([item])), tmp_path / "out")
    wanted = cases.base(spec) + change
    unit = 2.0 ** np.maximum(np.frexp(wanted)[1] - cases.PRECISION[dtype], -149 if dtype == "BF16" else -24)
    assert (np.abs(cases.numbers(raw, dtype) - wanted) <= 0.75 * unit).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused(tmp_path: Path, dtype: str) -> None:
    spec = cases.save(tmp_path / "W", dtype, seed=1)
    W = torch.from_numpy(cases.base(spec)).to(TORCH[dtype])
    W[12, 30] = torch.nan
    spec.file.write_bytes(W.view(torch.uint8).numpy().tobytes())
    items = cases.terms(cases.products("one part", 3, 1), work_of(dtype))
    with pytest.raises(IncompatibleAdapter, match=f"W: the merged values are not finite in {dtype}"):
        cases.write(spec, in_torch(items), tmp_path / "out", 400)
    W[12, 30] = 0
    spec.file.write_bytes(W.view(torch.uint8).numpy().tobytes())
    large = cases.product(WHOLE, 2, 1)
    items = cases.terms([large], work_of(dtype))
    items[0][1].left.mul_(1e6 if dtype == "F16" else 1e308 if dtype == "F64" else 1e38)  # type: ignore[attr-defined]
    items[0][1].left.mul_(10)  # type: ignore[attr-defined]
    with pytest.raises(IncompatibleAdapter, match=f"not finite in {dtype}"):
        cases.write(spec, in_torch(items), tmp_path / "out")


def test_memory_is_taken_once_and_blocks_go_by_the_shape_alone() -> None:
    workspace = Workspace(CPU)
    first = workspace.of("work", 100, torch.float32)
    assert workspace.of("work", 50, torch.float64).data_ptr() == first.data_ptr()
    assert len(workspace.of("work", 101, torch.float32)) == 101
    spec = cases.TensorSpec("BF16", (1 << 12, 1 << 10), Path("W"), 0, 1 << 23)
    task = TensorTask("W", spec, spec.shape, "F32", 0, 0)  # type: ignore[arg-type]
    assert TorchRows(task, [], workspace).together == device.TILES["cpu"] // (4 << 10)
    assert MATRIX[1] == 40
