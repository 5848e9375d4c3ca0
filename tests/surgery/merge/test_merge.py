"""Merged numbers against W + Σ w·s·B·A in float64, rounded once."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools import dialects
from loratools.adapter.input import AdapterInput
from loratools.engine.run import Settings, write_weights
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.merge import MergeOptions, merge, prepare
from loratools.surgery.merge.plan import plan_merge
from tests.surgery import models
from tests.surgery.models import DTYPES, PRECISION, Lora, load, lora, random, same_bytes, save, weights_of

SHAPES = {"block.0.up": (300, 400), "block.0.down": (400, 300), "block.1.up": (300, 400)}


def terms(weights: dict[str, Tensor], adapters: list[Lora], name: str) -> Tensor:
    """Return |W| + Σ |w·s|·|B|·|A|: what the rounding errors of a sum are proportional to."""
    total = weights[name].double().abs()
    for one in adapters:
        if name.removesuffix(".weight") in one.factors:
            A, B = one.factors[name.removesuffix(".weight")]
            total = total + abs(one.weight * one.alpha / len(A)) * (B.double().abs() @ A.double().abs())
    return total


TIES = {torch.bfloat16: 1e-4, torch.float16: 1e-3}
"""Share of the elements in which a float32 sum may come to the other side of a tie between two 16-bit numbers."""


def expect_rounded_once(
    found: dict[str, Tensor],
    weights: dict[str, Tensor],
    adapters: list[Lora],
    out: torch.dtype,
    ties: float | None = None,
) -> None:
    """Assert: 16-bit results are the float64 ones but for rare ties, one unit off; wider ones err as their sums do."""
    wanted = models.merged(weights, adapters, out)
    assert found.keys() == wanted.keys()
    for name, W in wanted.items():
        if out in TIES:
            off = models.units_off(found[name], W)
            assert int(off.max()) <= 1
            assert int((off > 0).sum()) <= W.numel() * (ties or TIES[out])
        error = (found[name].double() - W.double()).abs()
        assert bool((error <= 16 * 2.0 ** -PRECISION[out] * terms(weights, adapters, name)).all())


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("size", [0.3, 0.01], ids=["large", "small"])
def test_several_adapters_of_both_signs(dtype: str, size: float, tmp_path: Path) -> None:
    """Weights are such that w·s is no power of two, so that their own rounding would show."""
    weights = weights_of(SHAPES, DTYPES[dtype]) | {"norm.weight": random(400, dtype=DTYPES[dtype])}
    adapters = [
        lora(SHAPES, rank=4, seed=1, scale=size, weight=0.7),
        lora({"block.0.up": (300, 400), "block.1.up": (300, 400)}, rank=16, seed=2, scale=size, weight=-1.3),
    ]
    base, paths = save(tmp_path, weights, adapters, shards=2)
    report = merge(base, paths, tmp_path / "out", weights=[one.weight for one in adapters])
    found = load(tmp_path / "out")
    assert (report.changed, report.tensors) == (3, 4)
    assert same_bytes(found["norm.weight"], weights["norm.weight"])
    expect_rounded_once(found, weights, adapters, DTYPES[dtype])


@pytest.mark.parametrize(("stored", "out"), [("BF16", "BF16"), ("F16", "F16"), ("F32", "BF16")])
def test_results_near_zero(stored: str, out: str, tmp_path: Path) -> None:
    """Where ΔW undoes W all over, float32 sums keep few right digits; still no result is off by more than a unit."""
    adapter = lora({"a": (400, 500)}, rank=8, scale=0.3, weight=0.3)
    weights = {"a.weight": (-adapter.delta("a")).to(DTYPES[stored])}
    base, paths = save(tmp_path, weights, [adapter])
    merge(base, paths, tmp_path / "out", weights=[0.3], dtype=out)
    found = load(tmp_path / "out")
    expect_rounded_once(found, weights, [adapter], DTYPES[out], ties=0.05)
    left = found["a.weight"].double().norm() / weights["a.weight"].double().norm()
    assert 0 < float(left) < 2.0 ** -PRECISION[DTYPES[stored]]


def test_order_threads_and_tiles_do_not_show(tmp_path: Path) -> None:
    adapters = [
        lora(SHAPES, rank=3, seed=1, weight=0.7),
        lora({"block.0.up": (300, 400)}, rank=8, seed=2, weight=-1.1),
        lora({"block.1.up": (300, 400), "block.0.up": (300, 400)}, rank=2, seed=3, weight=0.3),
    ]
    base, paths = save(tmp_path, weights_of(SHAPES, torch.bfloat16), adapters, shards=2)
    outputs = []
    for number, order in enumerate(permutations(range(3))):
        out = tmp_path / f"out{number}"
        merge(base, [paths[i] for i in order], out, weights=[adapters[i].weight for i in order], threads=1 + number % 3)
        outputs.append({file.name: file.read_bytes() for file in out.iterdir() if file.name != "loratools.json"})
    assert all(output == outputs[0] for output in outputs)
    plan = prepare(base, paths, tmp_path / "none", weights=[one.weight for one in adapters])
    for tile in (1, 50_000, 1 << 30):
        folder = tmp_path / f"tile{tile}"
        folder.mkdir()
        write_weights(plan.plan, folder, Settings(2, tile_bytes=tile), lambda _: None)
        if tile > 1:
            assert all(file.read_bytes() == outputs[0][file.name] for file in folder.iterdir())
        else:  # a single row is another product (GEMV) to a BLAS, so ties may fall otherwise
            before, after = load(tmp_path / "out0"), load(folder)
            assert max(int(models.units_off(after[name], before[name]).max()) for name in before) <= 1


def test_a_weight_for_each_adapter(tmp_path: Path) -> None:
    base, paths = save(tmp_path, weights_of(SHAPES, torch.float32), [lora(SHAPES)])
    for count in (0, 2):
        with pytest.raises(ValueError, match="each adapter takes one weight"):
            merge(base, paths, tmp_path / "out", weights=[1.0] * count)
    with pytest.raises(ValueError, match=r"0 adapters"):
        merge(base, [], tmp_path / "out")


@pytest.mark.parametrize("out", sorted(DTYPES))
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_cast(dtype: str, out: str, tmp_path: Path) -> None:
    weights = weights_of(SHAPES, DTYPES[dtype]) | {
        "ids": torch.arange(7),
        "norm.weight": random(400, dtype=DTYPES[dtype]),
    }
    adapter = lora(SHAPES, weight=0.9)
    base, paths = save(tmp_path, weights, [adapter], shards=2, dtype="old", model_type="llama")
    merge(base, paths, tmp_path / "out", weights=[0.9], dtype=out)
    found = load(tmp_path / "out")
    assert same_bytes(found.pop("ids"), weights.pop("ids"))
    assert {W.dtype for W in found.values()} == {DTYPES[out]}
    assert same_bytes(found["norm.weight"], weights["norm.weight"].to(DTYPES[out]))
    expect_rounded_once(found, weights, [adapter], DTYPES[out])


@pytest.mark.parametrize("out", ["BF16", "F32", "F64"])
def test_conv1d_is_stored_transposed(out: str, tmp_path: Path) -> None:
    """A square weight shows by its numbers only."""
    shapes = {"h.0.attn.c_proj": (96, 96), "h.0.mlp.c_fc": (200, 96)}
    weights = {
        f"{name}.weight": W.T.contiguous()
        for name, W in zip(shapes, weights_of(shapes, torch.bfloat16).values(), strict=True)
    }
    adapter = lora(shapes)
    base, paths = save(tmp_path, weights, [adapter], model_type="gpt2")
    merge(base, paths, tmp_path / "out", dtype=out)
    found = {name: W.T for name, W in load(tmp_path / "out").items()}
    expect_rounded_once(found, {name: W.T for name, W in weights.items()}, [adapter], DTYPES[out])


def test_retention_is_the_projection(tmp_path: Path) -> None:
    """On all tiles it is ⟨W' − W, ΔW⟩/‖ΔW‖² itself; on a sample it is close."""
    shapes = {"a": (2048, 1024), "b": (1024, 2048)}
    weights = weights_of(shapes, torch.bfloat16)
    adapter = lora(shapes, scale=0.003)
    base, paths = save(tmp_path, weights, [adapter])
    full = merge(base, paths, tmp_path / "full", retention="full")
    sample = merge(base, paths, tmp_path / "sample", retention="sample", seed=5)
    assert merge(base, paths, tmp_path / "off", retention="off").retention is None
    kept, total = 0.0, 0.0
    for name, W in load(tmp_path / "full").items():
        delta = adapter.delta(name.removesuffix(".weight"))
        moved = W.double() - weights[name].double()
        assert full.by_tensor[name] == pytest.approx(float((moved * delta).sum() / delta.square().sum()), rel=1e-6)
        kept, total = kept + float((moved * delta).sum()), total + float(delta.square().sum())
    assert full.retention == pytest.approx(kept / total, rel=1e-6)
    assert 0.3 < kept / total < 0.97
    assert sample.retention == pytest.approx(full.retention, abs=0.02)
    assert sample.retention != full.retention
    same = [load(tmp_path / run)["a.weight"] for run in ("full", "sample", "off")]
    assert same_bytes(same[0], same[1])
    assert same_bytes(same[0], same[2])


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Tensor], list[Lora], str, int, int]:
    """Draw weights, adapters on some of them, the dtype of the output, tile bytes and threads."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3))
    stored, out = draw(st.sampled_from(sorted(DTYPES))), draw(st.sampled_from(sorted(DTYPES)))
    modules = {f"m{i}": shape for i, shape in enumerate(shapes)}
    weights = weights_of(modules, DTYPES[stored]) | {"norm.weight": random(5, dtype=DTYPES[stored])}
    adapters = []
    for seed in range(draw(st.integers(1, 3))):
        targets = draw(st.lists(st.sampled_from(sorted(modules)), min_size=1, unique=True))
        weight = draw(st.floats(-2, 2).filter(lambda value: abs(value) > 1e-3))
        rank, scale = draw(st.integers(1, 9)), draw(st.sampled_from([0.02, 0.5]))
        one = lora({name: modules[name] for name in targets}, rank, 10 * seed + 3, scale, weight=weight)
        kind = DTYPES[draw(st.sampled_from(["BF16", "F32"]))]
        factors = {name: (A.to(kind), B.to(kind)) for name, (A, B) in one.factors.items()}
        adapters.append(replace(one, factors=factors))
    return weights, adapters, out, draw(st.sampled_from([1, 64, 1000, 1 << 20])), draw(st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_shapes_ranks_dtypes_and_tiles(case: tuple[dict[str, Tensor], list[Lora], str, int, int]) -> None:
    weights, adapters, out, tile, threads = case
    with tempfile.TemporaryDirectory() as name:
        base, paths = save(Path(name), weights, adapters)
        inputs = [
            AdapterInput(dialects.open_adapter(path), one.weight, str(path))
            for path, one in zip(paths, adapters, strict=True)
        ]
        plan = plan_merge(Checkpoint.open(base), inputs, MergeOptions(dtype=out))
        (Path(name) / "out").mkdir()
        settings = Settings(threads, tile_bytes=tile, retention="full")
        write_weights(plan, Path(name) / "out", settings, lambda _: None)
        found = load(Path(name) / "out")
    expect_rounded_once(found, weights, adapters, DTYPES[out], ties=1)
