"""The safetensors header: at least as strict as the library, and written canonically."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from loratools.errors import BadFile
from loratools.storage import dtypes, header
from loratools.storage.header import encode_header, read_header

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""The dtypes of safetensors 0.8, from its source."""


def file_of(path: Path, text: str | bytes, data: bytes = b"") -> Path:
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), start: Any = 0, stop: Any = 4) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, stop]})


def library_accepts(path: Path) -> bool:
    try:
        safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError:
        return False
    return True


def refusal(path: Path, match: str) -> BadFile:
    with pytest.raises(BadFile, match=match) as caught:
        read_header(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_has_the_library_s_size(tmp_path: Path, dtype: str) -> None:
    """A size off by one element is refused by both; the exact one is accepted by both."""
    assert dtypes.bits(dtype) == BITS[dtype]
    size = 3 * 8 * BITS[dtype] // 8
    step = max(1, BITS[dtype] // 8)
    for wrong in (-step, 0, step):
        path = file_of(tmp_path / "x", f'{{"w":{entry(dtype, [3, 8], 0, size + wrong)}}}', bytes(size + wrong))
        assert library_accepts(path) == (wrong == 0)
        if wrong:
            refusal(path, rf"'w': {dtype} of shape \[3, 8\] takes {size} bytes, its offsets {size + wrong}")
        else:
            (spec,) = read_header(path).tensors.values()
            assert (spec.dtype, spec.shape, spec.nbytes, spec.parameters) == (dtype, (3, 8), size, 24)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_packed_dtypes_must_fill_their_bytes(tmp_path: Path, dtype: str) -> None:
    path = file_of(tmp_path / "x", f'{{"w":{entry(dtype, [3], 0, 2)}}}', bytes(2))
    assert not library_accepts(path)
    refusal(path, "takes [0-9.]+ bytes")


def test_the_library_s_files_are_read(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2, 3, dtype=torch.bfloat16), "a": torch.arange(5), "s": torch.tensor(1.5)}
    tensors |= {"none": torch.zeros(0, 7), "ключ \n\"'": torch.zeros(1, dtype=torch.bool)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, {"format": "pt", "note": "é"}))
    found = read_header(path)
    assert found.metadata == {"format": "pt", "note": "é"}
    raw = path.read_bytes()
    assert found.tensors.keys() == tensors.keys()
    for name, spec in found.tensors.items():
        flat = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        assert raw[spec.start : spec.stop] == bytes(flat.numpy())
        assert spec.shape == tuple(tensors[name].shape)
        assert spec.dtype == dtypes.from_torch(tensors[name].dtype)
    assert min(spec.start for spec in found.tensors.values()) == 8 + int.from_bytes(raw[:8], "little")


