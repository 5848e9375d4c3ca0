"""Damaged files are read correctly or refused with one sentence; nothing else, at no cost beyond their own size."""

from __future__ import annotations

import json
import random
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import regex  # noqa: F401  (imported on first need; an import is no memory that a file takes)
import safetensors
import torch
from safetensors.torch import save

from loratools import dialects
from loratools.adapter.kinds import get, names
from loratools.adapter.model import Adapter
from loratools.errors import LoraToolsError
from loratools.storage import files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec, read_header
from loratools.storage.pickles.archive import read_pickled
from tests.faults import mutate
from tests.make import tiny

Contents = dict[str, tuple[str, tuple[int, ...], bytes]]

# Python's objects for the JSON of a header take several times its text; the constant is for code and caches.
PER_BYTE, FIXED = 16, 250_000


def contents(specs: dict[str, TensorSpec] | Any) -> Contents:
    return {name: (spec.dtype, spec.shape, bytes(files.read_bytes(spec))) for name, spec in specs.items()}


def library(path: Path) -> Contents | None:
    """Return what the safetensors library reads, None if it refuses the file."""
    try:
        with safetensors.safe_open(path, "pt"):
            pass
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError:
        return None
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in tensors}


def attempt(read: Callable[[], Any], path: Path, size: int) -> Any:
    """Return what `read` returns, None if it refuses with a sentence; fail for all else, memory included."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    sentence = f"{path}: x"
    try:
        contents_read = read()
    except LoraToolsError as error:
        contents_read, sentence = None, error.message
    peak = tracemalloc.get_traced_memory()[1] - before
    assert peak < PER_BYTE * size + FIXED, f"{peak} bytes for a file of {size}"
    assert str(path) in sentence
    assert "\n" not in sentence
    return contents_read


@pytest.fixture(autouse=True)
def _traced() -> Any:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def checkpoint_bytes() -> bytes:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(2, 3, generator=generator).bfloat16() for i in range(3)}
    tensors |= {"norm": torch.ones(3), "ids": torch.arange(4), "mask": torch.tensor([True]), "none": torch.zeros(0, 2)}
    tensors |= {"eight": torch.ones(5).to(torch.float8_e4m3fn), "scalar": torch.tensor(2.0, dtype=torch.float64)}
    return save(tensors, {"format": "pt", "note": "é"})


@pytest.mark.fuzz(1)
@pytest.mark.parametrize("part", range(4))
def test_checkpoints(tmp_path: Path, part: int) -> None:
    """1,000 files, in four parts."""
    chance, original = random.Random(part), checkpoint_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(original)
    assert contents(Checkpoint.open(path).specs) == library(path)
    seen = Counter()
    for number in range(250):
        damage = chance.choice(mutate.SAFETENSORS)
        path.write_bytes(damage(original, chance))
        read = attempt(lambda: contents(read_header(path).tensors), path, path.stat().st_size)
        expected = library(path)
        if read is not None:
            assert expected is not None, f"{damage.__name__}, number {number}: the library refuses it"
            assert read == expected, f"{damage.__name__}, number {number}"
        seen["read" if read is not None else "stricter" if expected is not None else "refused by both"] += 1
    assert seen["read"] >= 10  # changed data and names are sound files, and must stay readable
    assert seen["refused by both"] >= 100
    assert seen["stricter"] <= 50  # duplicate names, unknown fields, NUL


def whole(adapter: Adapter) -> list[tuple[str, tuple[int, ...], bytes]]:
    specs = [lazy.spec for lazy in adapter.tensors().values()]
    assert None not in specs
    return sorted((spec.dtype, spec.shape, bytes(files.read_bytes(spec))) for spec in specs if spec)


def read_adapter(path: Path) -> list[tuple[str, tuple[int, ...], bytes]]:
    return whole(dialects.open_adapter(path))


@pytest.mark.fuzz(1)
@pytest.mark.parametrize("part", range(4))
def test_adapters(prepared: Path, tmp_path: Path, part: int) -> None:
    """1,000 files, in four parts: of PEFT and of the format, as folders and alone."""
    chance = random.Random(100 + part)
    kinds = ("adapter", "sealed")
    for kind in kinds:
        (tmp_path / kind).mkdir()
        for file in (prepared / kind).iterdir():
            (tmp_path / kind / file.name).write_bytes(file.read_bytes())
        dialects.open_adapter(tmp_path / kind)  # imports and caches are not what is measured
    for name in names():
        get(name)
    seen = Counter()
    for number in range(250):
        kind = chance.choice(kinds)
        path = tmp_path / kind / "adapter_model.safetensors"
        original = (prepared / kind / "adapter_model.safetensors").read_bytes()
        damage = chance.choice(mutate.SAFETENSORS)
        path.write_bytes(damage(original, chance))
        place = path if chance.random() < 0.3 and kind == "sealed" else path.parent
        read = attempt(partial(read_adapter, place), path.parent, path.stat().st_size)
        if read is not None:
            expected = library(path)
            assert expected is not None, f"{damage.__name__}, number {number}: the library refuses it"
            assert read == sorted(expected.values()), f"{damage.__name__}, number {number}"
        seen["read" if read is not None else "refused"] += 1
        path.write_bytes(original)
    assert seen["read"] >= 5
    assert seen["refused"] >= 150


@pytest.mark.fuzz(1)
@pytest.mark.parametrize("part", range(3))
def test_legacy_files(tmp_path: Path, part: int) -> None:
    """300 damaged files of torch.save, in three parts: what is accepted is what torch reads."""
    chance, path = random.Random(200 + part), tmp_path / "pytorch_model.bin"
    generator = torch.Generator().manual_seed(0)
    state = {f"layers.{i}.weight": torch.randn(2, 3, generator=generator) for i in range(3)}
    state["tied"], state["half"] = state["layers.0.weight"], torch.ones(2, dtype=torch.bfloat16)
    torch.save(state, path)
    original = path.read_bytes()
    read_pickled(path)
    seen = Counter()
    for number in range(100):
        damage = chance.choice(mutate.ANY)
        path.write_bytes(damage(original, chance))
        read = attempt(lambda: contents(read_pickled(path)), path, path.stat().st_size)
        if read is None:
            seen["refused"] += 1
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                loaded = torch.load(path, weights_only=True)
        except Exception:  # it refuses in as many ways as there are bytes
            seen["torch refuses"] += 1
            continue
        assert set(read) == set(loaded), f"{damage.__name__}, number {number}"
        for name, tensor in loaded.items():
            raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            assert read[name][1:] == (tuple(tensor.shape), raw), f"{damage.__name__}, number {number}: {name}"
        seen["read"] += 1
    assert seen["read"] >= 5
    assert seen["refused"] >= 15
    assert seen["torch refuses"] <= 10, seen  # the version record, say, which is not looked at


@pytest.mark.fuzz(1)
@pytest.mark.parametrize("part", range(3))
def test_indexes(tmp_path: Path, part: int) -> None:
    """300 damaged indexes, in three parts: no shard is left out, none outside the folder is opened."""
    chance = random.Random(300 + part)
    folder = tiny.save_llama(tmp_path / "model", tiny.llama_weights(1))
    path = folder / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    right = contents(Checkpoint.open(folder).specs)
    size = sum(file.stat().st_size for file in folder.iterdir())
    seen = Counter()
    for _ in range(100):
        if chance.random() < 0.5:
            path.write_text(json.dumps(mutate.json_value(document, chance)))
        else:
            path.write_bytes(chance.choice(mutate.ANY)(json.dumps(document).encode(), chance))
        read = attempt(lambda: contents(Checkpoint.open(folder).specs), folder, size)
        assert read in (None, right)
        seen["refused" if read is None else "read"] += 1
    assert min(seen.values()) >= 3


@pytest.mark.fuzz(1)
@pytest.mark.parametrize("part", range(6))
def test_adapter_configs(prepared: Path, tmp_path: Path, part: int) -> None:
    """600 damaged configs, in six parts: an adapter with all its tensors and finite scaling, or a sentence."""
    chance, folder = random.Random(400 + part), tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(
        (prepared / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    path = folder / "adapter_config.json"
    document = json.loads((prepared / "adapter" / "adapter_config.json").read_text())
    document |= {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 16}, "layers_to_transform": [0, 1]}
    path.write_text(json.dumps(document))
    right = whole(dialects.open_adapter(folder))
    seen = Counter()
    for _ in range(100):
        if chance.random() < 0.7:
            path.write_text(json.dumps(mutate.json_value(document, chance)))
        else:
            path.write_bytes(chance.choice(mutate.ANY)(json.dumps(document).encode(), chance))
        adapter = attempt(lambda: dialects.open_adapter(folder), folder, path.stat().st_size)
        if adapter is not None:
            assert whole(adapter) == right
            assert all(abs(update.scaling) < float("inf") for update in adapter.updates.values())
        seen["refused" if adapter is None else "read"] += 1
    assert min(seen.values()) >= 5
