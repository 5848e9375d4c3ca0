"""Merge, then unmerge: every bit comes back from the merged model, its residual and the adapters, for every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.engine.residual import Residual
from loratools.errors import BadFile, IncompatibleAdapter, WrongBase
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import RECORD, RESIDUAL
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.merge import merge
from loratools.surgery.unmerge import unmerge
from tests.surgery.models import DTYPES, load, lora, random, same_bytes, save_adapter, save_base

SHAPES = {"block.0.up": (300, 400), "block.0.down": (400, 300), "block.1.up": (300, 400)}


def weights_of(dtype: torch.dtype, scale: float = 0.05) -> dict[str, Tensor]:
    found = {
        f"{name}.weight": random(*shape, seed=i, scale=scale, dtype=dtype)
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    return found | {"norm.weight": random(400, dtype=dtype)}


def prepare(
    folder: Path, dtype: str = "BF16", size: float = 0.05, shards: int = 1
) -> tuple[Path, list[Path], list[float]]:
    """Save a base and two adapters that overlap."""
    base = save_base(folder / "base", weights_of(DTYPES[dtype]), shards, model_type="llama")
    adapters = [
        lora(SHAPES, rank=4, seed=1, scale=size),
        lora(dict(list(SHAPES.items())[:2]), rank=16, seed=2, scale=size),
    ]
    return base, [save_adapter(folder / f"adapter{i}", one) for i, one in enumerate(adapters)], [0.7, -1.3]


def expect_same(one: Path, other: Path) -> None:
    """Assert that two models have the same tensors, files, headers and indexes, byte for byte."""
    first, second = load(one), load(other)
    assert first.keys() == second.keys()
    assert all(same_bytes(first[name], second[name]) for name in first)
    files = sorted(path.name for path in one.iterdir() if "safetensors" in path.name)
    assert files == sorted(path.name for path in other.iterdir() if "safetensors" in path.name)
    for name in files:
        if name.endswith(".json"):
            assert (
                json.loads((one / name).read_text())["weight_map"]
                == json.loads((other / name).read_text())["weight_map"]
            )
        else:
            assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("size", [0.3, 0.01], ids=["large", "small"])
def test_residual_restores_every_bit(dtype: str, size: float, tmp_path: Path) -> None:
    base, adapters, weights = prepare(tmp_path, dtype, size, shards=2)
    made = merge(base, adapters, tmp_path / "merged", weights=weights, keep_residual=True)
    found = unmerge(tmp_path / "merged", adapters[::-1], tmp_path / "unmerged")
    assert (found.method, found.proved, found.restored, found.tensors) == ("residual", "root hash", 3, 4)
    assert found.root == hash_checkpoint(Checkpoint.open(base)).root
    assert made.residual is not None
    assert made.residual.nbytes == (tmp_path / "merged" / RESIDUAL).stat().st_size
    expect_same(base, tmp_path / "unmerged")
    assert not (tmp_path / "unmerged" / RESIDUAL).exists()
    assert not (tmp_path / "unmerged" / RECORD).exists()
    assert not (tmp_path / "unmerged" / "README.md").exists()


def test_residual_is_small_and_independent_of_threads(tmp_path: Path) -> None:
    """Changes of a tenth of the weights cost a bit where W' lies in a higher binade, and nothing elsewhere."""
    base = save_base(tmp_path / "base", {"a.weight": random(1024, 1024, scale=0.02, dtype=torch.bfloat16)})
    adapter = save_adapter(tmp_path / "adapter", lora({"a": (1024, 1024)}, rank=8, scale=0.026))
    delta = lora({"a": (1024, 1024)}, rank=8, scale=0.026).delta("a")
    assert 0.0015 < float(delta.std()) < 0.0025
    kept = [merge(base, [adapter], tmp_path / f"merged{n}", keep_residual=True, threads=n).residual for n in (1, 3)]
    W = load(base)["a.weight"].double()
    after = load(tmp_path / "merged1")["a.weight"].double()
    spread = (after.abs().log2().floor() - W.abs().log2().floor()).clamp(min=0)
    assert kept[0] is not None
    assert kept[0].touched == 2 << 20
    bits = 8 * (kept[0].nbytes - 500)
    assert 0.8 * float(spread.sum()) < bits < 1.35 * float(spread.sum())
    assert kept[0].share < 0.03
    one, three = ((tmp_path / f"merged{n}" / RESIDUAL).read_bytes() for n in (1, 3))
    assert one == three