ONE = entry()
REFUSED = [
    # text of the header, bytes of data, what the sentence says, whether the library refuses it too
    ("", 0, "begins with ''", True),
    (" {}", 0, "begins with ' {}'", False),
    ("\ufeff{}", 0, "begins with", True),
    ("[]", 0, "begins with", True),
    ("{", 0, "damaged JSON", True),
    ("{}x", 0, "damaged JSON", True),
    ("{} \x00", 0, "damaged JSON", True),
    (b'{"\xff":1}', 0, "not valid UTF-8", True),
    (f'{{"w":{ONE},}}', 4, "damaged JSON", True),
    (f'{{"w":{ONE},"w":{ONE}}}', 4, "'w' occurs twice", False),
    (f'{{"w":{ONE[:-1]},"dtype":"F32"}}}}', 4, "'dtype' occurs twice", True),
    ('{"__metadata__":{"a":"1","a":"2"}}', 0, "'a' occurs twice", False),
    (f'{{"__metadata__":{{"a":"1"}},"__metadata__":{ONE}}}', 4, "'__metadata__' occurs twice", True),
    (f'{{"__metadata__":{{"a":"1"}},"w":{ONE},"__metadata__":{{"a":"1"}}}}', 4, "'__metadata__' occurs twice", True),
    ('{"__metadata__":{"a":1}}', 0, "__metadata__ must map strings to strings", True),
    ('{"__metadata__":[]}', 0, "__metadata__ must map strings to strings", True),
    ('{"__metadata__":"x"}', 0, "__metadata__ must map strings to strings", True),
    ('{"w":[]}', 0, "expected exactly dtype, shape and data_offsets", True),
    ('{"w":null}', 0, "expected exactly dtype, shape and data_offsets", True),
    ('{"w":{"dtype":"F32","shape":[1]}}', 4, "expected exactly dtype, shape and data_offsets", True),
    (f'{{"w":{ONE[:-1]},"x":1}}}}', 4, "expected exactly dtype, shape and data_offsets", False),
    (f'{{"w":{entry("f32")}}}', 4, "unknown dtype 'f32'", True),
    (f'{{"w":{entry(None)}}}', 4, "unknown dtype None", True),  # type: ignore[arg-type]
    (f'{{"w":{entry([])}}}', 4, r"unknown dtype \[\]", True),  # type: ignore[arg-type]
    (f'{{"w":{entry(shape=[1.0])}}}', 4, "lists of natural numbers", True),
    (f'{{"w":{entry(shape=[-1])}}}', 4, "lists of natural numbers", True),
    (f'{{"w":{entry(shape=[True])}}}', 4, "lists of natural numbers", True),
    (f'{{"w":{entry(shape=["1"])}}}', 4, "lists of natural numbers", True),
    (f'{{"w":{entry(shape=1)}}}', 4, "lists of natural numbers", True),
    (f'{{"w":{entry(shape=None)}}}', 4, "lists of natural numbers", True),
    (f'{{"w":{entry(start=None)}}}', 4, "lists of natural numbers", True),
    ('{"w":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', 4, "lists of natural numbers", True),
    ('{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}}', 4, "lists of natural numbers", True),
    ('{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0, "lists of natural numbers", True),
    ('{"w":{"dtype":"F32","shape":[0],"data_offsets":[-0,0]}}', 0, "lists of natural numbers", True),
    ('{"w":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}', 4, "damaged JSON", True),
    ('{"w":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', 4, "lists of natural numbers", True),
    ('{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', 4, "NaN is not a JSON number", True),
    ('{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}', 4, "Infinity is not a JSON number", True),
    (f'{{"w":{entry(shape=[2**64])}}}', 4, "lists of natural numbers", True),
    (f'{{"w":{entry(shape=[2**63, 2])}}}', 4, "larger than any file", True),
    (f'{{"w":{entry(shape=[2**63, 4, 0], stop=0)}}}', 0, "larger than any file", True),
    (f'{{"w":{entry(shape=[2**62], stop=0)}}}', 0, "takes .* bytes, its offsets 0", True),
    ('{"w":{"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,4]}}', 4, "beyond every float", True),
    (f'{{"w":{entry(start=4, stop=0)}}}', 4, "takes 4 bytes, its offsets -4", True),
    (f'{{"w":{entry(start=2**64 - 4, stop=2**64)}}}', 4, "natural numbers", True),
    (f'{{"w":{entry(start=1, stop=5)}}}', 5, "a hole before it", True),
    (f'{{"w":{ONE},"v":{ONE}}}', 4, "overlaps another tensor", True),
    (f'{{"w":{ONE},"v":{entry(start=8, stop=12)}}}', 12, "'v': a hole before it", True),
    (f'{{"w":{entry(shape=[2], stop=8)},"v":{entry(start=4, stop=8)}}}', 8, "'v': it overlaps another tensor", True),
    (f'{{"w":{ONE}}}', 3, "truncated: the header describes", True),
    (f'{{"w":{ONE}}}', 5, "bytes after the last tensor", True),
    ("{}", 1, "bytes after the last tensor", True),
    ('{"\\ud800":1}', 0, "not valid UTF-8", True),
    ('{"__metadata__":{"a":"\\udc00"}}', 0, "not valid UTF-8", True),
    ('{"a\nb":1}', 0, "damaged JSON: Invalid control character", True),
    ('{"w":' + "[" * 100_000 + "]" * 100_000 + "}", 0, "nested too deeply|expected exactly", True),
    ('{"w":' + '{"a":' * 100_000 + "1" + "}" * 100_000 + "}", 0, "nested too deeply|expected exactly", True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "data", "match", "library"), REFUSED, ids=range(len(REFUSED)))
def test_faults_are_refused_by_their_sentence(
    tmp_path: Path, text: str | bytes, data: int, match: str, library: bool
) -> None:
    path = file_of(tmp_path / "x.safetensors", text, bytes(data))
    assert library_accepts(path) != library
    refusal(path, match)


@pytest.mark.parametrize(("text", "data", "match", "library"), [case for case in REFUSED if case[0][:4] == '{"w"'])
def test_so_are_faults_behind_metadata_that_are_read_apart(
    tmp_path: Path, text: str, data: int, match: str, library: bool
) -> None:
    path = file_of(tmp_path / "x.safetensors", '{"__metadata__":{"a":"1"},' + text[1:], bytes(data))
    assert library_accepts(path) != library
    refusal(path, match)


@pytest.mark.parametrize(
    "text",
    ["{}", "{}   ", '{"__metadata__":null}', '{"__metadata__":{}}',
     '{ "w" :\n\t{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
     '{"\\ud83d\\ude00":{"dtype":"U8","shape":[0,18446744073709551615],"data_offsets":[0,0]}}',
     '{"\\\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'],
)  # fmt: skip
def test_odd_but_sound_headers_are_read_as_the_library_reads_them(tmp_path: Path, text: str) -> None:
    path = file_of(tmp_path / "x", text)
    expected = {name: tuple(info["shape"]) for name, info in safetensors.deserialize(path.read_bytes())}
    assert {name: spec.shape for name, spec in read_header(path).tensors.items()} == expected


def test_several_empty_tensors_share_a_place(tmp_path: Path) -> None:
    empty = entry(shape=[0], start=4, stop=4)
    path = file_of(tmp_path / "x", f'{{"b":{empty},"w":{ONE},"a":{empty},"c":{entry(shape=[0], stop=0)}}}', bytes(4))
    assert library_accepts(path)
    assert set(read_header(path).tensors) == {"a", "b", "c", "w"}


@pytest.mark.parametrize("text", ["# A model\n\nof ours", "\ufeff<!DOCTYPE html>", "\n\n  größer  und größer, sehr"])
def test_a_text_is_no_safetensors_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text + " " * 99, encoding="utf-8")
    assert not library_accepts(path)
    line = text.strip("\ufeff\n ").split("\n")[0][:10]
    refusal(path, f"not a safetensors file but a text, which begins with '{line}")


