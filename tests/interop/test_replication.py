"""Adapters of a model with repeated layers: merged, they are the larger model that PEFT runs and cannot merge."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools import dialects
from loratools.errors import BadFile, IncompatibleAdapter, LossyConversion, WrongBase
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.convert import convert
from loratools.surgery.hash import hash_checkpoint
from loratools.surgery.merge import merge
from loratools.surgery.switch import switch
from loratools.surgery.unmerge import unmerge
from loratools.surgery.validate import validate
from loratools.surgery.verify import verify
from tests.interop.models import FAMILIES, V, load
from tests.interop.test_kinds import train
from tests.interop.test_whole import config_of, saved

library = pytest.importorskip("peft")
pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]

RANGES = [[0, 2], [1, 3], [0, 1]]
ORDER = [0, 1, 1, 2, 0]
SCALING = 10 / 4


def made(folder: Path, family: str = "llama", ranges: Any = RANGES, **changes: Any) -> Any:
    """Save a base of three layers and an adapter of the model with more; return the PEFT model."""
    base = saved(family, folder / "base", num_hidden_layers=3, **changes)
    peft = train(base, target_modules=list(FAMILIES[family].targets), layer_replication=ranges)
    peft.save_pretrained(folder / "adapter")
    return peft


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "bert"])
@pytest.mark.parametrize("shard", [None, "20KB"], ids=["one", "sharded"])
def test_the_merged_model_is_what_peft_runs(family: str, shard: str | None, tmp_path: Path) -> None:
    peft = made(tmp_path, family).eval()
    if shard:
        model = type(peft.base_model.model).from_pretrained(tmp_path / "base")
        shutil.rmtree(tmp_path / "base")
        model.save_pretrained(tmp_path / "base", max_shard_size=shard)
        assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    if kinds := getattr(peft.config, "layer_types", None):  # PEFT leaves them, and then the model cannot run
        peft.config.layer_types = [kinds[layer] for layer in ORDER]
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    ours = type(peft.base_model.model).from_pretrained(tmp_path / "ours").eval()
    assert ours.config.num_hidden_layers == len(ORDER)
    tokens = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0], peft(tokens)[0], rtol=1e-5, atol=1e-5)
    (account,) = report.consumed
    assert account.applied == len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == account.tensors
    assert report.tensors == len(load(tmp_path / "ours"))
    assert verify(tmp_path / "ours", tmp_path / "base", [tmp_path / "adapter"], exact=True).ok
    assert getattr(ours.config, "layer_types", None) == getattr(peft.config, "layer_types", None)


def test_every_tensor_is_that_of_its_layer(tmp_path: Path) -> None:
    made(tmp_path)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    W, factors = load(tmp_path / "base"), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = load(tmp_path / "ours")
    wanted = {name: tensor for name, tensor in W.items() if ".layers." not in name}
    for new, old in enumerate(ORDER):
        for name, tensor in W.items():
            if name.startswith(f"model.layers.{old}."):
                own = name.replace(f".{old}.", f".{new}.", 1)
                pair = [factors.get(f"base_model.model.{own[:-7]}.lora_{part}.weight") for part in "AB"]
                change = SCALING * pair[1].double() @ pair[0].double() if pair[0] is not None else 0  # type: ignore[union-attr]
                wanted[own] = (tensor.double() + change).float()
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-6, atol=1e-7)


def test_layers_may_be_left_out(tmp_path: Path) -> None:
    made(tmp_path, ranges=[[0, 1], [2, 3]])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "ours")
    W, ours = load(tmp_path / "base"), load(tmp_path / "ours")
    assert config_of(tmp_path / "ours")["num_hidden_layers"] == 2
    assert torch.equal(ours["model.layers.1.mlp.up_proj.weight"], W["model.layers.2.mlp.up_proj.weight"])
    assert not [name for name in ours if name.startswith("model.layers.2.")]


def test_the_base_leads_back_and_nothing_else_does(tmp_path: Path) -> None:
    made(tmp_path)
    base, adapter, ours = (tmp_path / name for name in ("base", "adapter", "ours"))
    merge(base, [adapter], ours)
    root = hash_checkpoint(Checkpoint.open(base)).root
    undone = unmerge(ours, [adapter], tmp_path / "back", base=base)
    assert (undone.proved, undone.root) == ("tensor digests", root)
    other = saved("llama", tmp_path / "other", num_hidden_layers=3)
    with torch.no_grad():
        other.model.layers[2].self_attn.q_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBase, match=r"layers\.2\.self_attn\.q_proj"):
        unmerge(ours, [adapter], tmp_path / "wrong", base=tmp_path / "other")
    with pytest.raises(IncompatibleAdapter, match="the merge repeated layers"):
        unmerge(ours, [adapter], tmp_path / "wrong")
    with pytest.raises(IncompatibleAdapter, match="an adapter that is put in repeats layers"):
        switch(ours, [adapter], [adapter], tmp_path / "wrong")
    with pytest.raises(IncompatibleAdapter, match="repeats its layers"):
        merge(base, [adapter], tmp_path / "wrong", keep_residual=True)
    assert not (tmp_path / "wrong").exists()


def test_adapters_of_one_larger_model_merge_together(tmp_path: Path) -> None:
    peft = made(tmp_path)
    peft.save_pretrained(tmp_path / "again")
    merge(tmp_path / "base", [tmp_path / "adapter", tmp_path / "again"], tmp_path / "ours", weights=[0.25, 0.75])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "one")
    model = load(tmp_path / "one")
    for name, tensor in load(tmp_path / "ours").items():
        torch.testing.assert_close(tensor, model[name], rtol=1e-6, atol=1e-7)
    plain = train(type(peft.base_model.model).from_pretrained(tmp_path / "base"), target_modules=["q_proj"])
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(IncompatibleAdapter, match="models of different layers"):
        merge(tmp_path / "base", [tmp_path / "adapter", tmp_path / "plain"], tmp_path / "both")


def test_a_base_without_these_layers_is_refused(tmp_path: Path) -> None:
    made(tmp_path)
    saved("llama", tmp_path / "short", num_hidden_layers=2)
    with pytest.raises(IncompatibleAdapter, match="repeats layers up to 2") as refusal:
        merge(tmp_path / "short", [tmp_path / "adapter"], tmp_path / "ours")
    assert "the base has 2 layers in model.layers" in str(refusal.value)
    saved("t5", tmp_path / "t5")
    with pytest.raises(IncompatibleAdapter, match="no list of layers"):
        merge(tmp_path / "t5", [tmp_path / "adapter"], tmp_path / "ours")


@pytest.mark.parametrize("dialect", ["mlx", "gguf"])
def test_other_dialects_name_the_loss(dialect: str, tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(LossyConversion, match="layer_replication"):
        convert(tmp_path / "adapter", tmp_path / "out", to=dialect)


def test_sealed_it_is_the_same_adapter(tmp_path: Path) -> None:
    """The hash is that of the base's own files, the layers an extension that must be understood; PEFT reads them."""
    peft = made(tmp_path).eval()
    base, sealed = tmp_path / "base", tmp_path / "sealed"
    written = convert(tmp_path / "adapter", sealed, base=base)
    assert written.base is not None
    assert (written.base.schema, written.base.root) == (hash_checkpoint(base).schema, hash_checkpoint(base).root)
    assert written.base.model_type == "llama"
    assert {name.split(".")[2] for name in written.base.tensors} == {"0", "1", "2"}
    assert validate(sealed, base).valid
    again = dialects.open_adapter(sealed)
    assert again.settings["layer_replication"] == RANGES
    assert again.settings["loratools"]["extensions"][0]["name"] == "layer_replication"
    for name, adapter in (("plain", tmp_path / "adapter"), ("bound", sealed)):
        merge(base, [adapter], tmp_path / name)
    plain, bound = load(tmp_path / "plain"), load(tmp_path / "bound")
    assert plain.keys() == bound.keys()
    assert all(torch.equal(plain[name], bound[name]) for name in plain)
    tokens = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))
    theirs = library.PeftModel.from_pretrained(type(peft.base_model.model).from_pretrained(base), sealed).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens)[0], peft(tokens)[0], rtol=0, atol=0)


def test_peft_reads_it_back(tmp_path: Path) -> None:
    made(tmp_path)
    written = convert(tmp_path / "adapter", tmp_path / "out", to="peft", base=tmp_path / "base")
    assert asdict(written)["losses"] == ()
    assert dialects.open_adapter(tmp_path / "out").settings["layer_replication"] == RANGES


@pytest.mark.parametrize("ranges", [[[0, 5000]], [[2, 1]], [[0, 1, 2]], [0, 1], "all", [[-1, 2]], [[0, 1.0]]])
def test_ranges_that_are_none(ranges: Any, tmp_path: Path) -> None:
    made(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_replication": ranges}))
    with pytest.raises(BadFile) as refusal:
        dialects.open_adapter(tmp_path / "adapter")
    assert "layer_replication: expected pairs [start, stop] of layers" in str(refusal.value)
