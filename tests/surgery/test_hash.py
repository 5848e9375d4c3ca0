"""The base hash against its construction written out with hashlib, and against everything it must not depend on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

import loratools
from loratools.dialects import open_adapter
from loratools.errors import BadFile, InvalidOption, LoraToolsError
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.hash import hash_checkpoint, hash_tensors, hashing
from tests.make import fp8, tiny

NAMES = {torch.bfloat16: b"BF16", torch.float32: b"F32", torch.int64: b"I64"}
HASHES = {"sha256": hashlib.sha256, "blake3": blake3}


def u64(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def signature(tensor: torch.Tensor) -> bytes:
    return NAMES[tensor.dtype] + b"\0" + u64(tensor.dim(), *tensor.shape)


def by_hand(weights: dict[str, torch.Tensor], algorithm: str) -> tuple[str, dict[str, str], str]:
    """Return the three tiers as spec/v1 constructs them."""
    H = HASHES[algorithm]
    names = sorted(weights, key=str.encode)
    schema = H(b"loratools.schema.v1\0" + b"".join(n.encode() + b"\0" + signature(weights[n]) for n in names))
    digests = {
        name: H(b"loratools.tensor.v1\0" + signature(W) + bytes(W.contiguous().flatten().view(torch.uint8).numpy()))
        for name, W in weights.items()
    }
    root = H(b"loratools.model.v1\0" + b"".join(n.encode() + b"\0" + digests[n].digest() for n in names))
    written = {name: f"{algorithm}:{digest.hexdigest()}" for name, digest in digests.items()}
    return f"{algorithm}:{schema.hexdigest()}", written, f"{algorithm}:{root.hexdigest()}"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A tiny Llama, and tensors of awkward sizes: none, scalar, one byte more than a chunk, names outside ASCII."""
    odd = torch.arange((1 << 17) + 1, dtype=torch.int64)
    return tiny.llama_weights() | {
        "odd": odd,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
        "ünïcode": torch.ones(2),
        "z.\U0001f600": torch.ones(2),
    }


