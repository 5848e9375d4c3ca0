"""GGUF files: counts, arrays, shapes, alignments."""

from __future__ import annotations

import struct
from pathlib import Path

from tests.make.hostile import hostile
from tests.make.hostile.headers import MILLION

INSPECT = "inspect x.gguf"
STRING, ARRAY, U8, U32 = 8, 9, 0, 4


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(
    folder: Path, fields: bytes = b"", count: int = 0, tensors: bytes = b"", of_tensors: int = 0, tail: bytes = b"",
    version: int = 3,
) -> None:  # fmt: skip
    head = b"GGUF" + struct.pack("<IQQ", version, of_tensors, count)
    (folder / "x.gguf").write_bytes(head + fields + tensors + tail)


def array(kind: int, count: int, items: bytes = b"", name: bytes = b"k") -> bytes:
    return text(name) + struct.pack("<IIQ", ARRAY, kind, count) + items


def tensor(name: bytes, shape: tuple[int, ...], offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)


def adapter(folder: Path, shape: tuple[int, ...], fields: bytes = b"", count: int = 0, offset: int = 0) -> None:
    """Write a LoRA of one module as llama.cpp does."""
    stated = b"".join(text(name) + struct.pack("<I", STRING) + text(value) for name, value in (
        (b"general.architecture", b"llama"), (b"general.type", b"adapter"), (b"adapter.type", b"lora")))  # fmt: skip
    stated += text(b"adapter.lora.alpha") + struct.pack("<If", 6, 1.0)
    tensors = tensor(b"blk.0.attn_q.weight.lora_a", shape, offset) + tensor(b"blk.0.attn_q.weight.lora_b", (1, 4), 32)
    gguf(folder, stated + fields, 4 + count, tensors, 2, bytes(200))


@hostile(INSPECT, r"it counts 4611686018427387904 items")
def an_array_of_2_to_the_62(folder: Path) -> None:
    gguf(folder, array(U8, 2**62, bytes(64)), 1)


@hostile(INSPECT, r"more than \d+|items|no tensors")
def an_array_of_five_million_empty_texts(folder: Path) -> None:
    gguf(folder, array(STRING, 5 * MILLION, bytes(40 * MILLION)), 1)


@hostile(INSPECT, r"more than \d+|items|no tensors")
def an_array_of_three_million_arrays(folder: Path) -> None:
    gguf(folder, array(ARRAY, 3 * MILLION, struct.pack("<IQ", U8, 0) * 3 * MILLION), 1)


@hostile(INSPECT, r"more than \d+|items|no tensors")
def an_array_of_fifty_million_bytes(folder: Path) -> None:
    gguf(folder, array(U8, 50 * MILLION, bytes(50 * MILLION)), 1)


@hostile(INSPECT, r"depth")
def arrays_nested_a_thousand_times(folder: Path) -> None:
    gguf(folder, array(ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 1000), 1)


@hostile(INSPECT, r"more than \d+|items|ends in its header")
def arrays_that_multiply(folder: Path) -> None:
    gguf(folder, array(ARRAY, 2**40, struct.pack("<IQ", ARRAY, 2**40) * 3), 1)


@hostile(INSPECT, r"more than \d+|items|no tensors")
def a_million_fields(folder: Path) -> None:
    gguf(folder, b"".join(text(b"%d" % i) + struct.pack("<IB", U8, 0) for i in range(MILLION)), MILLION)


@hostile(INSPECT, r"damaged")
def fields_of_2_to_the_62(folder: Path) -> None:
    gguf(folder, bytes(1000), 2**62)


@hostile(INSPECT, r"damaged|more than")
def tensors_of_2_to_the_62(folder: Path) -> None:
    gguf(folder, tensors=tensor(b"x", (1,)) * 10, of_tensors=2**62)


