"""Shard plans: pure, reproducible, and readable by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from loratools.storage.checkpoint import Checkpoint
from loratools.storage.layout import FilePlan, index_json, plan_file, plan_shards
from loratools.storage.sizes import parse_size

TENSORS = st.lists(
    st.tuples(st.sampled_from(["F32", "BF16", "U8"]), st.lists(st.integers(0, 6), max_size=3).map(tuple)), max_size=12
).map(lambda found: [(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(found)])
SIZE = {"F32": 4, "BF16": 2, "U8": 1}


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    size = SIZE[dtype]
    for side in shape:
        size *= side
    return size


def written(plan: FilePlan, fill: dict[str, bytes]) -> bytes:
    """Write a plan the way an executor does: the header, then each slot at its offset."""
    out = bytearray(plan.size)
    out[: len(plan.header)] = plan.header
    for slot in plan.slots:
        out[slot.offset : slot.offset + slot.nbytes] = fill[slot.name]
    return bytes(out)


@given(TENSORS, st.integers(1, 200))
def test_every_tensor_is_where_the_library_looks_for_it(
    tensors: list[tuple[str, str, tuple[int, ...]]], limit: int
) -> None:
    plans = plan_shards(tensors, limit, {"format": "pt"})
    assert plans == plan_shards(tensors, limit, {"format": "pt"})
    fill = {
        name: (i + 1).to_bytes(1, "little") * size_of(dtype, shape) for i, (name, dtype, shape) in enumerate(tensors)
    }
    found = {}
    for plan in plans:
        for name, info in safetensors.deserialize(written(plan, fill)):
            found[name] = (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
        used = sum(slot.nbytes for slot in plan.slots)
        assert used <= limit or sum(slot.nbytes > 0 for slot in plan.slots) == 1
    assert found == {name: (dtype, shape, fill[name]) for name, dtype, shape in tensors}
    assert [slot.name for plan in plans for slot in plan.slots] == [name for name, *_ in tensors]
    index = index_json(plans)
    assert index["metadata"] == {"total_size": sum(map(len, fill.values()))}
    assert index["weight_map"] == {slot.name: plan.name for plan in plans for slot in plan.slots}


def test_shards_are_filled_in_order_and_named_as_transformers_names_them() -> None:
    tensors = [("a", "F32", (10,)), ("b", "F32", (10,)), ("c", "F32", (100,)), ("d", "U8", (1,)), ("e", "U8", (0,))]
    plans = plan_shards(tensors, 80)
    assert [[slot.name for slot in plan.slots] for plan in plans] == [["a", "b"], ["c"], ["d", "e"]]
    assert [plan.name for plan in plans] == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [plan.name for plan in plan_shards(tensors, 10**6, stem="x")] == ["x.safetensors"]
    assert [plan.name for plan in plan_shards([], 1)] == ["model.safetensors"]


def test_the_index_opens_as_a_checkpoint(tmp_path: Path) -> None:
    tensors = [("a", "F4", (3, 2)), ("b", "BF16", (2, 2)), ("c", "U8", (5,))]
    fill = {"a": b"123", "b": b"12345678", "c": b"54321"}
    plans = plan_shards(tensors, 8)
    for plan in plans:
        (tmp_path / plan.name).write_bytes(written(plan, fill))
    document = index_json(plans, {"note": "x"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(document))
    checkpoint = Checkpoint.open(tmp_path)
    assert {name: (spec.dtype, spec.shape) for name, spec in checkpoint.specs.items()} == {
        name: (dtype, shape) for name, dtype, shape in tensors
    }
    assert checkpoint.nbytes == 16
    assert document["metadata"] == {"note": "x", "total_size": 16}
    for name, spec in checkpoint.specs.items():
        assert spec.file.read_bytes()[spec.start : spec.stop] == fill[name]


def test_a_given_header_is_kept_and_a_prefix_left_out() -> None:
    plan = plan_file("x.safetensors", [("unet.w", "U8", (2,))], prefix="unet.")
    ((name, info),) = safetensors.deserialize(plan.header + b"ab")
    assert (name, bytes(info["data"])) == ("w", b"ab")
    assert [slot.name for slot in plan.slots] == ["unet.w"]
    header = plan.header.replace(b"}}", b"}} ")
    again = plan_file("x.safetensors", [("unet.w", "U8", (2,))], header=header)
    assert (again.header, again.slots[0].offset, again.size) == (header, len(header), len(header) + 2)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2 << 30), ("1000000", 10**6), ("1.5 kb", 1500),
     (" 3tb ", 3 * 10**12),
     ("7KiB", 7168), ("0.5MiB", 1 << 19), ("1e3", 1000)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "five", "5 apples", "-5GB", "0", "0.1", "nan", "inf", "1e400", "5PB", "5G B", "--", "1,5GB", "5B5"],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)
