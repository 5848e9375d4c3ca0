"""What a verification sees and what it cannot see: merged models made with a fault of a known size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools.adapter.placement.settle import settle
from loratools.surgery.inputs import open_adapters, open_model
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.verify import Verification, verify
from loratools.surgery.verify.probes import draw
from tests.surgery import models
from tests.surgery.models import DTYPES, PRECISION, lora, random, save_adapter, save_base

OUT, IN = 512, 1500
MODULES = {"q_proj": (OUT, IN), "k_proj": (OUT, IN)}


def merged(folder: Path, dtype: str, fault: Callable[[str, Tensor, Tensor], Tensor], size: float = 0.3) -> list[Path]:
    """Save a base, an adapter, and a model of `fault(module, W + ΔW, ΔW)` in float64, rounded; return the paths."""
    weights = {
        f"{name}.weight": random(OUT, IN, seed=i, scale=0.05, dtype=DTYPES[dtype]) for i, name in enumerate(MODULES)
    }
    given = lora(MODULES, scale=(size * 0.05 / 4) ** 0.5)
    model = {
        f"{name}.weight": fault(name, weights[f"{name}.weight"].double() + given.delta(name), given.delta(name)).to(
            DTYPES[dtype]
        )
        for name in MODULES
    }
    return [
        save_base(folder / "model", model), save_base(folder / "base", weights),
        save_adapter(folder / "adapter", given),
    ]  # fmt: skip


def failing(account: Verification) -> list[str]:
    """Return the modules that are not base + adapter."""
    return [check.name.removesuffix(".weight") for check in account.checked if not check.within]


def normed(E: Tensor, norm: float) -> Tensor:
    """Return E, scaled to a norm."""
    return E.mul(norm / float(E.norm()))


def noise(dtype: str, W: Tensor, times: float, rank: int | None = None) -> Tensor:
    """Return noise of `times` the largest error that rounding can make, of full rank or of a given one."""
    E = random(OUT, rank or IN, seed=31).double()
    E = E if rank is None else E @ random(rank, IN, seed=32).double()
    return normed(E, times * 2.0 ** -PRECISION[DTYPES[dtype]] * float(W.norm()))


def test_noise_that_hides_from_the_probes_of_known_seeds_is_found_by_fresh_ones(tmp_path: Path) -> None:
    """A model that passes with seeds 0 to 4, whose probes and columns its maker knew, fails with any other."""
    base = {f"{name}.weight": random(OUT, IN, seed=i, scale=0.05) for i, name in enumerate(MODULES)}
    given = lora(MODULES, scale=0.06)
    paths = [save_base(tmp_path / "base", base), save_adapter(tmp_path / "adapter", given)]
    opened = open_model(paths[0])
    inputs, _ = settle(opened, open_adapters(paths[1], opened, None), strict=False)
    plan = plan_merge(opened, inputs, MergeOptions(check_base="off"))
    right, model = models.merged(base, [given]), {}
    for name, W in right.items():
        probes = [probe for seed in range(5) for probe in draw(plan, name, False, seed)]
        columns = torch.zeros(IN, dtype=torch.bool)
        columns[torch.cat([torch.from_numpy(probe.known.astype(int)) for probe in probes])] = True
        directions = torch.cat([torch.from_numpy(probe.X.T) for probe in probes])
        directions[:, columns] = 0
        E = random(OUT, IN, seed=31).double()
        E[:, columns] = 0
        basis = torch.linalg.qr(directions.T)[0]
        E -= (E @ basis) @ basis.T
        model[name] = (W.double() + normed(E, 0.01 * float(W.norm()))).float()
    hidden = save_base(tmp_path / "model", model)
    assert all(verify(hidden, *paths, seed=seed).ok for seed in range(5))
    assert not any(verify(hidden, *paths, seed=seed).ok for seed in range(5, 12))
    accounts = [verify(hidden, *paths) for _ in range(3)]
    assert all(failing(account) == ["k_proj", "q_proj"] for account in accounts)
    assert all(check.error_of_weight == pytest.approx(0.01, rel=0.1) for one in accounts for check in one.checked)


def test_adapters_that_cancel_reach_as_far_as_both(tmp_path: Path) -> None:
    """The sums of a merge err by the terms that are in them, however small what they come to."""
    base = save_base(tmp_path / "base", {"a.weight": random(40, 60)})
    first, second = lora({"a": (40, 60)}), lora({"a": (40, 60)}, seed=7)
    paths = [save_adapter(tmp_path / f"{number}", given) for number, given in enumerate((first, second))]
    opened = open_model(base)
    inputs, _ = settle(opened, open_adapters(paths, opened, [1.0, -2.0]), strict=False)
    (probe,) = draw(plan_merge(opened, inputs, MergeOptions(check_base="off")), "a.weight", True, 0)
    deltas = first.delta("a"), -2 * second.delta("a")
    assert probe.reach == pytest.approx(sum(float(delta.abs().max()) for delta in deltas))
    assert torch.allclose(torch.from_numpy(probe.change(slice(3, 9))), sum(deltas)[3:9])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("rank", [1, 4, None])
def test_noise_beyond_the_rounding_is_found(rank: int | None, dtype: str, exact: bool, tmp_path: Path) -> None:
    """Three times the bound; wide dtypes have eight times the bound of their rounding."""
    times = 3 * (8 if dtype == "F32" else 1)
    paths = merged(tmp_path, dtype, lambda name, W, _: W + noise(dtype, W, times, rank) * (name == "q_proj"))
    assert failing(verify(*paths, exact=exact)) == ["q_proj"]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_q_and_k_swapped(dtype: str, exact: bool, tmp_path: Path) -> None:
    deltas: dict[str, Tensor] = {}
    merged(tmp_path / "first", dtype, lambda name, W, delta: deltas.setdefault(name, delta) + W)
    other = {"q_proj": "k_proj", "k_proj": "q_proj"}
    paths = merged(tmp_path / "second", dtype, lambda name, W, delta: W - delta + deltas[other[name]])
    assert failing(verify(*paths, exact=exact)) == ["k_proj", "q_proj"]


@pytest.mark.parametrize(
    ("dtype", "exact", "seen"),
    [("F32", False, True), ("F32", True, True), ("BF16", True, True), ("BF16", False, False)],
)
def test_a_scale_that_is_off_by_a_thousandth(dtype: str, exact: bool, seen: bool, tmp_path: Path) -> None:
    """In BF16 this is a tenth of what rounding does, which the account says that it cannot see by default."""
    paths = merged(tmp_path, dtype, lambda _, W, delta: W + 1e-3 * delta)
    account = verify(*paths, exact=exact)
    assert failing(account) == (["k_proj", "q_proj"] if seen else [])


@pytest.mark.parametrize(("share", "seen"), [(0.0, False), (1 / 3, False), (0.6, True)])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_last_bit_is_seen_as_far_as_the_account_says(dtype: str, share: float, seen: bool, tmp_path: Path) -> None:
    """Up to a third of the elements, by default; each one of them with `exact`."""

    def flipped(name: str, W: Tensor, _: Tensor) -> Tensor:
        rounded = W.to(DTYPES[dtype])
        some = torch.rand(W.shape, generator=torch.Generator().manual_seed(len(name))) < share
        rounded.view(torch.int16)[some] ^= 1
        return rounded

    paths = merged(tmp_path, dtype, flipped)
    account = verify(*paths)
    assert failing(account) == (["k_proj", "q_proj"] if seen else [])
    assert account.unseen == (
        f"errors below {1.02 * 2.0 ** -PRECISION[DTYPES[dtype]]:.1e} of a changed {dtype} tensor, outside of the "
        "columns compared: the last bit of up to a third of its elements, or a few elements by more; --exact sees them",
    )
    account = verify(*paths, exact=True)
    assert failing(account) == (["k_proj", "q_proj"] if share else [])
    assert account.unseen == (
        f"the last bit of {dtype} elements whose exact sum is as near to a tie as float32 can tell",
    )


@pytest.mark.parametrize(("bits", "seen"), [(3, False), (6, True)])
def test_the_last_bits_of_float32(bits: int, seen: bool, tmp_path: Path) -> None:
    def scrambled(name: str, W: Tensor, _: Tensor) -> Tensor:
        rounded = W.float()
        other = torch.randint(0, 1 << bits, W.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        rounded.view(torch.int32).bitwise_xor_(other)
        return rounded

    paths = merged(tmp_path, "F32", scrambled)
    account = verify(*paths)
    assert failing(account) == (["k_proj", "q_proj"] if seen else [])
    assert "the last three bits of its elements" in account.unseen[0]


def test_one_element_outside_the_columns_is_seen_by_exact_alone(tmp_path: Path) -> None:
    def moved(name: str, W: Tensor, _: Tensor) -> Tensor:
        W[7, 11] += 0.01 * (name == "q_proj")
        return W

    paths = merged(tmp_path, "BF16", moved)
    by_default = [verify(*paths, seed=seed).ok for seed in range(40)]
    assert 0 < by_default.count(False) < 20  # 128 of 1,500 columns
    assert failing(verify(*paths, exact=True)) == ["q_proj"]


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (2, 50), (4, 4), (3, 700)])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_right_merges_of_small_tensors_pass_with_every_seed(dtype: str, shape: tuple[int, int], tmp_path: Path) -> None:
    weights = {"a.weight": random(*shape, scale=0.05, dtype=DTYPES[dtype])}
    given = lora({"a": shape}, scale=0.06)
    paths = (
        save_base(tmp_path / "model", models.merged(weights, [given])), save_base(tmp_path / "base", weights),
        save_adapter(tmp_path / "adapter", given),
    )  # fmt: skip
    assert all(verify(*paths, seed=seed, threads=1).ok for seed in range(25))
    assert not verify(paths[1], *paths[1:]).ok


@pytest.mark.parametrize("exact", [False, True])
def test_numbers_near_the_smallest_of_their_dtype(exact: bool, tmp_path: Path) -> None:
    """Below 2^-14 the numbers of F16 are 2^-24 apart, however small: rounding errs by more than 2^-11 of them."""
    weights = {"a.weight": random(96, 128, scale=2e-6, dtype=torch.float16)}
    given = lora({"a": (96, 128)}, scale=4e-4)
    right = models.merged(weights, [given])
    base, adapter = save_base(tmp_path / "base", weights), save_adapter(tmp_path / "adapter", given)
    assert verify(save_base(tmp_path / "model", right), base, adapter, exact=exact).ok
    wrong = {"a.weight": (right["a.weight"].double() + given.delta("a")).half()}
    assert not verify(save_base(tmp_path / "twice", wrong), base, adapter, exact=exact).ok


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("scale", [1e-25, 1e30])
def test_numbers_near_the_ends_of_float32(scale: float, dtype: str, exact: bool, tmp_path: Path) -> None:
    weights = {"a.weight": random(96, 128, scale=0.05 * scale, dtype=DTYPES[dtype])}
    given = lora({"a": (96, 128)}, scale=0.06 * scale**0.5)
    right = models.merged(weights, [given])
    base, adapter = save_base(tmp_path / "base", weights), save_adapter(tmp_path / "adapter", given)
    found = verify(save_base(tmp_path / "model", right), base, adapter, exact=exact)
    assert found.ok
    assert found.checked[0].applied == pytest.approx(1, abs=0.02)
    wrong = {"a.weight": (right["a.weight"].double() + 0.3 * given.delta("a")).to(DTYPES[dtype])}
    assert not verify(save_base(tmp_path / "wrong", wrong), base, adapter, exact=exact).ok
