"""Adapters of image models, merged into bases of every layout: what diffusers computes with them loaded instead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import dialects
from loratools.adapter.model import BaseIdentity
from loratools.adapter.naming.image import rename
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
    adapter = dialects.open_adapter(folder)
    return replace(adapter, base=BaseIdentity("black-forest-labs/FLUX.1-dev")) if name == "flux" else adapter


@pytest.mark.sweep(4)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_pipeline_folder(case: Case, dialect: str, tmp_path: Path) -> None:
    report = merge(case.pipeline, [case.adapters[dialect]], tmp_path / "merged", keep_residual=True)
    ours = images.outputs(images.reopened(case.name, tmp_path / "merged"))
    assert images.distance(ours, case.wanted) < 1e-5
    assert images.distance(case.before, case.wanted) > 0.1
    assert verify(tmp_path / "merged", case.pipeline, [case.adapters[dialect]]).ok
    assert not verify(case.pipeline, case.pipeline, [case.adapters[dialect]]).ok
    assert report.consumed[0].applied == report.consumed[0].tensors > 0
    assert unmerge(tmp_path / "merged", [case.adapters[dialect]], tmp_path / "back").proved == "root hash"


@pytest.mark.sweep(6)
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
    ours = images.outputs(pipe)
    assert images.distance({name: ours[name] for name in wanted}, wanted) < 1e-5
    assert verify(tmp_path / "merged", case.file, [part]).ok
    assert unmerge(tmp_path / "merged", [part], tmp_path / "back").proved == "root hash"


@pytest.mark.sweep(4)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_folder_of_one_component(case: Case, dialect: str, tmp_path: Path) -> None:
    pipe = images.reopened(case.name, case.pipeline)
    for component in images.TARGETS[case.name]:
        part = only(case.adapters["diffusers"], component, tmp_path / f"{component}-part")
        if dialect != "diffusers":
            target = tmp_path / f"{component}.safetensors"
            convert(with_base(case.name, part), target, to=dialect, allow_loss=True)
            part = target
        base, out = case.pipeline / component, tmp_path / f"{component}-merged"
        merge(base, [part], out)
        setattr(pipe, component, images.class_of(case.name, component).from_pretrained(out))
        assert verify(out, base, [part]).ok
    ours = images.outputs(pipe)  # each model's are of fixed inputs, whatever the others are
    for component in images.TARGETS[case.name]:
        assert images.distance({component: ours[component]}, {component: case.wanted[component]}) < 1e-5


def only(adapter: Path, component: str, folder: Path) -> Path:
    """Return the part of an adapter in diffusers' names that changes one component."""
    renamed = rename.to_diffusers(dialects.open_adapter(adapter))
    updates = {module: update for module, update in renamed.updates.items() if module.startswith(f"{component}.")}
    assert updates
    dialects.save_adapter(replace(renamed, updates=updates), folder, dialect="diffusers", allow_loss=True)
    return folder


@pytest.mark.sweep(6)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_diffusers_computes_the_same_with_what_is_written(case: Case, dialect: str, tmp_path: Path) -> None:
    convert(case.adapters[dialect], tmp_path / "written", to="diffusers", allow_loss=True)
    pipe = images.reopened(case.name, case.pipeline)
    pipe.load_lora_weights(tmp_path / "written")
    assert images.distance(images.outputs(pipe), case.wanted) < 1e-5


def test_diffusers_computes_the_same_with_kohyas_file(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers converts names and alphas itself; of Flux' last layer it drops the alpha and the component."""
    from diffusers.loaders import lora_pipeline

    name = "_convert_kohya_flux_lora_to_diffusers"
    resized = images.resized(getattr(lora_pipeline, name), "dims=[3072, 3072, 3072, 12288]")
    monkeypatch.setattr(lora_pipeline, name, resized)
    adapter = with_base(case.name, case.adapters["diffusers"])
    updates = {module: update for module, update in adapter.updates.items() if module != "transformer.proj_out"}
    for dialect in ("diffusers", "kohya"):
        target = tmp_path / f"{dialect}.safetensors"
        dialects.save_adapter(replace(adapter, updates=updates), target, dialect=dialect, allow_loss=True)
    found, wanted = (images.reopened(case.name, case.pipeline) for _ in range(2))
    found.load_lora_weights(tmp_path / "kohya.safetensors")
    wanted.load_lora_weights(tmp_path / "diffusers.safetensors")
    ours = images.outputs(found)
    assert images.distance(ours, images.outputs(wanted)) < 1e-5
    assert images.distance(ours, case.before) > 0.1
