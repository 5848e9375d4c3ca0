"""A merge on disk against PEFT's in memory, for every family of models: same names, same numbers, nothing dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.adapter.naming.wrappers import Names
from loratools.dialects import open_adapter
from loratools.surgery.merge import merge
from tests.interop.models import FAMILIES, SCALINGS, adapt, changed, load, merge_by_peft

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A family's name, its model in memory and on disk."""
    model = FAMILIES[request.param].build()
    folder = tmp_path_factory.mktemp(request.param) / "base"
    model.save_pretrained(folder)
    return request.param, model, folder


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Tell whether two float32 weights agree to 1e-6 of the largest element."""
    return float((ours.double() - theirs.double()).abs().max()) <= 1e-6 * float(theirs.abs().max())


@pytest.mark.sweep(80)
@pytest.mark.parametrize("scaling", sorted(SCALINGS))
@pytest.mark.parametrize("where", ["attention", "linear"])
def test_merged_weights_are_those_of_peft(
    family: tuple[str, Any, Path], where: str, scaling: str, tmp_path: Path
) -> None:
    name, model, folder = family
    expected = FAMILIES[name]
    targets = list(expected.targets) if where == "attention" else "all-linear"
    adapt(model, targets, **SCALINGS[scaling]).save_pretrained(tmp_path / "adapter")
    merge_by_peft(model, tmp_path / "adapter").save_pretrained(tmp_path / "peft")
    updates = open_adapter(tmp_path / "adapter").updates.values()
    assert {update.rank for update in updates} == ({3, 4} if scaling == "patterns" else {4})
    assert len({update.alpha for update in updates}) > (scaling == "patterns")
    report = merge(folder, [tmp_path / "adapter"], tmp_path / "ours")
    base, ours, theirs = load(folder), load(tmp_path / "ours"), load(tmp_path / "peft")
    count = expected.attention if where == "attention" else expected.linear
    touched = changed(base, theirs)
    assert changed(base, ours) == touched
    assert (len(touched), report.changed) == (count, count)
    assert [name for name in sorted(touched) if not close(ours[name], theirs[name])] == []


def test_names_of_modules_and_of_files_lead_to_each_other(family: tuple[str, Any, Path]) -> None:
    """transformers 5 renames modules as it loads; adapters may have either name, and so may checkpoints."""
    _, model, folder = family
    linear = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    inside, stored = Names(model.state_dict()), load(folder)
    on_disk = Names(stored)
    where = {name: on_disk.find(name) for name in linear}
    for name, found in where.items():
        if found:  # of tied weights one is stored
            assert len(found) == 1, name
            assert torch.equal(stored[found[0]], model.get_submodule(name).weight)
            assert inside.find(found[0].removesuffix(".weight")) == [f"{name}.weight"]
    assert sum(map(bool, where.values())) == len({model.get_submodule(name).weight.data_ptr() for name in linear})
