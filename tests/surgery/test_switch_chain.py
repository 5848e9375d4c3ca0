"""Many switches, one after another: exact with a residual, each of them; without one within a bound that grows."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loratools.storage.companions import RECORD, RESIDUAL
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch
from loratools.surgery.unmerge import unmerge
from tests.surgery.models import DTYPES, load, lora, random, same_bytes, save_adapter, save_base

SHAPES = {"a.up": (24, 40), "a.down": (40, 24), "b.up": (24, 40), "b.down": (40, 24)}
PARTS = [("a.up", "a.down"), ("a.down", "b.up"), ("b.up", "a.up", "b.down")]


def prepare(folder: Path, dtype: str) -> tuple[Path, list[Path]]:
    """Save a base in two shards, and three adapters that overlap pair by pair."""
    weights = {
        f"{name}.weight": random(*shape, seed=i, scale=0.05, dtype=DTYPES[dtype])
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    weights["norm.weight"] = random(24, dtype=DTYPES[dtype])
    base = save_base(folder / "base", weights, 2, model_type="llama")
    return base, [
        save_adapter(
            folder / f"adapter{i}", lora({name: SHAPES[name] for name in names}, rank=4, seed=9 + i, scale=0.3)
        )
        for i, names in enumerate(PARTS)
    ]


def make_dora(adapter: Path) -> None:
    """Give every module of an adapter a magnitude."""
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors = load_file(file)
    for i, (name, B) in enumerate([item for item in tensors.items() if "lora_B" in item[0]]):
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = random(len(B), seed=i, scale=0.1).abs() + 0.2
    save_file(tensors, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_switch_of_a_chain_is_exact(dtype: str, tmp_path: Path) -> None:
    """After each the files are those of a fresh merge, so a chain of any length is made of these switches alone."""
    base, adapters = prepare(tmp_path, dtype)
    make_dora(adapters[1])
    wanted = []
    for i, adapter in enumerate(adapters):
        merge(base, adapter, tmp_path / f"fresh{i}", weights=0.3 + i, keep_residual=True)
        wanted.append({path.name: path.read_bytes() for path in (tmp_path / f"fresh{i}").iterdir()})
    current, now = tmp_path / "fresh0", 0
    for step, new in enumerate([1, 2, 0, 2, 1, 0] * 2):  # from each to each, twice
        report = switch(current, adapters[now], adapters[new], tmp_path / f"step{step}", weights=0.3 + new)
        assert report.exact
        assert report.residual is not None
        if step:
            shutil.rmtree(current)
        current, now = tmp_path / f"step{step}", new
        # The record, the card and the residual are those of a fresh merge too.
        assert {path.name: path.read_bytes() for path in current.iterdir()} == wanted[now]
    back = unmerge(current, adapters[now], tmp_path / "back")
    assert back.proved == "root hash"
    for path in base.glob("*.safetensors"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_without_a_residual_the_bound_grows_and_holds(dtype: str, tmp_path: Path) -> None:
    base, adapters = prepare(tmp_path, dtype)
    merge(base, adapters[0], tmp_path / "step0")
    exact = []
    for i, adapter in enumerate(adapters):
        merge(base, adapter, tmp_path / f"exact{i}", dtype="F64")
        exact.append(load(tmp_path / f"exact{i}"))
    bounds = []
    for step in range(9):
        now, new = step % 3, (step + 1) % 3
        report = switch(tmp_path / f"step{step}", adapters[now], adapters[new], tmp_path / f"step{step + 1}")
        switched = load(tmp_path / f"step{step + 1}")
        worst = max(float((W - switched[name].double()).abs().max()) for name, W in exact[new].items())
        bounds.append(report.error_bound)
        record = json.loads((tmp_path / f"step{step + 1}" / RECORD).read_text())
        assert (record["operation"], record["error_bound"], len(record["adapters"])) == ("switch", bounds[-1], 1)
        assert worst <= report.error_bound
    assert all(later > sooner for sooner, later in pairwise(bounds))
    assert bounds[-1] > 4 * bounds[0]
    found = unmerge(tmp_path / "step9", adapters[0], tmp_path / "back")
    W, back = load(base), load(tmp_path / "back")
    assert bounds[-1] < found.error_bound
    assert max(float((W[name].double() - back[name].double()).abs().max()) for name in W) <= found.error_bound
    assert same_bytes(W["norm.weight"], back["norm.weight"])


def test_the_residual_is_kept_where_there_is_one_unless_told_otherwise(tmp_path: Path) -> None:
    base, adapters = prepare(tmp_path, "BF16")
    merge(base, adapters[0], tmp_path / "merged", keep_residual=True)
    report = switch(tmp_path / "merged", adapters[0], adapters[1], tmp_path / "without", keep_residual=False)
    assert report.exact
    assert report.residual is None
    assert not (tmp_path / "without" / RESIDUAL).exists()
    assert not switch(tmp_path / "without", adapters[1], adapters[0], tmp_path / "next").exact
