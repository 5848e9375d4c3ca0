"""The proof in NumPy says what the proof in C says, and shares nothing with what merges."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from loratools.linalg.native import proof
from loratools.storage.codecs.floats import narrow, unsigned
from loratools.surgery.verify import formulas, verify
from tests.conftest import REPOSITORY
from tests.surgery import models
from tests.surgery.models import DTYPES, lora, random, save_adapter, save_base

DTYPES_OF_C = sorted(proof.DTYPES)


def bits(shape: tuple[int, int], dtype: str, seed: int) -> formulas.Array:
    """Return the bits of normal numbers, a NaN and an infinity among them."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    values[0, 0], values[-1, -1] = np.nan, np.inf
    return narrow(values, dtype)


@pytest.mark.skipif(not proof.available(), reason="installed without a C compiler")
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("after", DTYPES_OF_C)
@pytest.mark.parametrize("before", DTYPES_OF_C)
def test_measures_are_those_of_c(before: str, after: str, across: bool) -> None:
    W, result = bits((21, 50), before, 0), bits((21, 50), after, 1)
    W[0, 0] = W[-1, -1] = result[0, 0] = result[-1, -1] = 0
    sides = (21, 50) if across else (50, 21)
    X = np.random.default_rng(2).standard_normal((sides[0], 16))
    Y = [np.ones((sides[1], 16)) for _ in range(2)]
    found = [
        formulas.measure(W, result, (before, after), X, products, across=across, native=native)
        for native, products in zip((True, False), Y, strict=True)
    ]
    assert found[0][1] == found[1][1]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-14)
    np.testing.assert_allclose(Y[0], Y[1], rtol=0, atol=1e-12)


@pytest.mark.skipif(not proof.available(), reason="installed without a C compiler")
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("after", DTYPES_OF_C)
@pytest.mark.parametrize("before", DTYPES_OF_C)
def test_comparisons_are_those_of_c(before: str, after: str, ties: bool) -> None:
    """Of all elements, of some columns, of some rows; NaN and infinity among them."""
    W = bits((21, 50), before, 0)
    change = 0.01 * np.random.default_rng(1).standard_normal((21, 50))
    wide = (W.astype(np.uint32) << 16).view(np.float32) if before == "BF16" else W.view(f"<f{W.itemsize}")
    result = narrow((wide + change).astype(np.float32), after)
    result = (result + np.random.default_rng(2).integers(-1, 2, result.shape)).astype(unsigned(after))
    rule = formulas.Rule(ties, 0.04, 2.0**-21 if ties else 2.0**-8, smallest=2.0**-24, terms=0.0 if ties else 2.0**-21)
    some = np.array([0, 3, 17, 20], np.uint32)
    for places, part in (({}, change), ({"rows": some}, change[some]), ({"columns": some}, change[:, some])):
        in_c, in_numpy = (
            formulas.compare(W, result, (before, after), part, rule, native=native, **places)
            for native in (True, False)
        )
        assert (in_c.wrong, in_c.far) == (in_numpy.wrong, in_numpy.far)
        assert 0 < in_c.far <= in_c.wrong
        assert in_c.total == pytest.approx(in_numpy.total)


@pytest.fixture
def without_c(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Let no proof be compiled."""
    monkeypatch.setattr(proof, "LIBRARY", tmp_path / "libproof.so")
    proof._library.cache_clear()
    yield
    monkeypatch.undo()
    proof._library.cache_clear()


@pytest.mark.usefixtures("without_c")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_without_a_compiler_the_verdicts_are_the_same(dtype: str, exact: bool, tmp_path: Path) -> None:
    assert not proof.available()
    weights = {"a.weight": random(128, 96, scale=0.05, dtype=DTYPES[dtype]), "norm.weight": random(96)}
    given = lora({"a": (128, 96)}, scale=0.06)
    right = models.merged(weights, [given])
    wrong = right | {"a.weight": (weights["a.weight"].double() + 1.2 * given.delta("a")).to(DTYPES[dtype])}
    spoiled = right | {"a.weight": right["a.weight"].clone()}
    spoiled["a.weight"][3, 5] = float("nan")
    base, adapter = save_base(tmp_path / "base", weights), save_adapter(tmp_path / "adapter", given)
    for name, model in (("right", right), ("wrong", wrong), ("spoiled", spoiled)):
        account = verify(save_base(tmp_path / name, model), base, adapter, exact=exact, seed=4)
        assert account.ok is (name == "right")
        mismatched = account.checked[0].mismatched
        assert (mismatched is None) is not exact
        if exact:
            assert (mismatched or 0) > 1000 if name == "wrong" else mismatched == (name == "spoiled")


def test_accounts_with_and_without_c_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a.weight": random(128, 96, scale=0.05, dtype=torch.bfloat16)}
    given = lora({"a": (128, 96)}, scale=0.06)
    paths = (
        save_base(tmp_path / "model", models.merged(weights, [given])), save_base(tmp_path / "base", weights),
        save_adapter(tmp_path / "adapter", given),
    )  # fmt: skip
    (here,) = verify(*paths, seed=1).checked
    monkeypatch.setattr(proof, "LIBRARY", tmp_path / "libproof.so")
    proof._library.cache_clear()
    (there,) = verify(*paths, seed=1).checked
    monkeypatch.undo()
    proof._library.cache_clear()
    assert (here.within, here.mismatched) == (there.within, there.mismatched)
    for field in ("error", "error_of_weight", "applied", "bound"):
        assert getattr(here, field) == pytest.approx(getattr(there, field), rel=1e-9)


def arrows(file: Path) -> Iterator[str]:
    """Yield what a file imports, modules and names of modules."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_proof_has_no_code_of_a_merge() -> None:
    """Neither the engine's arithmetic nor its C; the C of the proof includes no header of another."""
    engine = ("arithmetic", "coded", "load", "residual", "run", "stochastic", "task", "tensor", "turns")
    forbidden = [f"loratools.engine.{name}" for name in engine] + ["loratools.linalg"]
    native = REPOSITORY / "loratools" / "linalg" / "native"
    files = [*(REPOSITORY / "loratools" / "surgery" / "verify").glob("*.py"), native / "proof.py"]
    assert len(files) > 5
    for file in files:
        shared = [name for name in arrows(file) if any(f"{name}.".startswith(f"{one}.") for one in forbidden)]
        assert {".".join(name.split(".")[:4]) for name in shared} <= {"loratools.linalg.native.proof"}, file
    for source in ("proof.c", "proof.h", "passes.h"):
        assert set(re.findall(r'#include "(.*)"', (native / source).read_text(encoding="utf-8"))) <= {
            "proof.h",
            "passes.h",
        }