def test_dora_is_undone_bit_by_bit(tmp_path: Path) -> None:
    base, _, _ = prepare(tmp_path)
    W = load(base)
    folders = []
    for i, shapes in enumerate([SHAPES, {"block.0.up": SHAPES["block.0.up"]}]):
        one = lora(shapes, rank=4, seed=10 + i, scale=0.03, settings={"use_dora": True})
        folders.append(save_adapter(tmp_path / f"dora{i}", one))
        tensors = load_file(folders[-1] / "adapter_model.safetensors")
        for module in shapes:
            norms = W[f"{module}.weight"].float().norm(dim=1)
            tensors[f"base_model.model.{module}.lora_magnitude_vector"] = norms * (1 + 0.1 * random(len(norms)))
        save_file(tensors, folders[-1] / "adapter_model.safetensors", {"format": "pt"})
    report = merge(base, folders, tmp_path / "merged", keep_residual=True)
    found = unmerge(tmp_path / "merged", folders, tmp_path / "unmerged")
    assert (found.method, found.proved, found.restored) == ("residual", "root hash", 3)
    assert report.residual is not None
    assert report.residual.share < 0.1
    expect_same(base, tmp_path / "unmerged")


def test_cast_and_cut_anew_comes_back_as_it_was(tmp_path: Path) -> None:
    base, adapters, _ = prepare(tmp_path, "F16", shards=2)
    merge(base, adapters[:1], tmp_path / "merged", dtype="F32", max_shard_size=400_000, keep_residual=True)
    found = unmerge(tmp_path / "merged", adapters[:1], tmp_path / "unmerged")
    assert found.restored == 4
    expect_same(base, tmp_path / "unmerged")
    merge(base, adapters[:1], tmp_path / "narrow", dtype="BF16", keep_residual=True)
    unmerge(tmp_path / "narrow", adapters[:1], tmp_path / "widened")
    expect_same(base, tmp_path / "widened")


def test_untied_head_goes_away_again(tmp_path: Path) -> None:
    weights = {"model.embed_tokens.weight": random(64, 32, dtype=torch.bfloat16), "model.norm.weight": random(32)}
    base = save_base(tmp_path / "base", weights, model_type="llama", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", lora({"lm_head": (64, 32)}))
    for tied in ("untie", "both"):
        merge(base, [adapter], tmp_path / tied, tied=tied, keep_residual=True)
        unmerge(tmp_path / tied, [adapter], tmp_path / f"un{tied}")
        expect_same(base, tmp_path / f"un{tied}")
        assert json.loads((tmp_path / f"un{tied}" / "config.json").read_text()) == json.loads(
            (base / "config.json").read_text()
        )


def test_base_at_hand_is_copied_and_checked(tmp_path: Path) -> None:
    base, adapters, weights = prepare(tmp_path, shards=2)
    (base / "tokenizer.json").write_text("{}")
    merge(base, adapters, tmp_path / "merged", weights=weights)
    found = unmerge(tmp_path / "merged", adapters, tmp_path / "unmerged", base=base)
    assert (found.method, found.proved, found.error_bound) == ("base", "tensor digests", 0)
    assert {p.name: p.read_bytes() for p in base.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "unmerged").iterdir()
    }
    (tmp_path / "merged" / RECORD).unlink()
    found = unmerge(tmp_path / "merged", adapters, tmp_path / "again", base=base, weights=weights)
    assert found.proved == "verify"
    assert found.restored == 3
    other = save_base(tmp_path / "other", weights_of(torch.bfloat16, scale=0.06), 2)
    with pytest.raises(WrongBase, match=r"not .*other with these adapters"):
        unmerge(tmp_path / "merged", adapters, tmp_path / "wrong", base=other, weights=weights)


