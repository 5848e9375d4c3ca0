"""compare_all: near pairs have the cosine of float64, others one within the error that is stated."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.errors import BadFile, InvalidOption
from loratools.linalg.sketch import SIZE
from loratools.surgery.find import Pairs, compare_all
from loratools.surgery.find.alike import NEIGHBOURS
from tests.make import tiny
from tests.surgery.find.test_find import disturbed, only, variant


def change(folder: Path) -> torch.Tensor:
    """Return ΔW of all modules of a PEFT adapter in one vector, alpha 8 and rank 4, in float64."""
    weights = {name: W.double() for name, W in load_file(folder / "adapter_model.safetensors").items()}
    names = sorted(name for name in weights if "lora_A" in name)
    return torch.cat([(2 * weights[n.replace("lora_A", "lora_B")] @ weights[n]).reshape(-1) for n in names])


def true_cosine(first: Path, second: Path) -> float:
    x, y = change(first), change(second)
    return float(x @ y / (x.norm() * y.norm()))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pairs]:
    """Twelve unlike adapters, and three near the first: 0.02, 0.2 and 0.6 of it away, the last turned round."""
    folder = tmp_path_factory.mktemp("many")
    for seed in range(12):
        tiny.save_peft(folder / f"unlike-{seed:02d}", tiny.lora_factors(seed=seed))
    first = folder / "unlike-00"
    for amount in (0.02, 0.2, 0.6):
        variant(first, folder / f"near-{amount}", disturbed(amount))
    variant(first, folder / "opposite", only("lora_B", lambda W: -W))
    return folder, compare_all(folder, similar=0.9)


def test_near_pairs_have_the_exact_cosine(many: tuple[Path, Pairs]) -> None:
    folder, pairs = many
    near = {(pairs.adapters[i], pairs.adapters[j]) for i, j in pairs.exact}
    assert near == {("near-0.02", "near-0.2"), ("near-0.02", "unlike-00"), ("near-0.2", "unlike-00")}
    for i, j in pairs.exact:
        true = true_cosine(folder / pairs.adapters[i], folder / pairs.adapters[j])
        assert true > 0.9
        assert pairs.cosines[i][j] == pairs.cosines[j][i] == pytest.approx(true, abs=1e-12)
        assert pairs.error(i, j) == pairs.error(j, i) == 0


def test_other_pairs_are_within_the_error_that_is_stated(many: tuple[Path, Pairs]) -> None:
    folder, pairs = many
    count = len(pairs.adapters)
    others = [(i, j) for i in range(count) for j in range(i + 1, count) if (i, j) not in set(pairs.exact)]
    assert pairs.standard_error == 1 / math.sqrt(SIZE)
    off = []
    for i, j in others:
        true = true_cosine(folder / pairs.adapters[i], folder / pairs.adapters[j])
        off.append((pairs.cosines[i][j] - true) / max(pairs.error(i, j), 1e-9))
    assert len(off) > 100
    typical = math.sqrt(sum(x * x for x in off) / len(off))
    assert 0.6 < typical < 1.4  # in standard errors
    assert max(map(abs, off)) < 5


def test_the_table_is_symmetric_with_ones_on_its_diagonal(many: tuple[Path, Pairs]) -> None:
    _, pairs = many
    table = torch.tensor(pairs.cosines, dtype=torch.float64)
    assert torch.equal(table, table.mT)
    assert torch.equal(table.diagonal(), torch.ones(len(table), dtype=torch.float64))
    opposite, first = pairs.adapters.index("opposite"), pairs.adapters.index("unlike-00")
    assert pairs.cosines[opposite][first] == pytest.approx(-1, abs=1e-6)


def test_norms_are_those_of_the_changes(many: tuple[Path, Pairs]) -> None:
    folder, pairs = many
    for name, norm in zip(pairs.adapters, pairs.norms, strict=True):
        assert norm == pytest.approx(float(change(folder / name).norm()), rel=0.35)


def test_rows_begin_with_the_most_alike(many: tuple[Path, Pairs]) -> None:
    _, pairs = many
    rows = pairs.rows()
    assert len(rows) == math.comb(len(pairs.adapters), 2)
    assert (rows[0]["first"], rows[0]["second"], rows[0]["exact"]) == ("near-0.02", "unlike-00", True)
    assert [row["cosine"] for row in rows] == sorted((row["cosine"] for row in rows), reverse=True)


def test_what_the_base_decides_is_left_out_with_the_reason(tmp_path: Path) -> None:
    tiny.save_peft(tmp_path / "plain", tiny.lora_factors())
    variant(tmp_path / "plain", tmp_path / "dora", use_dora=True, change=_with_magnitudes)
    pairs = compare_all(tmp_path)
    assert pairs.adapters == ("plain",)
    assert list(pairs.by_parameters) == ["dora"]
    assert "depend on the base model" in pairs.by_parameters["dora"]


def _with_magnitudes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = dict(weights)
    for name, B in weights.items():
        if "lora_B" in name:
            made[name.replace("lora_B", "lora_magnitude_vector")] = torch.ones(len(B))
    return made


def test_a_folder_without_adapters_and_one_that_is_not_there(tmp_path: Path) -> None:
    assert compare_all(tmp_path).adapters == ()
    with pytest.raises(BadFile):
        compare_all(tmp_path / "nowhere")
    with pytest.raises(InvalidOption, match="similar is 2"):
        compare_all(tmp_path, similar=2)


def test_only_the_nearest_of_each_are_listed_where_they_are_asked_for(many: tuple[Path, Pairs]) -> None:
    folder, every = many
    pairs = compare_all(folder, most=2)
    assert (pairs.most, pairs.cosines, pairs.adapters, pairs.exact) == (2, (), every.adapters, every.exact)
    assert pairs.norms == pytest.approx(every.norms, rel=1e-6)
    assert [value for *_, value in pairs.listed] == sorted((value for *_, value in pairs.listed), reverse=True)
    table = torch.tensor(every.cosines).fill_diagonal_(-1)
    expected = {tuple(sorted((i, j))) for i, row in enumerate(table.topk(2).indices.tolist()) for j in row}
    assert {(i, j) for i, j, _ in pairs.listed} == expected | set(every.exact)
    for i, j, value in pairs.listed:
        assert value == pytest.approx(every.cosines[i][j], abs=1e-6)
        assert pairs.error(i, j) == pytest.approx(every.error(i, j), abs=1e-6)
    assert pairs.rows(3) == pairs.rows()[:3]
    assert [row["first"] for row in pairs.rows(3)] == [row["first"] for row in every.rows(3)]


def test_of_more_than_two_thousand_the_nearest_are_listed(
    many: tuple[Path, Pairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, every = many
    monkeypatch.setattr("loratools.surgery.find.pairs.EVERY", len(every.adapters) - 1)
    assert compare_all(folder).most == NEIGHBOURS
    monkeypatch.setattr("loratools.surgery.find.pairs.EVERY", len(every.adapters))
    assert compare_all(folder).most is None
