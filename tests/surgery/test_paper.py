"""What §7 of the LoRA paper shows, against its formulas in numpy's float64: φ of A alone, the control, Table 7."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loratools.errors import InvalidOption
from loratools.linalg.similarity import random_directions
from loratools.surgery.compare import compare
from loratools.surgery.paper import seed_of
from tests.surgery.models import Lora, lora, random, save_adapter, save_base

SHAPES = {"model.layers.0.q_proj": (32, 24), "model.layers.1.v_proj": (16, 24)}
FIRST, SECOND = lora(SHAPES, rank=4, seed=1, alpha=8.0), lora(SHAPES, rank=7, seed=2, alpha=3.0)
WEIGHTS = {f"{module}.weight": random(*shape, seed=60 + i) for i, (module, shape) in enumerate(SHAPES.items())}

Matrix = np.ndarray[Any, np.dtype[np.float64]]


def factors(given: Lora, module: str) -> tuple[Matrix, Matrix]:
    """Return s·B and A in float64."""
    A, B = given.factors[module]
    return given.alpha / len(A) * B.double().numpy(), A.double().numpy()


def phi(V1: Matrix, V2: Matrix, i: int, j: int) -> float:
    """Return §7.2's φ(i, j) of rows."""
    return float(np.linalg.norm(V1[:i] @ V2[:j].T) ** 2 / min(i, j))


def right(M: Matrix) -> Matrix:
    return np.linalg.svd(M, full_matrices=False)[2]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "first", FIRST)
    save_adapter(tmp_path / "second", SECOND)
    save_base(tmp_path / "base", WEIGHTS, model_type="llama")
    return tmp_path


def test_controls_of_modules_are_draws_of_their_own(work: Path) -> None:
    for seed in (0, 5):
        first, second = (one.paper for one in compare(work / "first", work / "second", paper=True, seed=seed).modules)
        assert first is not None
        assert second is not None
        assert first.control != second.control  # of two modules with 24 columns each
        again = compare(work / "first", work / "second", paper=True, seed=seed).modules[0].paper
        assert again == first


@pytest.mark.parametrize("seed", [0, 5])
def test_a_alone_and_its_control(work: Path, seed: int) -> None:
    for one in compare(work / "first", work / "second", paper=True, seed=seed).modules:
        beside = one.paper
        assert beside is not None
        A1, A2 = (factors(given, one.module)[1] for given in (FIRST, SECOND))
        own = seed_of(seed, one.module)
        generated = [random_directions(rank, 24, own, draw).numpy() for draw, rank in ((0, 4), (1, 7))]
        for i in range(1, 5):
            for j in range(1, 8):
                assert beside.factor_similarity[i - 1][j - 1] == pytest.approx(
                    phi(right(A1), right(A2), i, j), abs=1e-12
                )
                assert beside.control[i - 1][j - 1] == pytest.approx(phi(*generated, i, j), abs=1e-12)
        # At full rank A and B·A have the same rows, which are taken in another order before.
        assert beside.factor_similarity[-1][-1] == pytest.approx(one.input_similarity[-1][-1], abs=1e-12)
        assert abs(beside.factor_similarity[0][0] - one.input_similarity[0][0]) > 1e-4
        assert beside.projections == (None, None)


def test_the_columns_of_table_7(work: Path) -> None:
    found = compare(work / "first", work / "second", work / "base", paper=True, seed=3)
    for one in found.modules:
        assert one.paper is not None
        W = WEIGHTS[f"{one.module}.weight"].double().numpy()
        for side, given in enumerate((FIRST, SECOND)):
            B, A = factors(given, one.module)
            row, r = one.paper.projections[side], len(A)
            assert row is not None
            U, S, Vh = np.linalg.svd(B @ A)
            UW, _, VW = np.linalg.svd(W)
            own, sides = seed_of(3, one.module), ((2, W.shape[0]), (3, W.shape[1]))
            U0, V0 = (random_directions(r, size, own, draw).numpy() for draw, size in sides)
            of_update = np.linalg.norm(U[:, :r].T @ W @ Vh[:r].T)
            assert row.rank == r
            assert row.weight_norm == pytest.approx(np.linalg.norm(W), rel=1e-12)
            assert row.update_norm == pytest.approx(np.linalg.norm(S), rel=1e-12)
            assert row.of_update == pytest.approx(of_update, rel=1e-9)
            assert row.of_weight == pytest.approx(np.linalg.norm(UW[:, :r].T @ W @ VW[:r].T), rel=1e-9)
            assert row.of_random == pytest.approx(np.linalg.norm(U0 @ W @ V0.T), rel=1e-12)
            assert row.amplification == pytest.approx(np.linalg.norm(S) / of_update, rel=1e-9)
            assert row.amplification == pytest.approx(one.amplification[side], rel=1e-12)
            assert row.of_weight > row.of_update


