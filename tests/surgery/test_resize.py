"""Resizing: each rule against the singular values of the dense matrix, and the identity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratools import dialects
from loratools.adapter import kinds
from loratools.adapter.model import Adapter
from loratools.dialects import open_adapter
from loratools.errors import InvalidOption, LoraToolsError
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Energy, Fixed, Ratio, SvCumulative, SvFro, SvRatio
from loratools.storage.lazy import LazyTensor
from loratools.surgery.combine import combine
from loratools.surgery.resize import resize
from tests.make import tiny
from tests.surgery.combine.test_combine import adapter, best, dense, distance, update


def graded(r: int = 8) -> Adapter:
    """Return an adapter whose singular values are 2·1, 2·1/2, 2·1/4, … in one module and flat in the other."""
    Q = torch.linalg.qr(torch.randn(20, r, generator=torch.Generator().manual_seed(0)))[0]
    steep = update("lora", 2.0, A=Q.T.contiguous(), B=Q * 2.0 ** -torch.arange(r))
    flat = update("lora", 2.0, A=Q.T.contiguous(), B=Q * 0.3)
    return Adapter({"steep": steep, "flat": flat})


RULES: list[tuple[Ranks, int, int]] = [
    # (rule, rank of σ = 1, ½, ¼, … ; rank of eight equal ones), by hand
    (Ranks(Fixed(3)), 3, 3),
    (Ranks(Energy(0.75)), 1, 6),  # Σσ² = 1.33: the first keeps 75.0 %
    (Ranks(Energy(0.76)), 2, 7),
    (Ranks(Ratio(0.2)), 3, 8),
    (Ranks(SvRatio(4.5)), 3, 8),  # σ > σ₁/4.5; kohya's script keeps 4
    (Ranks(SvFro(0.97)), 3, 8),  # share of the norm: √(1 − 4⁻ᵏ) ≥ 0.97 from k = 3 on
    (Ranks(SvCumulative(0.7)), 2, 6),  # (1 + ½)/1.992 = 0.753
    (Ranks(SvRatio(100.0), maximum=4, multiple_of=4), 4, 4),
]


@pytest.mark.parametrize(("ranks", "steep", "flat"), RULES, ids=[repr(rule[0].rule) for rule in RULES])
def test_rules_keep_what_they_say(ranks: Ranks, steep: int, flat: int, tmp_path: Path) -> None:
    source = graded()
    report = resize(source, tmp_path / "small", ranks)
    kept = {share.module: share.rank for share in report.shares}
    assert kept == {"steep": steep, "flat": flat}
    measured = distance(dense(tmp_path / "small"), dense(source))
    assert measured == pytest.approx(best(dense(source), kept), rel=1e-5, abs=1e-7)
    assert report.error == pytest.approx(measured, rel=1e-5)
    for share in report.shares:
        assert share.true_rank == share.given == 8
        assert share.energy == pytest.approx(1 - (share.error / share.norm) ** 2)


def test_a_budget_goes_where_the_energy_is(tmp_path: Path) -> None:
    source = graded()  # each rank costs 40 parameters; σ² are 4, 1, ¼, … and eight times 0.36
    report = resize(source, tmp_path / "small", Ranks(budget=40 * 6 + 39))
    assert {share.module: share.rank for share in report.shares} == {"steep": 2, "flat": 4}
    assert report.parameters == 40 * 6
    with pytest.raises(LoraToolsError, match="too small"):
        resize(source, tmp_path / "none", Ranks(budget=79))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("rank", [4, 9])
def test_the_same_rank_or_more_changes_nothing(rank: int, tmp_path: Path) -> None:
    source = tiny.save_peft(tmp_path / "source", tiny.lora_factors(), use_rslora=True)
    report = resize(source, tmp_path / "same", Ranks(Fixed(rank)))
    assert distance(dense(tmp_path / "same"), dense(source)) < 1e-6
    assert {share.rank for share in report.shares} == {4}


def test_the_true_rank_is_told(tmp_path: Path) -> None:
    twice = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    one = update("lora", 1.0, A=torch.cat([twice, twice]), B=torch.ones(5, 4) * torch.tensor([1.0, 2, 3, 4]))
    report = resize(Adapter({"a": one}), tmp_path / "small", Ranks(Fixed(4)))
    (share,) = report.shares
    assert (share.given, share.true_rank, share.rank) == (4, 1, 1)


def test_what_else_an_adapter_holds_comes_along(tmp_path: Path) -> None:
    head = torch.randn(3, 4)
    source = adapter(0)
    source = Adapter(source.updates, {"lm_head.weight": LazyTensor.of(head)}, source.base, settings={"task_type": "X"})
    resize(source, tmp_path / "small", Ranks(Fixed(1)))
    found = open_adapter(tmp_path / "small")
    assert torch.equal(found.replacements["lm_head.weight"].load(), head)
    assert found.settings["task_type"] == "X"
    assert found.provenance[-1].operation == "resize"


def test_command(shell: Callable, workplace: Path) -> None:
    done = shell(
        "loratools resize adapter --energy 0.5 -o small --modules && loratools inspect small --json", workplace
    )
    assert done.code == 0, done.err
    assert "energy kept" in done.out
    for line, reason in (
        ("resize adapter -o x", "say how ranks"),
        (
            "resize adapter --rank 2 --energy 0.5 -o x",
            "--rank and --energy are different ways to choose ranks; give one",
        ),
        ("resize adapter --energy 2 -o x", "share"),
        ("resize adapter --budget soon -o x", "budget"),
        ("combine adapter other -w 1 -o x", "1 weight for 2"),
        ("combine adapter --max-rank 3 -o x", "need one of"),
    ):
        refused = shell(f"loratools {line}", workplace)
        assert refused.code == 2, line
        assert reason in refused.err
    assert not (workplace / "x").exists()


@pytest.mark.parametrize(
    ("size", "refusal"),
    [(1e-13, "its factors are too small for F16 and would become zero"), (1e15, "its factors have numbers beyond F16")],
)
def test_factors_that_f16_cannot_hold_are_refused_by_name(size: float, refusal: str, tmp_path: Path) -> None:
    """Of a rank that is cut and of a sum alike; BF16 has float32's range, and keeps them."""
    factors = {"A": size * torch.randn(6, 24), "B": size * torch.randn(24, 6)}
    far = Adapter(
        {"far": update("lora", 1.0, **factors), "near": update("lora", 1.0, A=torch.ones(2, 8), B=torch.ones(8, 2))}
    )
    verbs: dict[str, Callable[..., object]] = {
        "resize": lambda out, dtype: resize(far, out, Ranks(Fixed(3)), dtype=dtype),
        "combine": lambda out, dtype: combine([far, far], out, weights=[0.5, 0.25], dtype=dtype),
    }
    for name, verb in verbs.items():
        with pytest.raises(LoraToolsError) as caught:
            verb(tmp_path / name, "F16")
        assert [problem.startswith(f"far: {refusal}") for problem in caught.value.problems] == [True]
        assert not (tmp_path / name).exists()
        verb(tmp_path / name, "BF16")
        assert all(bool(lazy.load().any()) for lazy in open_adapter(tmp_path / name).tensors().values())


