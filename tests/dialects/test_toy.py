"""A new dialect is one file: put beside the others, it is listed, written, read, detected and inspected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import dialects
from loratools.adapter.model import Adapter
from loratools.storage.checkpoint import Checkpoint
from tests.conftest import Result

from .adapters import Q0, lora

TOY = '''
"""Toy: every factor as lists of numbers in one JSON file."""

import json

from loratools.adapter.model import Adapter
from loratools.adapter.parts import A, B
from loratools.dialects._frame import losses as lost
from loratools.dialects._frame.build import Draft
from loratools.dialects._frame.listing import Evidence
from loratools.storage import atomic
from loratools.storage.lazy import LazyTensor

SUMMARY = "toy: numbers that a person can read"
EXTRA = None
FILES = ()
CANNOT = (*lost.IDENTITY, "tensors trained whole", "anything but plain LoRA")

_FILE = "toy.json"


def detect(listing):
    return Evidence(95, f"there is a {_FILE}") if _FILE in listing.files else None


def read(listing):
    import torch

    found = listing.json(_FILE)
    groups = {
        module: {part: LazyTensor.of(torch.tensor(rows)) for part, rows in one["parts"].items()}
        for module, one in found.items()
    }

    def rule(module, rank):
        return found[module]["s"], found[module]["alpha"]

    return Adapter(Draft(listing.path, groups).build(rule))


def losses(adapter):
    return [
        *lost.update_losses(adapter, "toy", ("lora",), (A, B)),
        *lost.replacement_losses(adapter, "toy"),
        *lost.identity_losses(adapter),
    ]


def write(adapter, target, *, force=False):
    written = lost.left(adapter, losses(adapter), target)
    document = {
        module: {
            "s": update.scaling, "alpha": update.alpha,
            "parts": {part: lazy.load().float().tolist() for part, lazy in update.parts.items()},
        }
        for module, update in written.updates.items()
    }
    with atomic.new_folder(target, force=force) as folder:
        (folder / _FILE).write_text(json.dumps(document))
    return written
'''


@pytest.fixture(scope="module")
def toyed_shell(shell_with: Callable) -> Callable[..., Result]:
    """The shell of a loratools with one more file in `dialects/`; every other file is as it is here."""
    return shell_with({"dialects/toy.py": TOY})


@pytest.fixture
def toyed(workplace: Path, toyed_shell: Callable[..., Result]) -> Callable[[str], Result]:
    """Return a function that runs a line of that shell in `workplace`."""
    return lambda line: toyed_shell(line, workplace)


def test_it_appears_in_every_command(toyed: Callable[[str], Result], workplace: Path) -> None:
    done = toyed("loratools dialects")
    assert done.code == 0, done.err
    assert ["toy", "toy: numbers that a person can read"] in [line.split(maxsplit=1) for line in done.out.splitlines()]
    listed = json.loads(toyed("loratools dialects --json").out)["dialects"]
    assert [one["name"] for one in listed] == sorted([*dialects.names(), "toy"])

    done = toyed("loratools convert adapter -o x --to toy --base base")
    assert done.code == 0, done.err
    assert "x (toy, 4 modules)" in done.out
    done = toyed("loratools convert x -o back --to peft")
    assert done.code == 0, done.err
    before, after = (dialects.open_adapter(workplace / name) for name in ("adapter", "back"))
    assert before.updates.keys() == after.updates.keys()
    for module, update in before.updates.items():
        assert torch.equal(after.updates[module].delta_weight(), update.delta_weight())

    done = toyed("loratools inspect x --json")
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    assert (found["dialect"], found["evidence"]) == ("toy", "there is a toy.json")
    (group,) = found["groups"]
    assert (group["kind"], group["rank"], group["scaling"], group["modules"]) == ("lora", 4, 2, 4)
    assert toyed("loratools merge base x -o one && loratools merge base adapter -o two").code == 0
    one, two = Checkpoint.open(workplace / "one"), Checkpoint.open(workplace / "two")
    assert one.specs.keys() == two.specs.keys()
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.specs)


def test_its_losses_are_refused_by_name(toyed: Callable[[str], Result], workplace: Path) -> None:
    done = toyed("loratools convert sealed -o x --to toy")
    assert done.code == 1
    assert "the dialect toy cannot say 1 thing of this adapter" in done.err
    assert "base model: its hash, by which a wrong base is refused" in done.err
    assert not (workplace / "x").exists()
    assert toyed("loratools convert sealed -o x --to toy --allow-loss").code == 0


def test_two_equally_good_readings_are_shown(toyed: Callable[[str], Result], workplace: Path) -> None:
    assert toyed("loratools convert adapter -o x --to toy").code == 0
    (workplace / "x" / "pytorch_lora_weights.safetensors").write_bytes(_with_metadata(workplace))
    done = toyed("loratools inspect x")
    assert done.code == 1
    assert "can be read as diffusers or as toy" in done.err
    assert "  toy: there is a toy.json" in done.err.splitlines()
    assert "  diffusers: the header of" in done.err
    assert toyed("loratools inspect x --dialect toy").code == 0


def _with_metadata(folder: Path) -> bytes:
    """Return a file of diffusers with its configuration in the header, of which diffusers is as sure as toy is."""
    dialects.save_adapter(Adapter({f"unet.{Q0}": lora(1)}), folder / "image.safetensors", dialect="diffusers")
    return (folder / "image.safetensors").read_bytes()
