"""Adapters of one base, or of two: what a seal, a folder at hand and names say of each other, through `combine`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loratools.dialects import open_adapter
from loratools.errors import WrongBase
from loratools.surgery.combine import combine
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from tests.surgery.models import Lora, lora, random, save_adapter, save_base

SHAPES = {"model.layers.0.self_attn.q_proj": (8, 6), "model.layers.0.mlp.up_proj": (10, 6)}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay out three folders called `base`: a model, a copy of it, and one of its shapes with other weights."""
    monkeypatch.chdir(tmp_path)
    for folder, seed in (("mine", 1), ("other", 2)):
        weights = {f"{module}.weight": random(*shape, seed=seed) for module, shape in SHAPES.items()}
        save_base(tmp_path / folder / "base", weights, model_type="llama")
    shutil.copytree("mine/base", "copy/base")
    (tmp_path / "link").symlink_to("mine/base")
    convert(
        adapter(tmp_path / "plain", f"{tmp_path}/mine/base", seed=3),
        tmp_path / "sealed",
        base=tmp_path / "mine" / "base",
    )
    return tmp_path


def adapter(folder: Path, base: str | None, seed: int = 4, **settings: Any) -> Path:
    given = lora(SHAPES, rank=2, seed=seed)
    named = {} if base is None else {"base_model_name_or_path": base}
    return save_adapter(folder, Lora(given.factors, settings={**named, **settings}))


def placed(name: str, root: Path) -> str:
    return name.replace("ROOT", str(root))


SAME = ("ROOT/mine/base", "mine/base", "./mine/base/", "ROOT/copy/../mine/base", "link", "ROOT/copy/base")


@pytest.mark.parametrize("name", SAME)
def test_a_sealed_and_an_unsealed_adapter_of_one_folder(name: str, work: Path) -> None:
    """The seal has the folder's last part, the config its path: neither decides, the weights do."""
    unsealed = adapter(work / "unsealed", placed(name, work))
    report = combine([work / "sealed", unsealed], work / "sum")
    assert report.warnings == ()
    assert report.base is not None
    assert (report.base.root, report.base.model_type) == (open_adapter(work / "sealed").base.root, "llama")  # type: ignore[union-attr]
    assert combine([unsealed, work / "sealed"], work / "turned").warnings == ()


@pytest.mark.parametrize("first", SAME)
def test_two_unsealed_adapters_of_one_folder(first: str, work: Path) -> None:
    one = adapter(work / "one", placed(first, work), seed=8)
    for i, name in enumerate(SAME):
        assert combine([one, adapter(work / f"{i}", placed(name, work))], work / f"sum{i}").warnings == ()


@pytest.mark.parametrize("name", ["ROOT/other/base", "other/base", "ROOT/elsewhere/llama", "org/model"])
def test_another_base_is_refused_whatever_it_is_called(name: str, work: Path) -> None:
    for i, other in enumerate((work / "sealed", adapter(work / "one", "mine/base"))):
        with pytest.raises(WrongBase, match="different base models") as caught:
            combine([other, adapter(work / f"a{i}", placed(name, work))], work / "sum")
        told = "these adapters name different base models, and no hash tells whether they are one"
        assert (caught.value.message == told) == (name not in ("ROOT/other/base", "other/base"))
        found = combine([other, work / f"a{i}"], work / f"sum{i}", check_base="warn")
        assert len(found.warnings) == 1
        assert combine([other, work / f"a{i}"], work / f"off{i}", check_base="off").warnings == ()


def test_a_folder_that_is_not_at_hand_is_compared_by_its_last_part_and_that_is_said(work: Path) -> None:
    for name in ("/nowhere/base", "org/base"):
        found = combine([work / "sealed", adapter(work / name[1:4], name)], work / "sum", force=True)
        assert [warning.partition(": ")[2] for warning in found.warnings] == [
            f"of the names of their bases only the last part can be compared, base and {name}"
        ]
        assert found.base is not None
        assert found.base.id == ("base" if name.startswith("/") else name)


def test_the_name_on_the_hub_is_kept_and_other_revisions_are_told(work: Path) -> None:
    spelled = ("hf://org/base", "org/base", "/cache/models--org--base/snapshots/0123")
    adapters = [adapter(work / f"{i}", name, seed=i, revision=f"r{i}") for i, name in enumerate(spelled)]
    found = combine(adapters, work / "sum")
    assert "compared by name only, hf://org/base, at the revisions r0 and r1" in found.warnings[0]
    assert found.base is not None
    assert found.base.id == "org/base"


def test_what_lies_in_the_folder_counts_and_not_its_name(work: Path) -> None:
    """The same name twice, relative and absolute, after the model in it was exchanged."""
    unsealed = adapter(work / "unsealed", "mine/base")
    shutil.rmtree(work / "mine" / "base")
    shutil.copytree(work / "other" / "base", work / "mine" / "base")
    with pytest.raises(WrongBase) as caught:
        combine([work / "sealed", unsealed], work / "sum")
    assert "mine/base is not the sealed base; model.layers.0.mlp.up_proj.weight: its bytes" in caught.value.problems[0]


def test_the_record_of_a_merge_names_the_one_base_and_no_path(work: Path) -> None:
    adapters = [adapter(work / "a", f"{work}/mine/base"), adapter(work / "b", "org/base", seed=8)]
    for chosen, name in ((adapters, "org/base"), (adapters[:1], "base")):
        merge(work / "mine" / "base", chosen, out := work / name.replace("/", "-"))
        assert json.loads((out / "loratools.json").read_text())["base"]["id"] == name
