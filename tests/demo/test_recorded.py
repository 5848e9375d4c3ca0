"""Recipes of what the tour leaves, and of what is made from it, make the same files again."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.cli._recipes import recipe_of, run_recipe
from loratools.cli._run import run
from loratools.demo.tour import run_demo
from loratools.errors import LoraToolsError
from loratools.recipe.identity import files_of

GIVEN = ("base", "adapter", "quantized", "trained", "unmerged", "wrong-base")
MADE = ("sealed", "merged", "kept", "both", "small", "even", "extracted", "switched", "directly", "plain", "codes",
        "in-16-bit")  # fmt: skip


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "tour"
    run_demo(folder)
    return folder


@pytest.mark.slow
def test_every_output_of_the_tour_is_made_again_by_its_recipe(tour: Path, tmp_path: Path) -> None:
    assert sorted(path.name for path in tour.iterdir()) == sorted(GIVEN + MADE)
    for name in GIVEN:
        with pytest.raises(LoraToolsError, match="no record in it says"):
            recipe_of(tour / name)
    for name in MADE:
        (tmp_path / f"{name}.yaml").write_text(recipe_of(tour / name).yaml, encoding="utf-8")
        run_recipe(tmp_path / f"{name}.yaml", search=tour, folder=tmp_path / name)
        assert files_of(tmp_path / name / name) == files_of(tour / name), name


@pytest.mark.slow
def test_what_is_made_from_the_tour_takes_its_adapters_as_inputs(tour: Path, tmp_path: Path) -> None:
    assert [step["command"] for step in recipe_of(tour / "merged").recipe["steps"].values()] == ["convert", "merge"]
    assert run(["combine", str(tour / "adapter"), str(tour / "small"), "-o", str(tmp_path / "sum")]) == 0
    made = recipe_of(tmp_path / "sum")
    assert [step["command"] for step in made.recipe["steps"].values()] == ["resize", "combine"]
    (tmp_path / "sum.yaml").write_text(made.yaml, encoding="utf-8")
    run_recipe(tmp_path / "sum.yaml", search=tour, folder=tmp_path / "again")
    assert files_of(tmp_path / "again" / "sum") == files_of(tmp_path / "sum")