def test_blocks_are_kept_and_left_out_by_pattern(tmp_path: Path) -> None:
    names = [f"unet.down_blocks.{i}.attentions.0.proj_{side}" for i in range(3) for side in ("in", "out")]
    parts = {"lora_A.weight": torch.randn(4, 8), "lora_B.weight": torch.randn(6, 4)}
    lazy = {part: LazyTensor.of(tensor) for part, tensor in parts.items()}
    adapter = Adapter({name: kinds.get("lora").build(lazy, 0.5, 2.0) for name in names})
    resize(adapter, tmp_path / "a", 2, include=["*.down_blocks.[01].*"], exclude=["down_blocks.0.attentions.0.proj_in"])
    kept = dialects.open_adapter(tmp_path / "a").updates
    assert sorted(kept) == sorted(names[1:4])
    resize(adapter, tmp_path / "b", 4, exclude=["re:.*proj_out"])
    left = dialects.open_adapter(tmp_path / "b").updates
    assert sorted(left) == sorted(names[::2])
    wanted = 0.5 * parts["lora_B.weight"] @ parts["lora_A.weight"]
    for kept_whole in left.values():
        torch.testing.assert_close(kept_whole.delta_weight(), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(LoraToolsError, match="for nothing"):
        resize(adapter, tmp_path / "c", 2, exclude=["up_blocks"])
    with pytest.raises(InvalidOption) as caught:
        resize(adapter, tmp_path / "c", 2, include="proj_in")
    assert list(caught.value.problems) == ["include is 'proj_in'; it can be a list of patterns, or None"]