def test_wrong_base_is_refused_by_the_record(tmp_path: Path) -> None:
    base, adapters, weights = prepare(tmp_path)
    merge(base, adapters, tmp_path / "merged", weights=weights)
    other = save_base(tmp_path / "other", weights_of(torch.bfloat16, scale=0.06))
    with pytest.raises(WrongBase, match="3 changed tensor"):
        unmerge(tmp_path / "merged", adapters, tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_approximate_result_is_within_its_bound(dtype: str, tmp_path: Path) -> None:
    base, adapters, weights = prepare(tmp_path, dtype, size=0.3)
    merge(base, adapters, tmp_path / "merged", weights=weights)
    found = unmerge(tmp_path / "merged", adapters, tmp_path / "unmerged")
    assert (found.method, found.proved, found.root) == ("approximate", None, None)
    W, back = load(base), load(tmp_path / "unmerged")
    worst = max(float((W[name].double() - back[name].double()).abs().max()) for name in W)
    # The bound on float32 sums is that of the worst order of summation, which shows where nothing else is rounded.
    assert found.error_bound / (400 if dtype == "F32" else 40) < worst <= found.error_bound
    assert any(not same_bytes(W[name], back[name]) for name in W)
    assert json.loads((tmp_path / "unmerged" / RECORD).read_text())["approximate"] is True


def test_one_of_two_is_taken_out_approximately_but_never_exactly(tmp_path: Path) -> None:
    base, adapters, weights = prepare(tmp_path)
    merge(base, adapters, tmp_path / "merged", weights=weights, keep_residual=True)
    with pytest.raises(IncompatibleAdapter, match="holds 1 more adapter"):
        unmerge(tmp_path / "merged", adapters[:1], tmp_path / "out")
    (tmp_path / "merged" / RESIDUAL).unlink()
    unmerge(tmp_path / "merged", adapters[:1], tmp_path / "out")
    only = merge(base, adapters[1:], tmp_path / "only", weights=weights[1:])
    assert only.changed == 2
    for name, W in load(tmp_path / "only").items():
        assert torch.allclose(W.double(), load(tmp_path / "out")[name].double(), rtol=2**-6, atol=2**-8)


def test_adapter_that_was_not_merged_is_refused(tmp_path: Path) -> None:
    base, adapters, _ = prepare(tmp_path)
    merge(base, adapters[:1], tmp_path / "merged", keep_residual=True)
    with pytest.raises(IncompatibleAdapter, match="does not list"):
        unmerge(tmp_path / "merged", adapters[1:], tmp_path / "out")
    with pytest.raises(IncompatibleAdapter, match="does not list"):
        unmerge(tmp_path / "merged", adapters[:1] * 2, tmp_path / "out")
    with pytest.raises(IncompatibleAdapter, match="does not list"):
        unmerge(tmp_path / "merged", adapters[:1], tmp_path / "out", weights=[2.0])


def test_changed_model_or_residual_is_found_out(tmp_path: Path) -> None:
    base, adapters, _ = prepare(tmp_path)
    merge(base, adapters, tmp_path / "merged", keep_residual=True)
    spec = Checkpoint.open(tmp_path / "merged").specs["norm.weight"]
    touched = shutil.copytree(tmp_path / "merged", tmp_path / "touched")
    flip(touched / "model.safetensors", spec.start)
    with pytest.raises(WrongBase, match="not the base model that was merged"):
        unmerge(touched, adapters, tmp_path / "out")
    residual = Residual.open(tmp_path / "merged" / RESIDUAL)
    for name, blob in residual.tensors.items():
        for at in range(blob.start, blob.stop, max(1, blob.nbytes // 40)):
            flip(tmp_path / "merged" / RESIDUAL, at)
            with pytest.raises((WrongBase, BadFile)):
                unmerge(tmp_path / "merged", adapters, tmp_path / "out")
            flip(tmp_path / "merged" / RESIDUAL, at)
        assert not (tmp_path / "out").exists(), name
    unmerge(tmp_path / "merged", adapters, tmp_path / "out")


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


def test_description_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    base, adapters, _ = prepare(tmp_path)
    merge(base, adapters, tmp_path / "merged", keep_residual=True)
    path = tmp_path / "merged" / RESIDUAL
    raw = path.read_bytes()
    assert raw.count(b"model.safetensors") == 1
    path.write_bytes(raw.replace(b"model.safetensors", b"../.. fetensors!!"[:9] + b"/evil.st"))
    with pytest.raises(BadFile, match="layout"):
        unmerge(tmp_path / "merged", adapters, tmp_path / "out")
