"""Digests against hashlib over byte strings written by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import save_file

from loratools.errors import BadFile
from loratools.parallel import cores
from loratools.storage import digest, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec, read_header
from loratools.storage.lazy import LazyTensor, chunks_of_all

W = bytes([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
W_BYTES = (
    b"loratools.tensor.v1\x00" b"BF16\x00" b"\x02\x00\x00\x00\x00\x00\x00\x00"
    b"\x02\x00\x00\x00\x00\x00\x00\x00" b"\x03\x00\x00\x00\x00\x00\x00\x00" + W
)  # fmt: skip
S_BYTES = b"loratools.tensor.v1\x00F32\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x80\x3f"
SCHEMA_BYTES = (
    b"loratools.schema.v1\x00"
    b"s\x00F32\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    b"w\x00BF16\x00\x02\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00"
)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_tensors() -> None:
    assert digest.tensor("BF16", (2, 3), [W], "sha256") == f"sha256:{sha(W_BYTES)}"
    assert digest.tensor("F32", (), [b"\0\0", b"", b"\x80\x3f"], "sha256") == f"sha256:{sha(S_BYTES)}"
    assert digest.tensor("BF16", (2, 3), [W]) == f"blake3:{blake3(W_BYTES).hexdigest()}"


def test_schema_and_root() -> None:
    tensors = {"w": ("BF16", (2, 3)), "s": ("F32", ())}
    assert digest.schema(tensors, "sha256") == f"sha256:{sha(SCHEMA_BYTES)}"
    assert digest.schema(tensors) == f"blake3:{blake3(SCHEMA_BYTES).hexdigest()}"
    root = b"loratools.model.v1\x00" + b"s\x00" + bytes.fromhex(sha(S_BYTES)) + b"w\x00" + bytes.fromhex(sha(W_BYTES))
    digests = {"w": f"sha256:{sha(W_BYTES)}", "s": f"sha256:{sha(S_BYTES)}"}
    assert digest.root(digests, "sha256") == f"sha256:{sha(root)}"
    stored = {"w": LazyTensor.holding("BF16", (2, 3), memoryview(W))}
    stored["s"] = LazyTensor.holding("F32", (), memoryview(b"\0\0\x80\x3f"))
    assert digest.root_of_all(stored, chunks_of_all, "sha256") == digest.root(digests, "sha256")
    assert digest.root_of_all({}, chunks_of_all, "sha256") == digest.root({}, "sha256")
    assert digest.root({}, "sha256") == f"sha256:{sha(b'loratools.model.v1' + bytes(1))}"


@pytest.mark.parametrize("threads", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("sizes", [(40, 3, 30, 0, 25), (90,), (1, 1, 60), (0, 0)])
def test_a_root_does_not_depend_on_how_bytes_are_shared_out(
    sizes: tuple[int, ...], threads: int | None, tmp_path: Path
) -> None:
    """Tensors of so many MiB in two files; each share is read by a thread of its own."""
    whole = {f"t{n}": torch.full((size << 20,), n, dtype=torch.uint8) for n, size in enumerate(sizes)}
    for file in (0, 1):
        save_file({name: whole[name] for name in list(whole)[file::2]}, tmp_path / f"{file}.safetensors")
    specs = {**read_header(tmp_path / "0.safetensors").tensors, **read_header(tmp_path / "1.safetensors").tensors}
    shares: list[list[str]] = []

    def noted(tensors: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Iterator[memoryview]]]:
        shares.append(list(tensors))
        return files.chunks_of_all(tensors)

    root = digest.root_of_all(specs, noted, threads=threads)
    by_hand = b"loratools.model.v1\0"
    for name, tensor in sorted(whole.items()):
        head = b"loratools.tensor.v1\0U8\0" + (1).to_bytes(8, "little") + len(tensor).to_bytes(8, "little")
        by_hand += name.encode() + b"\0" + blake3(head + tensor.numpy().tobytes()).digest()
    assert root == f"blake3:{blake3(by_hand).hexdigest()}"
    assert sorted(name for share in shares for name in share) == sorted(whole)
    assert len(shares) <= max(1, min(threads or cores(), sum(sizes) // 16))
    if sizes == (40, 3, 30, 0, 25) and threads == 3:
        assert sorted(shares) == [["t0"], ["t2"], ["t4", "t1", "t3"]]


def test_what_a_share_raises_is_raised(tmp_path: Path) -> None:
    save_file({f"t{n}": torch.zeros(20 << 20, dtype=torch.uint8) for n in range(4)}, tmp_path / "a.safetensors")
    specs = read_header(tmp_path / "a.safetensors").tensors
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    for threads in (1, 2, 4):
        with pytest.raises(BadFile, match=r"a\.safetensors"):
            digest.root_of_all(specs, files.chunks_of_all, threads=threads)


def test_names_are_sorted_by_their_utf8_bytes() -> None:
    names = ["\U0001f600", "\uffff", "a", "Z", "é"]  # UTF-16 would put the first before the second
    ordered = ["Z", "a", "é", "\uffff", "\U0001f600"]
    signature = b"U8\x00" + bytes(8)
    expected = b"loratools.schema.v1\x00" + b"".join(name.encode() + b"\x00" + signature for name in ordered)
    assert digest.schema(dict.fromkeys(names, ("U8", ())), "sha256") == f"sha256:{sha(expected)}"


def test_everything_of_a_tensor_counts() -> None:
    variants = {
        digest.tensor("F32", (2, 2), [bytes(16)]),
        digest.tensor("F32", (4,), [bytes(16)]),
        digest.tensor("F32", (4, 1), [bytes(16)]),
        digest.tensor("I32", (4,), [bytes(16)]),
        digest.tensor("F32", (4,), [bytes(15) + b"\1"]),
    }
    assert len(variants) == 5


def test_a_name_cannot_play_two_tensors() -> None:
    # Without the rule these two models would have one schema: a name could hold the signature of another tensor.
    two = {"a": ("F32", (1,)), "b": ("F32", (1,))}
    one = {"a\0F32\0\1\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0b": ("F32", (1,))}
    assert digest.schema(two).startswith("blake3:")
    with pytest.raises(BadFile, match="NUL"):
        digest.schema(one)
    with pytest.raises(BadFile, match="NUL"):
        digest.root({"a\0": digest.tensor("U8", (), [b"x"])})


def test_only_registered_algorithms_and_well_formed_digests() -> None:
    for algorithm in digest.ALGORITHMS:
        assert digest.algorithm_of(f"{algorithm}:{'0a' * 32}") == algorithm
    for bad in (
        "md5:" + "0" * 64,
        "blake3:" + "0" * 63,
        "blake3:" + "A" * 64,
        "0" * 64,
        "",
        "blake3",
        "sha256:" + "٠" * 64,
    ):
        with pytest.raises(BadFile, match="is not a digest"):
            digest.algorithm_of(bad)
    with pytest.raises(BadFile, match="unknown digest algorithm 'md5'"):
        digest.new("md5")
    with pytest.raises(BadFile, match="'w' is not sha256"):
        digest.root({"w": digest.tensor("U8", (), [b"x"])}, "sha256")


def root_of(path: Path) -> tuple[str, str]:
    checkpoint = Checkpoint.open(path)
    tensors = {
        name: digest.tensor(spec.dtype, spec.shape, files.chunks(spec, 7)) for name, spec in checkpoint.specs.items()
    }
    return checkpoint.schema(), digest.root(tensors)


def test_sharding_order_header_text_and_container_do_not_count(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(3, 5, generator=generator).bfloat16() for i in range(4)}
    tensors |= {"norm": torch.randn(5, generator=generator), "empty": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "one.safetensors", {"format": "pt"})
    save_file(dict(reversed(tensors.items())), tmp_path / "bare.safetensors")
    torch.save(tensors, tmp_path / "model.bin")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-{i % 3 + 1:05d}-of-00003.safetensors"
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    roots = {root_of(tmp_path / name) for name in ("one.safetensors", "bare.safetensors", "model.bin", "sharded")}
    assert len(roots) == 1
    flipped = tensors | {"norm": -tensors["norm"]}
    save_file(flipped, tmp_path / "flipped.safetensors")
    schema, root = root_of(tmp_path / "flipped.safetensors")
    assert schema == next(iter(roots))[0]
    assert root != next(iter(roots))[1]
