"""Adapters of image models, merged into bases of every layout: what diffusers computes with them loaded instead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import dialects
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.convert import convert
from loratools.surgery.merge import merge
from loratools.surgery.unmerge import unmerge
from loratools.surgery.verify import verify

pytest.importorskip("diffusers")
from . import images

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

DIALECTS = ("diffusers", "kohya", "comfy")


@dataclass(frozen=True)
class Case:
    """A base as a pipeline and as one file, adapters of it in each dialect, and what diffusers computes with them."""

    name: str
    pipeline: Path
    file: Path
    adapters: dict[str, Path]
    before: dict[str, torch.Tensor]
    wanted: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    pipe = images.pipeline(name)
    pipe.save_pretrained(folder / "pipeline")
    before = images.outputs(pipe)
    file = images.save_original(pipe, folder / "original.safetensors")
    images.trained(pipe, images.TARGETS[name], folder / "diffusers")
    loaded = images.pipeline(name)
    loaded.load_lora_weights(folder / "diffusers")
    adapters = {"diffusers": folder / "diffusers"}
    for dialect in DIALECTS[1:]:
        adapters[dialect] = folder / f"{dialect}.safetensors"
        convert(with_base(name, folder / "diffusers"), adapters[dialect], to=dialect, allow_loss=True)
        assert {loss.where for loss in dialects.get(dialect).losses(with_base(name, folder / "diffusers"))} <= {"base"}
    return Case(name, folder / "pipeline", file, adapters, before, images.outputs(loaded))


def with_base(name: str, folder: Path) -> Any:
    from dataclasses import replace

    from loratools.adapter.model import BaseIdentity

    adapter = dialects.open_adapter(folder)
    return replace(adapter, base=BaseIdentity("black-forest-labs/FLUX.1-dev")) if name == "flux" else adapter


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_pipeline_folder(case: Case, dialect: str, tmp_path: Path) -> None:
    report = merge(case.pipeline, [case.adapters[dialect]], tmp_path / "merged", keep_residual=True)
    found = images.outputs(images.reopened(case.name, tmp_path / "merged"))
    assert images.distance(found, case.wanted) < 1e-5
    assert images.distance(case.before, case.wanted) > 0.1
    assert verify(tmp_path / "merged", case.pipeline, [case.adapters[dialect]]).ok
    assert not verify(case.pipeline, case.pipeline, [case.adapters[dialect]]).ok
    assert report.consumed[0].applied == report.consumed[0].tensors > 0
    assert unmerge(tmp_path / "merged", [case.adapters[dialect]], tmp_path / "back").proved == "root hash"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_original_file(case: Case, dialect: str, tmp_path: Path) -> None:
    if case.name == "flux":  # Black Forest Labs' file holds no text encoder
        part = only(case.adapters[dialect], "transformer", tmp_path / "part")
        if dialect != "diffusers":
            convert(with_base("flux", part), tmp_path / "part.safetensors", to=dialect, allow_loss=True)
            part = tmp_path / "part.safetensors"
    else:
        part = case.adapters[dialect]
    merge(case.file, [part], tmp_path / "merged", keep_residual=True)
    merged = Checkpoint.open(tmp_path / "merged" / case.file.name)
    pipe = images.from_original(case.name, {name: merged.read(name) for name in merged.specs})
    wanted = {name: tensor for name, tensor in case.wanted.items() if case.name != "flux" or name == "transformer"}
    found = images.outputs(pipe)
    assert images.distance({name: found[name] for name in wanted}, wanted) < 1e-5
    assert verify(tmp_path / "merged", case.file, [part]).ok
    assert unmerge(tmp_path / "merged", [part], tmp_path / "back").proved == "root hash"


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_folder_of_one_component(case: Case, dialect: str, tmp_path: Path) -> None:
    for component in images.TARGETS[case.name]:
        part = only(case.adapters["diffusers"], component, tmp_path / f"{component}-part")
        if dialect != "diffusers":
            target = tmp_path / f"{component}.safetensors"
            convert(with_base(case.name, part), target, to=dialect, allow_loss=True)
            part = target
        base, out = case.pipeline / component, tmp_path / f"{component}-merged"
        merge(base, [part], out)
        model = type(getattr(images.pipeline(case.name), component)).from_pretrained(out)
        pipe = images.reopened(case.name, case.pipeline)
        setattr(pipe, component, model)
        assert images.distance({component: images.outputs(pipe)[component]}, {component: case.wanted[component]}) < 1e-5
        assert verify(out, base, [part]).ok


def only(adapter: Path, component: str, folder: Path) -> Path:
    """Return the part of an adapter in diffusers' names that changes one component."""
    from dataclasses import replace

    from loratools.dialects import _image_names

    opened = _image_names.to_diffusers(dialects.open_adapter(adapter))
    updates = {module: update for module, update in opened.updates.items() if module.startswith(f"{component}.")}
    assert updates
    dialects.save_adapter(replace(opened, updates=updates), folder, dialect="diffusers", allow_loss=True)
    return folder