def test_directions_that_w_has_strongly_are_not_amplified(work: Path) -> None:
    """An adapter along W's own leading directions: both columns are one, and the factor is ‖ΔW‖/‖W_r‖."""
    along = {}
    for module in SHAPES:
        U, S, Vh = torch.linalg.svd(WEIGHTS[f"{module}.weight"].double())
        along[module] = (Vh[:3].float().contiguous(), (U[:, :3] * S[:3] * 0.5).float().contiguous())
    save_adapter(work / "along", Lora(along, alpha=3.0))
    for one in compare(work / "along", work / "along", work / "base", paper=True).modules:
        assert one.paper is not None
        row = one.paper.projections[0]
        assert row is not None
        assert row.of_update == pytest.approx(row.of_weight, rel=1e-6)
        assert row.amplification == pytest.approx(0.5, rel=1e-6)


def test_a_long_weight_has_its_leading_directions_from_an_iteration(tmp_path: Path) -> None:
    W, given = random(700, 600, seed=9), lora({"m": (700, 600)}, rank=5)
    save_base(tmp_path / "base", {"m.weight": W})
    save_adapter(tmp_path / "a", given)
    (one,) = compare(tmp_path / "a", tmp_path / "a", tmp_path / "base", paper=True).modules
    assert one.paper is not None
    row = one.paper.projections[0]
    assert row is not None
    assert row.of_weight == pytest.approx(float(np.linalg.norm(np.linalg.svd(W.double().numpy())[1][:5])), rel=1e-5)


def test_nothing_is_measured_of_an_update_that_is_zero(work: Path) -> None:
    zero = {module: (A, B * 0) for module, (A, B) in FIRST.factors.items()}
    save_adapter(work / "zero", Lora(zero))
    for one in compare(work / "zero", work / "second", work / "base", paper=True).modules:
        assert one.paper is not None
        assert one.paper.projections[0] is None
        assert one.paper.projections[1] is not None
        assert one.paper.control == ()
        assert one.paper.factor_similarity  # A is there, though B·A is 0


def test_what_is_not_asked_for_is_not_measured(work: Path) -> None:
    assert all(one.paper is None for one in compare(work / "first", work / "second", work / "base").modules)
    with pytest.raises(InvalidOption, match="seed is -1"):
        compare(work / "first", work / "second", paper=True, seed=-1)


def test_the_command_gives_them_in_text_and_in_json(shell: Callable[..., Any], work: Path) -> None:
    line = "loratools compare first second --base base --paper --seed 3"
    done = shell(line, work)
    assert done.code == 0, done.err
    assert "phi of A alone" in done.out
    assert "as in Table 7" in done.out
    document = json.loads(shell(f"{line} --json", work).out)
    expected = compare(work / "first", work / "second", work / "base", paper=True, seed=3)
    for data, one in zip(document["modules"], expected.modules, strict=True):
        assert one.paper is not None
        assert one.paper.projections[1] is not None
        row = data["paper"]["projections"][1]
        assert row == pytest.approx({name: getattr(one.paper.projections[1], name) for name in row}, rel=1e-12)
        assert np.allclose(data["paper"]["factor_similarity"], one.paper.factor_similarity)
        assert math.isclose(data["paper"]["control"][-1][-1], one.paper.control[-1][-1])
        grid = shell(f"{line} --grid {one.module}", work).out
        assert f"A alone of {one.module}: phi(i, j)" in grid
        assert f"random control of {one.module}: phi(i, j)" in grid
    misuse = shell("loratools compare first second --seed 3", work)
    assert (misuse.code, "--seed draws what --paper" in misuse.err) == (2, True)
