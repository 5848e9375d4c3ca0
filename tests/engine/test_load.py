"""From placements to factors: the same in NumPy and in torch, in the order of digests; what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.adapter import kinds
from loratools.adapter.input import AdapterInput
from loratools.adapter.kinds._sum import Product
from loratools.adapter.model import Adapter
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site
from loratools.engine.load import check_effect, is_stored, is_wide, load_products, load_sums, load_terms
from loratools.engine.plan import Change, MergePlan
from loratools.errors import IncompatibleAdapter
from loratools.linalg import native
from loratools.linalg.native.factors import Memory
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec, read_header
from loratools.storage.lazy import LazyTensor
from tests.engine.models import numbers
from tests.linalg.native.test_factors import held
from tests.surgery.models import DTYPES, save_base

OUT, IN = 12, 20
WHOLE = Site.whole("w.weight", (OUT, IN))
PART = Site("w.weight", (OUT, IN), (3, 9, 1), (0, IN, 1), (2, 8))
TURNED = Site.whole("w.weight", (IN, OUT), transposed=True)


def factors(rank: int, seed: int, kind: str = "lora") -> dict[str, Tensor]:
    parts = {"lora_A.weight": numbers(rank, IN, seed=seed), "lora_B.weight": numbers(OUT, rank, seed=seed + 1)}
    return parts | ({"lora_magnitude_vector": numbers(OUT, seed=seed + 2).abs() + 1} if kind == "dora" else {})


def placed(folder: Path, parts: Mapping[str, Tensor], site: Site = WHOLE, kind: str = "lora") -> Placement:
    """Save the parts, and return their update with s = 1.5 on a site."""
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    save_file(dict(parts), path)
    lazy = {name: LazyTensor.stored(spec) for name, spec in read_header(path).tensors.items()}
    return Placement("w", kinds.get(kind).build(lazy, 1.5, 3.0), site)


def planned(
    folder: Path, *placements: Placement, weights: tuple[float, ...] = (), digests: str = "abc"
) -> tuple[MergePlan, Change]:
    """Return a plan of one tensor with an update of each adapter."""
    shape = placements[0].site.matrix
    base = Checkpoint.open(save_base(folder / "base", {"w.weight": numbers(*shape, seed=99)}))
    change = Change(base.specs["w.weight"], tuple(enumerate(placements)))
    inputs = tuple(
        AdapterInput(Adapter({"w": placement.update}), weight, digest)
        for placement, weight, digest in zip(placements, weights or (1.0,) * len(placements), digests, strict=False)
    )
    return MergePlan(base, inputs, (), {"w.weight": change}), change


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("site", [WHOLE, PART, TURNED], ids=["whole", "part", "turned"])
def test_arrays_and_terms_are_w_s_left_right(tmp_path: Path, dtype: str, site: Site) -> None:
    parts = {name: tensor.to(DTYPES[dtype]) for name, tensor in factors(3, 1).items()}
    plan, change = planned(tmp_path, placed(tmp_path, parts, site), weights=(0.7,))
    delta = 0.7 * 1.5 * parts["lora_B.weight"].double()[site.part_rows] @ parts["lora_A.weight"].double()
    wanted = (delta.T if site.transposed else delta).numpy()
    (product,) = load_products(plan, change, "w.weight")
    np.testing.assert_allclose(
        product.factor.astype(float) * product.scale @ product.right.astype(float), wanted, 1e-12
    )
    ((_, term),) = load_terms(plan, change, "F32", "w.weight", torch.device("cpu"))
    assert isinstance(term, Product)
    np.testing.assert_array_equal(term.factor.numpy(), product.factor)
    np.testing.assert_array_equal(term.right.numpy(), product.right)
    np.testing.assert_array_equal(term.scale.numpy(), product.scale)


@pytest.mark.skipif(not native.available(), reason="installed without a C compiler")
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("site", [WHOLE, PART, TURNED], ids=["whole", "part", "turned"])
def test_sums_are_what_the_arrays_are(tmp_path: Path, dtype: str, site: Site) -> None:
    """Of two adapters side by side, in the order of their digests; with magnitudes where rows have them."""
    for count, kind in ((2, "lora"), (1, "lora" if site.transposed else "dora")):
        (tmp_path / kind).mkdir(exist_ok=True)
        placements = []
        for rank in (3, 2)[:count]:
            parts = {name: tensor.to(DTYPES[dtype]) for name, tensor in factors(rank, rank, kind).items()}
            placements.append(placed(tmp_path / kind, parts, site, kind))
        (tmp_path / f"{count}").mkdir()
        plan, change = planned(tmp_path / f"{count}", *placements, weights=(0.7, -1.0)[:count], digests="ba")
        (product,), ((place, total),) = load_products(plan, change, "w"), load_sums(plan, change, "w", Memory())
        assert place == product.site
        assert (total.rows, total.columns, total.rank) == (len(product.factor), *product.right.shape[::-1])
        for name, array in (("factor", product.factor), ("scale", product.scale), ("magnitude", product.magnitude)):
            assert array is None or (held(total, name) == array).all()
        assert (held(total, "right")[:, : total.columns] == product.right).all()
        assert (product.magnitude is None) == (total.gains is None)


def test_adapters_are_joined_in_the_order_of_their_digests(tmp_path: Path) -> None:
    placements = [placed(tmp_path, factors(rank, seed)) for rank, seed in ((2, 1), (3, 10), (4, 20))]
    plan, change = planned(tmp_path, *placements, weights=(0.5, -1.0, 2.0), digests="bca")
    (product,) = load_products(plan, change, "w.weight")
    assert (product.scale / 1.5).tolist() == [2.0] * 4 + [0.5] * 2 + [-1.0] * 3
    ((_, term),) = load_terms(plan, change, "BF16", "w.weight", torch.device("cpu"))
    assert isinstance(term, Product)
    np.testing.assert_array_equal(term.left.numpy(), (product.factor * product.scale).astype(np.float32))


def test_an_update_that_is_not_additive_acts_where_it_was_given(tmp_path: Path) -> None:
    placements = [placed(tmp_path, factors(2, 1)), placed(tmp_path, factors(3, 5, "dora"), kind="dora")]
    for digests in ("ab", "ba"):
        (tmp_path / digests).mkdir()
        plan, change = planned(tmp_path / digests, *placements, digests=digests)
        terms = load_terms(plan, change, "F32", "w.weight", torch.device("cpu"))
        assert [isinstance(term, Product) for _, term in terms] == [True, False]


def test_magnitudes_go_with_their_rows(tmp_path: Path) -> None:
    parts = factors(3, 1, "dora")
    plan, change = planned(tmp_path, placed(tmp_path, parts, PART, "dora"))
    (product,) = load_products(plan, change, "w.weight")
    assert product.magnitude is not None
    assert product.magnitude.tolist() == parts["lora_magnitude_vector"][2:8].double().tolist()


def test_float64_is_for_float64_and_for_updates_that_meet(tmp_path: Path) -> None:
    lora, other = placed(tmp_path, factors(2, 1)), placed(tmp_path, factors(2, 3))
    part, dora = placed(tmp_path, factors(2, 5), PART), placed(tmp_path, factors(2, 7, "dora"), kind="dora")
    source = TensorSpec("F32", (OUT, IN), tmp_path, 0, OUT * IN * 4)

    def wide(*placements: Placement, dtype: str = "F32") -> bool:
        return is_wide(Change(source, tuple(enumerate(placements))), dtype)

    assert not wide(lora)
    assert not wide(lora, other)
    assert not wide(dora)
    assert wide(lora, dtype="F64")
    assert wide(lora, part)
    assert wide(lora, dora)


def test_factors_are_stored_where_all_are_bytes_of_files(tmp_path: Path) -> None:
    update = placed(tmp_path, factors(2, 1, "dora"), kind="dora").update
    assert is_stored(update.factored())
    assert not is_stored(None)
    moved = {**update.parts, "lora_magnitude_vector": LazyTensor.of(torch.ones(OUT))}
    assert not is_stored(kinds.get("dora").build(moved, 1.5, 3.0).factored())
    wide = {name: tensor.double() for name, tensor in factors(2, 1).items()}
    assert not is_stored(placed(tmp_path, wide).update.factored())


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"])
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_factors_that_are_not_finite_are_refused(tmp_path: Path, part: str, bad: float) -> None:
    parts = factors(2, 1, "dora")
    parts[part].view(-1)[3] = bad
    plan, change = planned(tmp_path, placed(tmp_path, factors(2, 9)), placed(tmp_path, parts, kind="dora"))
    alone = Change(change.source, change.placements[1:])
    message = "adapter 2: w has NaN or infinite factors"
    with pytest.raises(IncompatibleAdapter, match=message):
        load_products(plan, alone, "w.weight")
    with pytest.raises(IncompatibleAdapter, match=message):
        load_terms(plan, alone, "F32", "w.weight", torch.device("cpu"))


def test_adapters_that_change_nothing_are_listed(tmp_path: Path) -> None:
    idle = factors(2, 1)
    idle["lora_B.weight"][:, 0] = 0
    idle["lora_A.weight"][1] = 0
    in_memory = {name: LazyTensor.of(tensor) for name, tensor in idle.items()}
    placements = [
        placed(tmp_path, factors(2, 5)),
        placed(tmp_path, idle),
        Placement("w", kinds.get("lora").build(in_memory, 1.5, 3.0), WHOLE),
        placed(tmp_path, factors(2, 7)),
        placed(tmp_path, factors(2, 7, "dora"), kind="dora"),
    ]
    plan, _ = planned(tmp_path, *placements, weights=(1, 1, 1, 0, 0), digests="abcde")
    with pytest.raises(IncompatibleAdapter) as caught:
        check_effect(plan)
    assert caught.value.problems == (
        "adapter 2: s·B·A is zero in every module, as before training",
        "adapter 3: s·B·A is zero in every module, as before training",
        "adapter 4: its weight is 0",
    )
