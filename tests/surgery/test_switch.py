"""One adapter out, another in: with the residual the result is the merge into the base, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loratools.errors import IncompatibleAdapter, WrongBase
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import RECORD, RESIDUAL
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch
from loratools.surgery.unmerge import unmerge
from tests.surgery.models import DTYPES, load, lora, random, same_bytes, save_adapter, save_base

SHAPES = {"a.up": (96, 128), "a.down": (128, 96), "b.up": (96, 128)}


def prepare(folder: Path, dtype: str = "BF16", shards: int = 2) -> tuple[Path, Path, Path]:
    weights = {
        f"{name}.weight": random(*shape, seed=i, scale=0.05, dtype=DTYPES[dtype])
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    base = save_base(folder / "base", weights | {"norm.weight": random(96)}, shards, model_type="llama")
    old = save_adapter(
        folder / "old", lora({name: SHAPES[name] for name in ("a.up", "a.down")}, rank=8, seed=1, scale=0.2)
    )
    new = save_adapter(folder / "new", lora({name: SHAPES[name] for name in ("a.down", "b.up")}, rank=4, seed=9))
    return base, old, new


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_with_a_residual_it_is_the_merge_into_the_base(dtype: str, tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path, dtype)
    merge(base, [old], tmp_path / "merged", keep_residual=True)
    found = switch(tmp_path / "merged", [old], [new], tmp_path / "switched", weights=[0.6])
    merge(base, [new], tmp_path / "wanted", weights=[0.6])
    assert (found.exact, found.changed, found.error_bound) == (True, 3, 0.0)
    for file in sorted((tmp_path / "wanted").glob("*.safetensors")):
        assert (tmp_path / "switched" / file.name).read_bytes() == file.read_bytes()
    record, wanted = (json.loads((tmp_path / name / RECORD).read_text()) for name in ("switched", "wanted"))
    assert record["adapters"] == wanted["adapters"]
    assert record["base"]["tensors"] == wanted["base"]["tensors"]
    merge(base, [new], tmp_path / "kept", weights=[0.6], keep_residual=True)
    assert (tmp_path / "switched" / RESIDUAL).read_bytes() == (tmp_path / "kept" / RESIDUAL).read_bytes()
    back = unmerge(tmp_path / "switched", [new], tmp_path / "back", base=base)
    assert back.proved == "root hash"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_without_a_residual_it_is_within_its_bound(dtype: str, tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path, dtype)
    merge(base, [old], tmp_path / "merged")
    found = switch(tmp_path / "merged", [old], [new], tmp_path / "switched")
    merge(base, [new], tmp_path / "wanted", dtype="F64")
    wanted, got = load(tmp_path / "wanted"), load(tmp_path / "switched")
    worst = max(float((wanted[name] - got[name].double()).abs().max()) for name in wanted)
    assert not found.exact
    assert found.error_bound / (400 if dtype == "F32" else 40) < worst <= found.error_bound
    assert same_bytes(got["norm.weight"], load(base)["norm.weight"])


def test_what_is_not_the_recorded_merge_is_refused(tmp_path: Path) -> None:
    base, old, new = prepare(tmp_path, shards=1)
    merge(base, [old], tmp_path / "merged", keep_residual=True)
    with pytest.raises(IncompatibleAdapter, match="does not list"):
        switch(tmp_path / "merged", [new], [old], tmp_path / "out")
    spec = Checkpoint.open(tmp_path / "merged").specs["a.down.weight"]
    with spec.file.open("r+b") as file:
        file.seek(spec.start)
        byte = file.read(1)[0]
        file.seek(spec.start)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(WrongBase, match=r"a\.down\.weight was not restored"):
        switch(tmp_path / "merged", [old], [new], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_changed_the_layout_takes_two_steps(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": random(64, 32, dtype=torch.bfloat16), "model.q.weight": random(32, 32)}
    base = save_base(tmp_path / "base", weights, model_type="llama", tie_word_embeddings=True)
    head = save_adapter(tmp_path / "head", lora({"lm_head": (64, 32)}))
    new = save_adapter(tmp_path / "new", lora({"model.q": (32, 32)}))
    merge(base, [head], tmp_path / "merged", tied="untie", keep_residual=True)
    with pytest.raises(IncompatibleAdapter, match="one pass does not do"):
        switch(tmp_path / "merged", [head], [new], tmp_path / "out")