@pytest.mark.parametrize("size", range(8))
def test_files_without_a_whole_length_prefix(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\0" * size)
    assert not library_accepts(path)
    refusal(path, f"not a safetensors file, or truncated: found {size} bytes")


def test_a_claim_of_a_giant_header_costs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for length in (header.MAX_HEADER, header.MAX_HEADER + 1, 2**62, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b'{"w":')
        tracemalloc.start()
        refusal(path, f"a header of {length} bytes in a file of 13")
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()


def test_the_limit_of_the_header_is_the_library_s(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with path.open("wb") as file:  # sparse: claims more than the limit, and is as long as it says
        file.write((header.MAX_HEADER + 1).to_bytes(8, "little") + b"{}")
        file.truncate(8 + header.MAX_HEADER + 1)
    with pytest.raises(safetensors.SafetensorError, match=r"HeaderTooLarge|header too large"):
        safetensors.safe_open(path, "pt")
    tracemalloc.start()
    refusal(path, "the header is 100000001 bytes long")
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_pointers_folders_pipes_and_missing_files(tmp_path: Path) -> None:
    pointer = tmp_path / "model.safetensors"
    pointer.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 99\n")
    assert "git lfs pull" in str(refusal(pointer, "Git-LFS pointer").hint)
    refusal(tmp_path / "nothing", "no such file")
    refusal(tmp_path, "cannot be read: Is a directory")
    os.mkfifo(tmp_path / "pipe")
    refusal(tmp_path / "pipe", "not a regular file")
    (tmp_path / "link").symlink_to("nowhere")
    refusal(tmp_path / "link", "no such file")


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(suppress_health_check=[HealthCheck.too_slow])  # texts are slow to draw on a busy machine
@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(["F32", "BF16", "U8", "I64", "BOOL"]), SHAPES), max_size=6),
    st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=3),
)
def test_the_library_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    metadata: dict[str, str],
) -> None:
    sized = [(name, dtype, shape, header.nbytes(dtype, shape)) for name, (dtype, shape) in tensors.items()]
    written = encode_header(sized, metadata)
    assert len(written) % 8 == 0
    assert encode_header(sized, dict(reversed(metadata.items()))) == written
    data = bytes(range(256)) * 8
    whole = written + data[: sum(size for *_, size in sized)]
    found = {name: (info["dtype"], tuple(info["shape"]), info["data"]) for name, info in safetensors.deserialize(whole)}
    at, expected = 0, {}
    for name, dtype, shape, size in sized:
        expected[name] = (dtype, shape, bytearray(data[at : at + size]))
        at += size
    assert found == expected
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    path.write_bytes(whole)
    again = read_header(path)
    assert again.metadata == metadata
    assert {name: (spec.dtype, spec.shape) for name, spec in again.tensors.items()} == tensors


def test_canonical_bytes() -> None:
    raw = encode_header([("b", "BF16", (2, 3), 12), ("a", "F32", (), 4)], {"z": "1", "format": "pt"})
    text = (
        '{"__metadata__":{"format":"pt","z":"1"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        '"a":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}'
    )
    padded = text.encode() + b" " * (-len(text) % 8)
    assert raw == len(padded).to_bytes(8, "little") + padded
    assert encode_header([]) == (8).to_bytes(8, "little") + b"{}      "
    loaded = load(raw + bytes(12) + b"\x00\x00\x80\x3f")
    assert loaded["a"].item() == 1.0