@hostile(INSPECT, r"more than \d+|items|no tensors")
def half_a_million_gguf_tensors(folder: Path) -> None:
    gguf(folder, tensors=b"".join(tensor(b"%d" % i, (1,)) for i in range(MILLION // 2)), of_tensors=MILLION // 2)


@hostile(INSPECT, r"a text|items|bytes follow")
def a_text_of_2_to_the_63(folder: Path) -> None:
    gguf(folder, text(b"k") + struct.pack("<IQ", STRING, 2**63) + bytes(100), 1)


@hostile(INSPECT, r"damaged")
def gguf_sides_whose_product_overflows(folder: Path) -> None:
    adapter(folder, (2**32, 2**32, 2**32))


@hostile(INSPECT, r"damaged|empty")
def gguf_zero_and_2_to_the_62(folder: Path) -> None:
    adapter(folder, (2**62, 0))


@hostile(INSPECT, r"damaged")
def gguf_of_four_billion_sides(folder: Path) -> None:
    gguf(folder, tensors=text(b"x") + struct.pack("<I", 2**32 - 1) + bytes(1000), of_tensors=1)


@hostile(INSPECT, r"damaged")
def an_alignment_of_zero(folder: Path) -> None:
    adapter(folder, (4, 1), text(b"general.alignment") + struct.pack("<II", U32, 0), 1)


@hostile(INSPECT, r"damaged|truncated|ends after")
def an_alignment_of_four_billion(folder: Path) -> None:
    adapter(folder, (4, 1), text(b"general.alignment") + struct.pack("<II", U32, 2**31), 1)


@hostile(INSPECT, r"damaged|truncated|ends after")
def an_offset_of_2_to_the_62(folder: Path) -> None:
    adapter(folder, (4, 1), offset=2**62)


@hostile(INSPECT, r"damaged")
def a_name_that_is_no_text(folder: Path) -> None:
    adapter(folder, (4, 1), text(b"\xff\xfe\x1b[2J") + struct.pack("<IB", U8, 0), 1)


@hostile(INSPECT, r"damaged|no dialect|version")
def gguf_of_another_byte_order(folder: Path) -> None:
    (folder / "x.gguf").write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 2**62, 2**62) + bytes(100))


def model(folder: Path, *tensors: tuple[bytes, tuple[int, ...], int, int], fields: bytes = b"", count: int = 0) -> None:
    """Write a model: each tensor is (name, sides, type, offset)."""
    infos = b"".join(
        text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        for name, shape, kind, offset in tensors
    )
    stated = text(b"general.architecture") + struct.pack("<I", STRING) + text(b"llama")
    gguf(folder, stated + fields, 1 + count, infos, len(tensors), bytes(4096))


@hostile(INSPECT, r"damaged.*overlaps")
def gguf_tensors_in_one_place(folder: Path) -> None:
    model(folder, (b"a", (32, 2), 0, 0), (b"b", (32, 2), 0, 128))


@hostile(INSPECT, r"damaged.*twice")
def a_gguf_tensor_twice(folder: Path) -> None:
    model(folder, (b"a", (32,), 0, 0), (b"a", (32,), 0, 128))


@hostile(INSPECT, r"damaged.*not aligned")
def a_gguf_tensor_out_of_line(folder: Path) -> None:
    model(folder, (b"a", (32,), 0, 7))


@hostile(INSPECT, r"damaged.*whole blocks")
def a_ragged_row_of_a_k_quant(folder: Path) -> None:
    model(folder, (b"a", (250, 2), 12, 0))


@hostile(INSPECT, r"99")
def a_gguf_type_of_nobody(folder: Path) -> None:
    model(folder, (b"a", (32,), 99, 0))


@hostile(INSPECT, r"damaged")
def a_gguf_model_of_2_to_the_62(folder: Path) -> None:
    model(folder, (b"a", (2**62, 4), 12, 0))


@hostile(INSPECT, r"damaged.*twice")
def a_gguf_field_twice(folder: Path) -> None:
    fields = (text(b"k") + struct.pack("<IB", U8, 0)) * 2
    model(folder, (b"a", (32,), 0, 0), fields=fields, count=2)
