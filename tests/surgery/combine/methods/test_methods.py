"""Each method on matrices of 2 x 3, worked out by hand from the definition in its paper, and what chance must obey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.errors import InvalidOption, LoraToolsError, UnknownKind
from loratools.linalg.ranks.allocate import Ranks
from loratools.linalg.ranks.rules import Fixed
from loratools.surgery.combine import combine, methods
from loratools.surgery.combine.methods import _deltas
from loratools.surgery.combine.methods._chance import Seeded
from loratools.surgery.combine.methods._deltas import Deltas, largest
from loratools.surgery.combine.methods._terms import MethodOptions, Term
from loratools.surgery.combine.methods.della import probabilities
from tests.surgery.combine.test_combine import adapter, best, dense, distance

X1 = torch.tensor([[4.0, -3.0, 0.5], [2.0, 1.0, -6.0]])
X2 = torch.tensor([[1.0, 5.0, 0.25], [-3.0, 2.0, -4.0]])
X3 = torch.tensor([[-2.0, -4.0, 8.0], [1.0, 7.0, 0.5]])


class Fair:
    """Keeps what a fixed mask says, to see what a method does with it."""

    def __init__(self, masks: Sequence[list[list[int]]]) -> None:
        self.masks = list(masks)

    def keep(self, term: Term, tile: int, probability: Tensor) -> Tensor:
        return torch.tensor(self.masks.pop(0)).bool()


def term(weight: float, X: Tensor, name: str = "") -> Term:
    return Term(weight, torch.eye(2, dtype=torch.float64), X.double(), name)


def merging(method: str) -> Any:
    """Return what merges the terms of one module; linear has none, for its terms stand side by side."""
    return methods.get(method).merge


def run(method: str, *terms: tuple[float, Tensor], chance: Any = None, **options: Any) -> Tensor:
    found = merging(method)([term(*pair) for pair in terms], MethodOptions(**options), chance or Seeded(0))
    return found[0] @ found[1] if isinstance(found, tuple) else found


def equal(found: Tensor, expected: list[list[float]]) -> bool:
    return torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_magnitude_prune() -> None:
    # Half of six elements stay: -6, 4, -3 of the first, 5, -4, -3 of the second.
    found = run("magnitude_prune", (1, X1), (2, X2), density=0.5)
    assert equal(found, [[4, -3 + 2 * 5, 0], [2 * -3, 0, -6 + 2 * -4]])


def test_ties() -> None:
    # Trimmed: [4 -3 0; 0 0 -6], [0 5 0; -3 0 -4], [0 -4 8; 0 7 0]. Sums: 4, -2, 8; -3, 7, -10.
    found = run("ties", (1, X1), (1, X2), (1, X3), density=0.5)
    assert equal(found, [[4, (-3 - 4) / 2, 8], [-3, 7, (-6 - 4) / 2]])


def test_ties_elects_by_what_is_added_and_peft_by_what_came_in() -> None:
    # Weighted elements -1·4 + 1·1 and so on: the sign of the sum of these, against that of 4 + 1.
    one, other = torch.tensor([[4.0, -3.0, 2.0], [1.0, 1.0, 1.0]]), torch.tensor([[1.0, 5.0, -2.0], [1.0, 1.0, 1.0]])
    ours = run("ties", (-1, one), (1, other), density=1)
    assert equal(ours, [[-4, (3 + 5) / 2, (-2 - 2) / 2], [0, 0, 0]])  # -1 and 1 cancel: nothing is elected
    theirs = run("ties", (-1, one), (1, other), density=1, like="peft")
    assert equal(theirs, [[(-4 + 1) / 2, 5, -2], [0, 0, 0]])  # 4+1 > 0: both; -3+5 > 0: 5; 2-2: + by decree, so the 2


def test_dare_rescales_what_it_keeps() -> None:
    masks = [[[1, 0, 1], [0, 1, 0]], [[0, 1, 1], [0, 0, 1]]]
    found = run("dare", (1, X1), (-2, X2), density=0.25, chance=Fair(masks))
    assert equal(found, [[16, -40, 2 - 2], [0, 4, 32]])


def test_dare_ties() -> None:
    masks = [[[1, 1, 0], [1, 1, 0]], [[1, 1, 1], [1, 0, 1]]]
    found = run("dare_ties", (1, X1), (1, X2), density=0.5, chance=Fair(masks))
    assert equal(found, [[(8 + 2) / 2, 10, 0.5], [-6, 2, -8]])


def test_della_keeps_large_elements_more_often_and_divides_by_the_chance() -> None:
    chances = probabilities(X1, 0.5, 0.2)
    assert equal(chances, [[0.7, 0.5, 0.3], [0.5, 0.3, 0.7]])
    masks = [[[1, 1, 0], [1, 1, 0]], [[1, 0, 1], [1, 1, 1]]]
    found = run("della", (1, X1), (1, X2), density=0.5, epsilon=0.2, chance=Fair(masks))
    # Of X2 the chances are [.5 .7 .3; .5 .3 .7].
    first, second = [4 / 0.7, -3 / 0.5, 0, 2 / 0.5, 1 / 0.3, 0], [1 / 0.5, 0, 0.25 / 0.3, -3 / 0.5, 2 / 0.3, -4 / 0.7]
    expected = [
        [(first[0] + second[0]) / 2, first[1], second[2]],
        [second[3], (first[4] + second[4]) / 2, second[5]],
    ]
    assert equal(found, expected)
    with pytest.raises(LoraToolsError, match="probabilities"):
        run("della", (1, X1), density=0.9, epsilon=0.2)


def test_ties_like_mergekit_divides_by_the_weights() -> None:
    # Trimmed as above; weighted by 1, 3 and 2: [4 -3 0; 0 0 -6], [0 15 0; -9 0 -12], [0 -8 16; 0 14 0].
    weighted = (1, X1), (3, X2), (2, X3)
    found = run("ties", *weighted, density=0.5, like="mergekit")
    assert equal(found, [[4, 5, 8], [-3, 7, -18 / 4]])
    found = run("ties", *weighted, density=0.5, like="mergekit", normalize=False)
    assert equal(found, [[4, 15, 16], [-9, 14, -18]])
    # Of one that keeps -6 and 4 of 16.5 in all, what is left has that norm again.
    assert equal(run("ties", (1, X1), density=0.34, like="mergekit", rescale=True), [[6.6, 0, 0], [0, 0, -9.9]])
    assert equal(run("ties", (1, X1), density=0.01, like="mergekit"), [[0, 0, 0], [0, 0, -6]])  # one stays
    # Where the sum is 0 the elected sign is +, and the weights of an election may add up to 0.
    assert equal(run("ties", (1, X1), (-1, X1), density=1, like="mergekit", normalize=False), (X1.abs()).tolist())


def test_dare_and_della_like_mergekit_keep_the_l1_norm() -> None:
    masks = [[[1, 0, 1], [0, 1, 0]], [[0, 1, 1], [0, 0, 1]]]
    kept = [X * torch.tensor(mask) for X, mask in zip((X1, X2), masks, strict=True)]
    one, other = (X.abs().sum() / left.abs().sum() * left for X, left in zip((X1, X2), kept, strict=True))
    twice = [mask for mask in masks for _ in (0, 1)]  # once for the norm, once for the result
    order = [twice[0], twice[2], twice[1], twice[3]]
    linear = (one - 2 * other).tolist()
    for method, more in (("dare", {}), ("della_linear", {"epsilon": 0.2})):
        found = run(method, (1, X1), (-2, X2), density=0.5, like="mergekit", chance=Fair(order), **more)
        assert equal(found, linear)
    assert equal(run("dare", (1, X1), (-2, X2), density=0.5, like="mergekit", rescale=False, chance=Fair(masks)),
                 (kept[0] - 2 * kept[1]).tolist())  # fmt: skip
    weights = torch.tensor([1.0, 2.0])[:, None, None]
    both = torch.stack([one, other]) * weights
    elected = both.sign() == torch.where(both.sum(0) >= 0, 1.0, -1.0)
    total, share = (both * elected).sum(0), (weights * elected).sum(0)
    for method, divided, more in (("dare_ties", False, {}), ("della", True, {"epsilon": 0.2})):
        found = run(method, (1, X1), (2, X2), density=0.5, like="mergekit", chance=Fair(order), **more)
        assert equal(found, (total / torch.where(share == 0, 1.0, share) if divided else total).tolist())
    assert equal(run("dare", (1, X1), (-2, X2), density=1, like="mergekit"), (X1 - 2 * X2).tolist())


def test_della_linear() -> None:
    masks = [[[1, 1, 0], [1, 1, 0]]]
    found = run("della_linear", (2, X1), density=0.5, epsilon=0.2, chance=Fair(masks))
    assert equal(found, [[2 * 4 / 0.7, 2 * -3 / 0.5, 0], [2 * 2 / 0.5, 2 * 1 / 0.3, 0]])


def test_breadcrumbs_drops_both_ends() -> None:
    # Of six: the largest goes (gamma 1/6), the next three stay: 4, -3, 2 of the first; -4, -3, 2 of the second.
    found = run("breadcrumbs", (1, X1), (2, X2), density=0.5, gamma=0.17)
    assert equal(found, [[4, -3, 0], [2 + 2 * -3, 2 * 2, 2 * -4]])
    # Where there are too few elements, fewer outliers go.
    assert equal(run("breadcrumbs", (1, X1), density=1, gamma=0.5), X1.tolist())


def test_sce() -> None:
    one, other = torch.tensor([[4.0, 1.0, 3.0], [0.0, 2.0, 1.0]]), torch.tensor([[2.0, 1.0, -3.0], [0.0, 1.0, -4.0]])
    # Variances 1, 0, 9; 0, 1/4, 25/4. Half of the four that differ are selected: 3 | -3 and 1 | -4.
    # Energies 9 + 1 and 9 + 16, so c = 10/35 and 25/35; sums 0 (counts as +) and -3.
    found = run("sce", (1, one), (1, other), density=0.5)
    assert equal(found, [[0, 0, 3], [0, 0, -4]])
    # Without selection: energies 31 and 31, so it is the mean of those of the elected sign.
    assert equal(run("sce", (1, one), (1, other), density=1), [[3, 1, 3], [0, 1.5, -4]])
    with pytest.raises(LoraToolsError, match="leave them out"):
        run("sce", (2, one), (1, other), density=1)


def oracle_ties(X: Tensor, density: float) -> Tensor:
    """TIES of stacked matrices, sorted the plain way."""
    kept = int(density * X[0].numel())
    cut = X.abs().flatten(1).sort(1, descending=True).values[:, kept - 1]
    X = X * (X.abs() >= cut[:, None, None])
    agree = (X.sign() == X.sum(0).sign()) & (X != 0)
    return (X * agree).sum(0) / agree.sum(0).clamp_min(1)


def low_rank(seed: int, m: int = 7, n: int = 5, r: int = 2) -> Term:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, r), (r, n)))
    return Term(1.0, left, right)


def test_knots_is_ties_between_the_right_factors_of_one_dense_svd() -> None:
    terms = [low_rank(0), low_rank(1)]
    deltas = [t.left @ t.right for t in terms]
    U, S, Vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
    k = int((S > 1e-9).sum())
    expected = (U[:, :k] * S[:k]) @ oracle_ties(torch.stack(Vh[:k].chunk(2, 1)), 0.6)
    left, right = merging("knots")(terms, MethodOptions(density=0.6), Seeded(0))
    assert left.shape[1] == k == 4
    assert torch.allclose(left @ right, expected, atol=1e-10)


def test_core_space_is_lossless_and_merges_the_cores() -> None:
    terms = [low_rank(3), low_rank(4)]
    deltas = [t.left @ t.right for t in terms]
    left, right = merging("core_space")(terms[:1], MethodOptions(density=1), Seeded(0))
    assert torch.allclose(left @ right, deltas[0], atol=1e-10)
    left, right = merging("core_space")(terms, MethodOptions(density=0.5), Seeded(0))
    V = torch.linalg.svd(torch.cat([_balanced(D)[1].T for D in deltas], 1), full_matrices=False)[0]
    U = torch.linalg.svd(torch.cat([_balanced(D)[0] for D in deltas], 1), full_matrices=False)[0]
    # Singular vectors have a sign of their own; TIES on cores does not depend on it.
    expected = U @ oracle_ties(torch.stack([U.T @ D @ V for D in deltas]), 0.5) @ V.T
    assert torch.allclose(left @ right, expected, atol=1e-9)


def _balanced(D: Tensor, r: int = 2) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(D)
    return U[:, :r] * S[:r].sqrt(), S[:r].sqrt()[:, None] * Vh[:r]


@pytest.mark.parametrize("method", ["knots", "core_space", "ties", "magnitude_prune", "breadcrumbs"])
def test_at_full_density_of_one_adapter_nothing_changes(method: str) -> None:
    one = low_rank(5)
    options = MethodOptions(density=1, gamma=0) if method == "breadcrumbs" else MethodOptions(density=1)
    found = merging(method)([one], options, Seeded(0))
    D = found[0] @ found[1] if isinstance(found, tuple) else found.double()
    assert torch.allclose(D, one.left @ one.right, atol=1e-5)


def test_the_count_largest_element_is_found_exactly() -> None:
    X = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)) ** 5
    X[3] = 0
    X[4] = X[5]  # ties
    ordered = X.abs().flatten().sort(descending=True).values
    counts = [0, 1, 2, 500, X.numel() - 33, X.numel() - 32, X.numel()]
    found = largest(lambda: X.split(7), counts)
    assert found == (float("inf"), *(float(ordered[count - 1]) for count in counts[1:]))


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_all() -> list[Tensor]:
        terms = [low_rank(0, 40, 30), low_rank(1, 40, 30)]
        return [merging(name)(terms, MethodOptions(density=0.3), Seeded(0)) for name in ("ties", "breadcrumbs", "sce")]

    whole = run_all()
    monkeypatch.setattr(_deltas, "TILE", 70)
    assert Deltas([low_rank(0, 40, 30)]).step == 2
    for one, tiled in zip(whole, run_all(), strict=True):
        assert torch.allclose(one, tiled, atol=1e-6)


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_chance_is_seeded_and_recorded(method: str, tmp_path: Path) -> None:
    adapters = [adapter(0), adapter(9)]

    def run_once(name: str, seed: int | None, order: int = 1, threads: int = 2) -> Path:
        report = combine(adapters[::order], tmp_path / name, method=method, density=0.5, seed=seed, threads=threads)
        assert report.seed == (seed or 0)
        return tmp_path / name

    first = run_once("first", 5)
    assert distance(dense(run_once("again", 5, threads=1)), dense(first)) == 0
    assert distance(dense(run_once("turned", 5, order=-1)), dense(first)) < 1e-6
    assert distance(dense(run_once("other", 6)), dense(first)) > 0.1
    from loratools.dialects import open_adapter

    step = open_adapter(first).provenance[-1]
    assert (step.seed, step.parameters["method"], step.parameters["density"]) == (5, method, 0.5)


def test_draws_are_fair() -> None:
    probability = torch.full((100, 100), 0.3)
    masks = [Seeded(0).keep(term(1, X1, name), tile, probability) for name in "ab" for tile in (0, 1)]
    for mask in masks:
        assert float(mask.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float((masks[0] & masks[1]).float().mean()) == pytest.approx(0.09, abs=0.02)
    assert float((masks[0] & masks[2]).float().mean()) == pytest.approx(0.09, abs=0.02)


@pytest.mark.parametrize("method", sorted(set(methods.names()) - {"linear"}))
def test_the_rank_that_is_asked_for_and_the_error_that_is_printed(method: str, tmp_path: Path) -> None:
    adapters = [adapter(0), adapter(9)]
    full = combine(adapters, tmp_path / "full", method=method, density=0.7, ranks=Ranks(Fixed(99)))
    target = dense(tmp_path / "full")
    report = combine(adapters, tmp_path / "small", method=method, density=0.7, ranks=Ranks(Fixed(2)))
    assert {share.rank for share in report.shares} == {2}
    assert full.error < 1e-6
    measured = distance(dense(tmp_path / "small"), target)
    assert report.error == pytest.approx(measured, rel=1e-4)
    assert measured == pytest.approx(best(target, dict.fromkeys(target, 2)), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("ties", {}, "needs a density"),
        ("linear", {"density": 0.5}, "takes no density"),
        ("ties", {"density": 0.5, "seed": 1}, "takes no seed"),
        ("della", {"density": 0.5, "like": "peft"}, "no della of peft"),
        ("sce", {"density": 0.5, "like": "mergekit"}, "no sce of mergekit"),
        ("ties", {"density": 0.5, "normalize": False}, "normalize is False, which is for what is like mergekit"),
        ("breadcrumbs", {"gamma": 0.1, "epsilon": 0.1}, "takes no epsilon; it needs a density"),
    ],
)
def test_options_that_a_method_does_not_take(method: str, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(LoraToolsError, match=reason):
        combine(adapter(0), tmp_path / "x", method=method, **options)


def test_every_option_out_of_range_is_named() -> None:
    with pytest.raises(InvalidOption) as caught:
        MethodOptions(density=1.5, gamma=1, seed=-1, like="kohya", rescale=True)  # type: ignore[arg-type]
    assert caught.value.problems == (
        "density is 1.5; it is a share of elements, above 0 and at most 1",
        "gamma is 1; it is a share of elements, at least 0 and below 1",
        "seed is -1; it lies between 0 and 2^53 - 1",
        "like is 'kohya'; it can be peft or mergekit",
        "rescale is True, which is for what is like mergekit",
    )


def test_options_of_a_wrong_type_are_named() -> None:
    with pytest.raises(InvalidOption) as caught:
        MethodOptions(density="x", gamma=True, epsilon=float("nan"), seed=0.5)  # type: ignore[arg-type]
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "density is 'x'", "gamma is True", "epsilon is nan", "seed is 0.5",
    ]  # fmt: skip


def test_words_that_do_not_exist_are_answered_with_the_list(tmp_path: Path) -> None:
    with pytest.raises(InvalidOption) as caught:
        combine(adapter(0), tmp_path / "x", method="tie", dtype="int8", ranks=0, check_base="no")  # type: ignore[arg-type]
    method, base, dtype, ranks = caught.value.problems
    assert method == f"method is 'tie'; it can be {', '.join(methods.names()[:-1])} or ties; did you mean ties?"
    assert base == "check_base is 'no'; it can be strict, warn or off"
    assert dtype.endswith("it can be bf16, f16, f32 or f64")
    assert ranks == "ranks: a rank must be at least 1, not 0"
    assert not (tmp_path / "x").exists()
    with pytest.raises(InvalidOption, match="noise is that of a fine-tune"):
        combine(adapter(0), tmp_path / "x", ranks=Ranks(noise=True))


def test_every_method_says_what_it_is() -> None:
    for name in methods.names():
        method = methods.get(name)
        assert method.SUMMARY
        assert {"density", "gamma", "epsilon", "seed"} >= method.OPTIONS
    with pytest.raises(UnknownKind, match="ties"):
        methods.get("merge_all")