@pytest.mark.parametrize("algorithm", ["blake3", "sha256"])
def test_all_tiers_are_their_construction(algorithm: str, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    found = hash_checkpoint(Checkpoint.open(tmp_path), algorithm=algorithm)
    assert (found.schema, dict(found.tensors), found.root) == by_hand(weights, algorithm)


def test_hash_depends_on_neither_shards_nor_threads_nor_metadata(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    reversed_weights = dict(reversed(weights.items()))
    one = tiny.save_llama(tmp_path / "one", weights, shards=1)
    three = tiny.save_llama(tmp_path / "three", reversed_weights, shards=3)
    expected = hash_checkpoint(Checkpoint.open(one), threads=1)
    assert expected.root is not None
    for threads in (1, 2, 5):
        assert hash_checkpoint(Checkpoint.open(three), threads=threads) == expected


def test_one_flipped_bit_changes_its_tensor_and_the_root_only(prepared: Path, tmp_path: Path) -> None:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((prepared / "base").glob("*.safetensors")):
        weights |= load_file(file)
    before = hash_checkpoint(Checkpoint.open(prepared / "base"))
    touched = "model.layers.1.mlp.down_proj.weight"
    weights[touched].view(torch.int16)[5, 7] ^= 1
    after = hash_checkpoint(Checkpoint.open(tiny.save_llama(tmp_path / "flipped", weights)))
    assert after.schema == before.schema
    assert after.root != before.root
    assert {name for name in weights if after.tensors[name] != before.tensors[name]} == {touched}


def test_tiers_are_read_only_as_asked(prepared: Path) -> None:
    base = Checkpoint.open(prepared / "base")
    read: list[int] = []
    schema = hash_checkpoint(base, ("schema",), progress=read.append)
    assert (schema.tensors, schema.root, sum(read)) == ({}, None, 0)
    root = hash_checkpoint(base, ("root",), progress=read.append)
    assert (root.schema, root.tensors, sum(read)) == (None, {}, base.nbytes)


def test_include_reads_and_names_what_matches(prepared: Path) -> None:
    base = Checkpoint.open(prepared / "base")
    whole = hash_checkpoint(base)
    read: list[int] = []
    found = hash_checkpoint(base, ("tensors",), include=["*.q_proj.weight", "model.norm.*"], progress=read.append)
    expected = [name for name in base.specs if name.endswith("q_proj.weight") or name == "model.norm.weight"]
    assert sorted(found.tensors) == sorted(expected)
    assert all(found.tensors[name] == whole.tensors[name] for name in expected)
    assert sum(read) == sum(base.specs[name].nbytes for name in expected)
    with_root = hash_checkpoint(base, include=["model.norm.*"])
    assert (with_root.root, list(with_root.tensors)) == (whole.root, ["model.norm.weight"])


def test_a_pattern_without_match_is_an_error(prepared: Path) -> None:
    with pytest.raises(LoraToolsError, match=r"no tensor matches 'x_proj', 'y\*'"):
        hash_checkpoint(Checkpoint.open(prepared / "base"), include=["x_proj", "q_proj"], exclude="y*")


def test_patterns_are_those_of_every_command(prepared: Path) -> None:
    base = Checkpoint.open(prepared / "base")
    every = hash_checkpoint(base, "tensors").tensors
    chosen = hash_checkpoint(base, "tensors", include=["q_proj", "re:.*norm"], exclude="*.0.*").tensors
    expected = {name for name in every if ("q_proj" in name or "norm" in name) and ".0." not in name}
    assert chosen == {name: every[name] for name in expected} != {}
    assert hash_checkpoint(base, "tensors", exclude="q_proj").tensors.keys() == {n for n in every if "q_proj" not in n}


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(workplace: Path) -> None:
    base = Checkpoint.open(workplace / "base")
    shard = base.shards[0].path
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(LoraToolsError, match="became shorter"):
        hash_tensors(dict(base.specs), threads=2)


@pytest.mark.parametrize("beside", [False, True])
def test_what_is_hashed_beside_other_work_has_the_same_digests(prepared: Path, beside: bool) -> None:
    specs = Checkpoint.open(prepared / "base").specs
    with hashing(specs, beside=beside) as digests:
        assert digests() == hash_tensors(specs)


def test_an_error_of_what_is_hashed_beside_comes_where_it_is_asked_for(workplace: Path) -> None:
    base = Checkpoint.open(workplace / "base")
    base.shards[0].path.write_bytes(b"")
    with hashing(base.specs, beside=True) as digests, pytest.raises(BadFile, match="became shorter"):
        digests()
    with hashing(base.specs, beside=True):
        pass  # nobody asked


def test_a_callback_that_raises_stops_the_work(prepared: Path) -> None:
    """As Ctrl-C does: no thread goes on to the next tensor."""
    calls: list[int] = []

    def refuse(count: int) -> None:
        calls.append(count)
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        hash_checkpoint(Checkpoint.open(prepared / "base"), threads=1, progress=refuse)
    assert len(calls) == 1


@pytest.mark.real
def test_real_model_in_five_shards(real_models: Path) -> None:
    base = Checkpoint.open(real_models / "smol-base")
    found = hash_checkpoint(base)
    weights: dict[str, torch.Tensor] = {}
    for shard in base.shards:
        weights |= load_file(shard.path)
    assert (found.schema, dict(found.tensors), found.root) == by_hand(weights, "blake3")


def test_the_logical_hash_of_codes_is_the_root_of_the_dequantized_model(tmp_path: Path) -> None:
    fp8.save_llama(tmp_path / "codes", tiny.llama_weights())
    loratools.dequantize(tmp_path / "codes", tmp_path / "plain")
    codes, plain = hash_checkpoint(tmp_path / "codes"), hash_checkpoint(tmp_path / "plain")
    assert codes.logical == plain.root == plain.logical
    assert codes.root != plain.root
    assert (
        hash_checkpoint(tmp_path / "codes", "logical", "sha256").logical
        == by_hand(load_file(tmp_path / "plain" / "model.safetensors"), "sha256")[2]
    )


def test_codes_that_are_not_read_have_no_logical_hash(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "aqlm"}}')
    save_file(
        {"blk.q.codes": torch.ones(2, 2, dtype=torch.int8), "blk.q.codebooks": torch.ones(2, 2),
         "blk.q.scales": torch.ones(2, 1)}, tmp_path / "model.safetensors",
    )  # fmt: skip
    found = hash_checkpoint(tmp_path)
    assert found.root
    assert found.logical is None
    assert "its logical hash is left out" in caplog.text
    with pytest.raises(LoraToolsError, match="AQLM"):
        hash_checkpoint(tmp_path, "logical")


def test_the_root_of_an_adapter_is_by_hand_what_its_seal_records(workplace: Path) -> None:
    weights = load_file(workplace / "adapter" / "adapter_model.safetensors")
    schema, digests, root = by_hand(weights, "blake3")
    found = loratools.hash(workplace / "adapter")
    assert (found.schema, dict(found.tensors), found.root, found.logical) == (schema, digests, root, None)
    recorded = open_adapter(workplace / "sealed").settings["loratools"]["digest"]
    assert recorded == root == loratools.hash(workplace / "sealed", "root").root
    assert loratools.hash(workplace / "adapter", "root", "sha256").root == by_hand(weights, "sha256")[2]
    state = {name: tensor.clone() for name, tensor in weights.items()}
    config = (workplace / "adapter" / "adapter_config.json").read_bytes()
    in_memory = loratools.hash((state, json.loads(config)), ["root", "schema"])
    assert (in_memory.root, in_memory.schema) == (root, schema)
    (name, *_) = weights
    assert loratools.hash(workplace / "adapter", "tensors", include=name).tensors == {name: digests[name]}


@pytest.mark.parametrize("dialect", ["kohya", "mlx", "diffusers", "gguf", "torchtune", "loratools"])
def test_an_adapter_has_one_root_in_every_dialect_that_keeps_its_tensors(dialect: str, workplace: Path) -> None:
    target = workplace / ("other.gguf" if dialect == "gguf" else "other-dialect")
    source = open_adapter(workplace / "adapter")
    loratools.convert(source, target, to=dialect, base=workplace / "base", allow_loss=True)
    back = open_adapter(target, base=Checkpoint.open(workplace / "base"))
    assert loratools.hash(back, "root").root == loratools.hash(workplace / "adapter", "root").root


def test_an_adapter_that_was_changed_after_sealing_has_no_hash(workplace: Path) -> None:
    (file,) = (workplace / "sealed").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(BadFile, match="not those that were sealed"):
        loratools.hash(workplace / "sealed")
    with pytest.raises(InvalidOption, match="logical"):
        loratools.hash(workplace / "adapter", "logical")
    with pytest.raises(LoraToolsError, match=r"no tensor matches 'x\*'"):
        loratools.hash(workplace / "adapter", include="x*")
