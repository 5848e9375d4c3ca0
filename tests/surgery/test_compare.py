"""Comparisons of adapters, against dense matrices in float64 and the formulas of the LoRA paper."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import loratools
from loratools.errors import IncompatibleAdapter
from loratools.surgery.compare import compare
from tests.surgery.models import Lora, lora, random, save_adapter, save_base

SHAPES = {"model.layers.0.q_proj": (32, 24), "model.layers.0.up_proj": (40, 24), "model.layers.1.q_proj": (32, 24)}


def dense(given: Lora, module: str) -> Tensor:
    A, B = given.factors[module]
    return given.alpha / len(A) * B.double() @ A.double()


def phi(one: Tensor, other: Tensor, i: int, j: int) -> float:
    """Return φ(i, j) of §7.2 from orthonormal columns."""
    return float((one[:, :i].T @ other[:, :j]).square().sum()) / min(i, j)


def test_cosines_and_similarities_are_those_of_dense_matrices(tmp_path: Path) -> None:
    first, second = lora(SHAPES, rank=4, seed=1, alpha=8.0), lora(SHAPES, rank=7, seed=2, alpha=3.0)
    found = compare(save_adapter(tmp_path / "a", first), save_adapter(tmp_path / "b", second))
    assert [one.module for one in found.modules] == sorted(SHAPES)
    inner, squares = 0.0, [0.0, 0.0]
    for one in found.modules:
        D1, D2 = dense(first, one.module), dense(second, one.module)
        assert one.cosine == pytest.approx(float((D1 * D2).sum() / D1.norm() / D2.norm()), abs=1e-12)
        assert one.norms == pytest.approx((float(D1.norm()), float(D2.norm())), rel=1e-12)
        (U1, _, V1), (U2, _, V2) = torch.linalg.svd(D1), torch.linalg.svd(D2)
        for i, j in ((1, 1), (2, 5), (4, 7)):
            assert one.input_similarity[i - 1][j - 1] == pytest.approx(phi(V1.T, V2.T, i, j), abs=1e-9)
            assert one.output_similarity[i - 1][j - 1] == pytest.approx(phi(U1, U2, i, j), abs=1e-9)
        assert one.input_overlap == one.input_similarity[3][6]
        assert one.amplification == (None, None)
        inner += float((D1 * D2).sum())
        squares = [squares[0] + float(D1.square().sum()), squares[1] + float(D2.square().sum())]
    assert found.cosine == pytest.approx(inner / math.sqrt(squares[0] * squares[1]), abs=1e-12)
    assert found.distance == pytest.approx(math.sqrt((squares[0] - 2 * inner + squares[1]) / squares[0]), rel=1e-9)


def test_an_adapter_is_like_itself_however_it_is_written(tmp_path: Path) -> None:
    given = lora(SHAPES, rank=3)
    turned = {
        module: (torch.linalg.inv(M) @ A, B @ M)
        for module, (A, B) in given.factors.items()
        for M in [random(3, 3, seed=5) + 3 * torch.eye(3)]
    }
    found = compare(save_adapter(tmp_path / "a", given), save_adapter(tmp_path / "b", Lora(turned)))
    assert found.cosine == pytest.approx(1, abs=1e-10)
    assert found.distance < 1e-5
    for one in found.modules:
        assert one.input_overlap == pytest.approx(1, abs=1e-9)
        assert one.output_overlap == pytest.approx(1, abs=1e-9)


def test_modules_of_one_shape_whose_ranks_differ_are_each_what_they_are(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.q_proj": (32, 24) for i in range(5)}
    first, second = lora(shapes, rank=4, seed=1), lora(shapes, rank=3, seed=2)
    (A, B), (_, zero) = first.factors["model.layers.1.q_proj"], second.factors["model.layers.3.q_proj"]
    B[:, 3] = B[:, 0]
    A[3] = A[1] - A[0]  # three directions, of four columns
    zero.zero_()
    found = compare(save_adapter(tmp_path / "a", first), save_adapter(tmp_path / "b", second)).modules
    assert [one.module for one in found] == list(shapes)
    assert [one.ranks for one in found] == [(4, 3), (3, 3), (4, 3), (4, 0), (4, 3)]
    assert (found[3].cosine, found[3].input_similarity, found[3].norms[1]) == (0, (), 0)
    for one in (*found[:3], found[4]):
        (U1, S1, V1), (U2, _, V2) = (torch.linalg.svd(dense(each, one.module)) for each in (first, second))
        rank = one.ranks[0]
        assert one.norms[0] == pytest.approx(float(S1.norm()), rel=1e-12)
        assert one.input_overlap == pytest.approx(phi(V1.T, V2.T, rank, 3), abs=1e-9)
        assert one.output_overlap == pytest.approx(phi(U1, U2, rank, 3), abs=1e-9)
        cosines = torch.linalg.svdvals(V1[:rank] @ V2[:3].T).clamp(0, 1)
        assert one.input_angles == pytest.approx(cosines.acos().tolist(), abs=1e-7)


def test_random_subspaces_overlap_as_chance_says(tmp_path: Path) -> None:
    shapes = {f"m{i}": (300, 200) for i in range(6)}
    found = compare(*(save_adapter(tmp_path / str(s), lora(shapes, rank=r, seed=s)) for s, r in ((10, 8), (90, 20))))
    inputs = sum(one.input_overlap for one in found.modules) / 6
    assert found.modules[0].chance == (20 / 200, 20 / 300)
    assert inputs == pytest.approx(20 / 200, rel=0.15)


def test_what_one_adapter_alone_changes_counts_in_the_total(tmp_path: Path) -> None:
    both = lora(SHAPES, rank=2)
    part = Lora({"model.layers.0.q_proj": both.factors["model.layers.0.q_proj"]})
    found = compare(save_adapter(tmp_path / "a", both), save_adapter(tmp_path / "b", part))
    norms = {module: float(dense(both, module).norm()) for module in SHAPES}
    assert found.only == (("model.layers.0.up_proj", "model.layers.1.q_proj"), ())
    assert found.modules[0].cosine == pytest.approx(1)
    assert found.cosine == pytest.approx(norms["model.layers.0.q_proj"] / math.hypot(*norms.values()), rel=1e-9)


def test_modules_are_matched_past_wrappers(tmp_path: Path) -> None:
    given = lora(SHAPES, rank=2)
    bare = Lora({module.removeprefix("model."): pair for module, pair in given.factors.items()})
    found = compare(save_adapter(tmp_path / "a", given), save_adapter(tmp_path / "b", bare))
    assert (len(found.modules), found.only) == (3, ((), ()))
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize("fused", [False, True])
def test_amplification_is_that_of_the_paper(tmp_path: Path, fused: bool) -> None:
    parts = ("gate_proj", "up_proj")
    given = lora({f"model.layers.0.mlp.{part}": (20, 12) for part in parts}, rank=3)
    weights = {part: random(20, 12, seed=30 + i) for i, part in enumerate(parts)}
    stored = (
        {"model.layers.0.mlp.gate_up_proj.weight": torch.cat(list(weights.values()))}
        if fused
        else {f"model.layers.0.mlp.{part}.weight": W for part, W in weights.items()}
    )
    base = save_base(tmp_path / "base", stored, model_type="phi3")
    adapter = save_adapter(tmp_path / "a", given)
    for one in compare(adapter, adapter, base).modules:
        U, S, Vh = torch.linalg.svd(dense(given, one.module))
        W = weights[one.module.rpartition(".")[2]].double()
        factor = float(S.norm() / (U[:, :3].T @ W @ Vh[:3].T).norm())
        assert one.amplification == pytest.approx((factor, factor), rel=1e-9)


def test_strangers_and_other_shapes_are_refused(tmp_path: Path) -> None:
    one = save_adapter(tmp_path / "a", lora({"q": (8, 8)}))
    with pytest.raises(IncompatibleAdapter, match="no module in common: the first of each are q and k"):
        compare(one, save_adapter(tmp_path / "b", lora({"k": (8, 8)})))
    with pytest.raises(IncompatibleAdapter) as caught:
        compare(one, save_adapter(tmp_path / "c", lora({"q": (8, 6)})))
    assert "q: [8, 8] in the first, [8, 6] in the second" in str(caught.value)


def test_rows_are_plain_and_make_a_frame(prepared: Path) -> None:
    found = {
        "compare": loratools.compare(prepared / "adapter", prepared / "other", prepared / "base"),
        "spectrum": loratools.spectrum(prepared / "adapter"),
        "certify": loratools.certify(prepared / "merged", prepared / "base", prepared / "adapter"),
    }
    for measured in found.values():
        assert json.loads(json.dumps(measured.rows())) == measured.rows()
        assert len(measured.rows()) == 4
    one, module = found["compare"].rows()[1], found["compare"].modules[1]
    assert (one["module"], one["norm_2"], one["cosine"]) == (module.module, module.norms[1], module.cosine)
    assert (one["input_chance"], one["output_overlap"]) == (module.chance[0], module.output_overlap)
    assert found["spectrum"].rows()[0]["needed_0.99"] == found["spectrum"].modules[0].needed[0]
    assert found["certify"].rows()[0]["optimal"] == found["certify"].optimal[0]
    pandas = pytest.importorskip("pandas")
    for measured in found.values():
        frame = pandas.DataFrame(measured.rows())
        assert frame.shape == (4, len(measured.rows()[0]))
        assert list(frame["module"]) == [row["module"] for row in measured.rows()]
