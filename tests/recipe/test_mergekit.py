"""mergekit's YAML for adapters: what it means in numbers, in float64 on whole weights, and what is refused by its name.

tests/interop/test_mergekit.py runs mergekit itself on the same configurations, where it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import loratools
from loratools.errors import UnsupportedAdapter
from loratools.recipe import text
from loratools.recipe.mergekit import translated
from tests.recipe.configurations import CONFIGURATIONS, REFUSED


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def weights_of(folder: str | Path) -> dict[str, Tensor]:
    model = loratools.Checkpoint.open(folder)
    return {name: model.read(name).double() for name in model.specs}


def changed(adapter: str) -> dict[str, Tensor]:
    """Return ΔW of every weight, by A and B alone."""
    opened = loratools.open_adapter(adapter)
    deltas = {}
    for module, update in opened.updates.items():
        A, B = (update.parts[f"lora_{each}.weight"].load().double() for each in "AB")
        deltas[f"{module}.weight"] = update.scaling * B @ A
    return deltas


def linear(parts: list[tuple[float, Tensor]], total: float) -> Tensor:
    return sum((w * X for w, X in parts), torch.zeros(())) / total


def ties(parts: list[tuple[float, Tensor]], density: float, normalize: bool) -> Tensor:
    weights = torch.tensor([w for w, _ in parts], dtype=torch.float64)[:, None, None]
    kept = []
    for _, X in parts:
        count = max(1, int(density * X.numel()))
        cut = X.abs().flatten().sort(descending=True).values[count - 1]
        kept.append(torch.where(X.abs() >= cut, X, 0.0))
    X = torch.stack(kept) * weights
    elected = torch.where(X.sum(0) >= 0, 1.0, -1.0)
    agree = (X.sign() == elected).double()
    share = (agree * weights).sum(0)
    return (X * agree).sum(0) / (torch.where(share == 0, 1.0, share) if normalize else 1.0)


Formula = Callable[[list[tuple[float, Tensor]]], Tensor]
FORMULAS: dict[str, tuple[list[float], Formula]] = {
    "linear with the base": ([0.7, 0.5], lambda parts: linear(parts, 0.7 + 0.5 + 0.3)),
    "linear without normalize": ([0.75, 0.25], lambda parts: linear(parts, 1)),
    "task arithmetic": ([0.7, -0.4], lambda parts: 1.3 * linear(parts, 1)),
    "ties": ([0.7, 0.4], lambda parts: ties(parts, 0.6, True)),
    "ties summed": ([0.7, 0.4], lambda parts: 0.8 * ties(parts, 0.3, False)),
    "dare_ties of all": ([0.7, 0.4], lambda parts: ties(parts, 1, True)),
    "dare_linear of all": ([0.7, 0.4], lambda parts: linear(parts, 1.1)),
    "della of all": ([0.7, 0.4], lambda parts: ties(parts, 1, True)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_configuration_means_what_it_means_on_whole_weights(name: str, here: Path) -> None:
    (here / "m.yaml").write_text(CONFIGURATIONS[name])
    report = loratools.run_recipe("m.yaml", folder="out")
    assert report.ok, report.steps[-1].error
    numbers, formula = FORMULAS[name]
    base, merged = weights_of("base"), weights_of("out/merged")
    deltas = [changed("adapter"), changed("other")]
    for tensor, before in base.items():
        parts = [(w, each.get(tensor, torch.zeros_like(before))) for w, each in zip(numbers, deltas, strict=True)]
        expected = before + formula(parts) if any(tensor in each for each in deltas) else before
        scale = float((expected - before).abs().max()) or 1.0
        assert float((merged[tensor] - expected).abs().max()) < 3e-6 * max(scale, 1.0), tensor


def test_what_is_drawn_has_the_norm_and_the_chances_of_mergekit(here: Path) -> None:
    (here / "m.yaml").write_text(CONFIGURATIONS["dare_linear"])
    assert loratools.run_recipe("m.yaml", folder="out").ok
    base, merged = weights_of("base"), weights_of("out/merged")
    for tensor, delta in changed("other").items():
        if tensor in changed("adapter"):
            continue
        found = (merged[tensor] - base[tensor]) / 0.4
        assert float(found.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
        kept = float((found.abs() > 1e-6).double().mean())
        assert kept == pytest.approx(0.5, abs=5 * (0.25 / delta.numel()) ** 0.5)


def test_the_translation_can_be_read_printed_and_changed(here: Path) -> None:
    (here / "m.yml").write_text(CONFIGURATIONS["ties"])
    (here / "planned").mkdir()
    planned = loratools.run_recipe("m.yml", dry_run=True, folder="planned").steps[0]
    assert "the full rank" in " ".join(planned.lines)
    printed = loratools.recipe_of("m.yml").yaml
    assert printed.startswith("# the combined adapter has the full rank")
    assert "like: mergekit" in printed
    (here / "small.yaml").write_text(printed.replace("rank: 1048576", "rank: 2"))
    assert loratools.run_recipe("small.yaml", folder="small").ok
    assert {update.rank for update in loratools.open_adapter("small/combined").updates.values()} == {2}
    (here / "ours.yaml").write_text(printed)
    with pytest.raises(loratools.LoraToolsError, match="a recipe already"):
        loratools.recipe_of("ours.yaml")


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_equal_here_is_refused_by_its_name(name: str, here: Path) -> None:
    yaml, told = REFUSED[name]
    (here / "m.yaml").write_text(yaml)
    with pytest.raises(UnsupportedAdapter) as refusal:
        loratools.run_recipe("m.yaml")
    assert any(told in problem for problem in refusal.value.problems), refusal.value.problems


def test_places_are_found_as_mergekit_finds_them(here: Path, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere" / "m.yaml"
    path.parent.mkdir()
    path.write_text(
        "merge_method: linear\nmodels:\n"
        "- {model: {model: {path: lab/base, revision: v1}, lora: {path: adapter}}, parameters: {weight: {value: 2}}}\n"
        "- {model: lab/base@v1+lab/adapter, parameters: {weight: 1e0}}\n"
    )
    table, _ = text.read(path)
    document, _ = translated(table, path)
    assert document["inputs"] == {
        "base": "hf://lab/base@v1", "adapter": str(here / "adapter"), "adapter-2": "hf://lab/adapter",
    }  # fmt: skip
    assert document["steps"]["combined"]["weight"] == [2 / 3, 1 / 3]


def test_an_adapter_without_its_base_is_told(tmp_path: Path) -> None:
    factors = {f"lora_unet_a.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")}
    save_file(factors, tmp_path / "a.safetensors")
    file = tmp_path / "m.yaml"
    file.write_text("models: [{model: a.safetensors, parameters: {weight: 1}}]\nmerge_method: linear\ndtype: float32\n")
    with pytest.raises(UnsupportedAdapter) as caught:
        translated(text.read(file)[0], file)
    assert "'model: BASE+a.safetensors'" in str(caught.value)
    assert "whole model" not in str(caught.value)
