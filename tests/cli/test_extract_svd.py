"""extract-svd, compare, inspect --spectrum and verify --certificate on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

EXTRACT = "loratools extract-svd base tuned -o out"


def run(shell: Callable, line: str, folder: Path) -> dict:
    """Run a line with --json and return its document."""
    done = shell(f"{line} --json", folder)
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--rank 4 --energy 0.9", "--rank and --energy are different ways to choose ranks; give one"),
        ("--energy 1.5", "energy is a share"),
        ("--budget much", "'much' is no budget: write 20M parameters, or 64MB"),
        ("--min-rank 9 --max-rank 4", "ranks between 9 and 4"),
        ("--rank 0", "0 is not in the range"),
    ],
)
def test_wrong_use_is_one_sentence(shell: Callable, workplace: Path, options: str, words: str) -> None:
    done = shell(f"{EXTRACT} {options}", workplace)
    assert done.code == 2
    assert words in done.err
    assert not (workplace / "out").exists()


def test_a_model_is_compared_with_itself(shell: Callable, workplace: Path) -> None:
    done = shell("loratools extract-svd base base -o out", workplace)
    assert done.code == 1
    assert done.err.startswith("error: base does not differ from base in any tensor that was to be extracted")
    assert shell("loratools extract-svd base base -o out --dry-run", workplace).code == 0
    assert not (workplace / "out").exists()


def test_document_accounts_for_every_tensor(shell: Callable, workplace: Path) -> None:
    found = run(shell, f"{EXTRACT} --rank 4 --exclude k_proj --save-module o_proj", workplace)
    counts: dict[str, int] = {}
    for one in found["tensors"]:
        counts[one["class"]] = counts.get(one["class"], 0) + 1
    assert counts == {"factored": 10, "whole": 7, "unchanged": 2, "dropped": 2}
    assert {one["why"] for one in found["tensors"] if one["class"] == "dropped"} == {"--exclude k_proj"}
    assert len(found["layers"]) == found["total"]["layers"] == 10
    assert all(0 < one["error"] < 1 and one["rank"] == 4 for one in found["layers"])
    squares = {name: sum(one["change_norm"] ** 2 for one in found["tensors"] if one["class"] in name)
               for name in (("dropped",), ("dropped", "factored", "whole"))}  # fmt: skip
    lost, energy = squares.values()
    factors = sum((one["error"] * one["delta_norm"]) ** 2 for one in found["layers"])
    assert found["dropped"] == pytest.approx((lost / energy) ** 0.5)
    assert found["error"] == pytest.approx(((lost + factors) / energy) ** 0.5)
    assert found["warnings"] == [
        f"{found['dropped']:.4g} of the change was left out: the error is {found['error']:.4g} of it"
    ]


@pytest.mark.parametrize(
    ("budget", "dtype", "parameters"),
    [("5000", "f32", 5000), ("5K", "f32", 5000), ("20kB", "f32", 5000), ("20KB", "bf16", 10000)],
)
def test_budgets_are_parameters_or_bytes(
    shell: Callable, workplace: Path, budget: str, dtype: str, parameters: int
) -> None:
    found = run(shell, f"{EXTRACT} --budget {budget} --dtype {dtype}", workplace)
    assert parameters - 200 < found["total"]["parameters"] <= parameters


def test_text_shows_classes_and_totals(shell: Callable, workplace: Path) -> None:
    done = shell(f"{EXTRACT} --modules", workplace)
    assert done.code == 0, done.err
    assert "factored: 14\n  model.layers.[0-1].mlp.{down,gate,up}_proj" in done.out
    assert "whole: 5\n  model.layers.[0-1].{input,post_attention}_layernorm.weight  (norm)" in done.out
    assert "unchanged: 2" in done.out
    assert done.out.count(" x ") >= 14


def test_dry_run_writes_nothing(shell: Callable, workplace: Path) -> None:
    found = run(shell, f"{EXTRACT} --dry-run --kind linear --drop-whole", workplace)
    assert {one["plan"] for one in found["tensors"]} == {"factor", "drop"}
    assert not (workplace / "out").exists()


def test_the_whole_way_round(shell: Callable, workplace: Path) -> None:
    line = (
        f"{EXTRACT} --rank 16 && loratools merge base out -o back && loratools verify tuned --base base --adapter out"
    )
    done = shell(f"{line} --certificate && loratools compare out out --grid model.layers.0.mlp.up_proj", workplace)
    assert done.code == 0, done.err
    assert "5 other changed tensors are replaced by the adapter" in done.out
    assert "input side of model.layers.0.mlp.up_proj" in done.out


def test_spectrum_is_of_adapters(shell: Callable, workplace: Path) -> None:
    done = shell("loratools inspect base --spectrum", workplace)
    assert (done.code, "it describes adapters" in done.err) == (2, True)
    found = run(shell, "loratools inspect adapter --spectrum", workplace)
    assert [len(one["sigma"]) for one in found["spectrum"]["modules"]] == [4] * 4
