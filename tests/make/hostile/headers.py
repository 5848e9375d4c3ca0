"""Safetensors headers: lengths, shapes, names, millions of entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.make.hostile import hostile

MILLION = 1_000_000
FILE = "x.safetensors"
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None, size: int = 0) -> Path:
    """Write a safetensors file: a header as an object or as bytes, its length as stated, the file grown to `size`."""
    raw = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb") as file:
        file.write((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
        if size:
            file.truncate(size)
    return path


def entry(shape: list[int], start: int = 0, stop: int = 0, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@hostile(f"hash {FILE}", r"a header of 18446744073709551615 bytes in a file of 18")
def header_of_2_to_the_64(folder: Path) -> None:
    write(folder / FILE, {}, bytes(8), length=2**64 - 1)


@hostile(f"hash {FILE}", r"not the JSON object that was expected")
def header_of_zeros_in_a_sparse_file(folder: Path) -> None:
    write(folder / FILE, b"", length=99_999_000, size=10**8)


@hostile(f"hash {FILE}", r"the header is 200000000 bytes long; safetensors allows 100000000")
def header_beyond_the_limit(folder: Path) -> None:
    write(folder / FILE, b"{", length=200_000_000, size=300_000_000)


@hostile(f"hash --tier schema {FILE}", r"1000000 tensors in one file; at most \d+ are read")
def a_million_tensors(folder: Path) -> None:
    write(folder / FILE, {f"t{i}": EMPTY for i in range(MILLION)})


@hostile(f"inspect {FILE}", None)
def two_hundred_thousand_tensors(folder: Path) -> None:
    write(folder / FILE, {f"t{i}": EMPTY for i in range(MILLION // 5)})


@hostile("inspect adapter", r"the header is 102777781 bytes long|1000000 tensors")
def a_million_factors(folder: Path) -> None:
    names = (f"base_model.model.layers.{i}.q_proj.lora_{side}.weight" for i in range(MILLION // 2) for side in "AB")
    peft(folder, dict.fromkeys(names, EMPTY))


@hostile("inspect adapter", r"1000001 tensors in one file")
def a_million_other_names(folder: Path) -> None:
    inside = {f"x{i}.lora_A.weight": EMPTY | {"shape": [0, 1]} for i in range(MILLION)}
    peft(folder, {"base_model.model.q_proj.lora_A.weight": entry([1, 1], 0, 4)} | inside, bytes(4))


@hostile("inspect adapter", None)
def a_hundred_thousand_factors(folder: Path) -> None:
    names = [f"base_model.model.layers.{i}.q_proj.lora_{side}.weight" for i in range(50_000) for side in "AB"]
    peft(folder, {name: entry([1, 1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}, bytes(4 * len(names)))


def peft(folder: Path, header: Any, data: bytes = b"", **config: Any) -> None:
    """Write an adapter of PEFT in `adapter`."""
    (folder / "adapter").mkdir()
    stated = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]} | config
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(stated))
    write(folder / "adapter" / "adapter_model.safetensors", header, data)


def pair(
    module: str = "q_proj", shape_A: tuple[int, int] = (1, 4), shape_B: tuple[int, int] = (4, 1)
) -> dict[str, Any]:
    """Return the entries of one module's factors, one after the other."""
    size_A, size_B = 4 * shape_A[0] * shape_A[1], 4 * shape_B[0] * shape_B[1]
    name = f"base_model.model.{module}.lora_%s.weight"
    return {name % "A": entry([*shape_A], 0, size_A), name % "B": entry([*shape_B], size_A, size_A + size_B)}


@hostile("inspect adapter", r"are empty")
def zero_and_2_to_the_62(folder: Path) -> None:
    header = pair()
    header["base_model.model.q_proj.lora_A.weight"] = entry([0, 2**62], 0, 0)
    header["base_model.model.q_proj.lora_B.weight"] = entry([4, 1], 0, 16)
    peft(folder, header, bytes(16))


@hostile(f"hash {FILE}", None)
def zero_and_2_to_the_62_in_a_base(folder: Path) -> None:
    write(folder / FILE, {"w": entry([0, 2**62, 4]), "v": entry([1], 0, 4)}, bytes(4))


@hostile(f"hash {FILE}", r"larger than any file")
def sides_whose_product_overflows(folder: Path) -> None:
    write(folder / FILE, {"w": entry([2**32, 2**32, 2**32], 0, 4)}, bytes(4))


@hostile(f"hash {FILE}", r"larger than any file")
def an_overflow_before_a_zero(folder: Path) -> None:
    write(folder / FILE, {"w": entry([2**40, 2**40, 0])})


@hostile(f"hash {FILE}", r"a tensor of 3000000 sides")
def three_million_sides(folder: Path) -> None:
    write(folder / FILE, {"w": entry([1] * 3 * MILLION, 0, 4)}, bytes(4))


@hostile(f"hash {FILE}", r"a name of 50000000 characters")
def a_name_of_fifty_megabytes(folder: Path) -> None:
    write(folder / FILE, {"n" * 50 * MILLION: entry([1], 0, 4)}, bytes(4))


@hostile("inspect adapter", r"a name of 20000\d\d characters")
def a_name_of_a_million_dots(folder: Path) -> None:
    peft(folder, pair("a." * MILLION + "q_proj"), bytes(32))


@hostile("inspect adapter", r"characters|segments")
def names_of_many_dots(folder: Path) -> None:
    names = [f"base_model.model.{'a.' * 400}{i}.lora_A.weight" for i in range(50_000)]
    peft(folder, {name: entry([1, 1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}, bytes(4 * len(names)))


@hostile(f"hash {FILE}", r"unknown dtype")
def a_dtype_of_fifty_megabytes(folder: Path) -> None:
    write(folder / FILE, {"w": entry([1], 0, 4, "F" * 50 * MILLION)}, bytes(4))


@hostile(f"inspect {FILE}", None)
def metadata_of_fifty_megabytes(folder: Path) -> None:
    write(folder / FILE, {"__metadata__": {"note": "x" * 50 * MILLION}, "w": entry([1], 0, 4)}, bytes(4))


@hostile(f"inspect {FILE}", None)
def a_million_metadata(folder: Path) -> None:
    write(folder / FILE, {"__metadata__": {f"k{i}": "v" for i in range(MILLION)}, "w": entry([1], 0, 4)}, bytes(4))


@hostile(f"hash {FILE}", r"nested too deeply")
def nested_a_million_times(folder: Path) -> None:
    write(folder / FILE, b'{"w":' + b"[" * MILLION + b"]" * MILLION + b"}")


@hostile(f"hash {FILE}", r"a number beyond every float")
def a_number_of_ten_million_digits(folder: Path) -> None:
    digits = b"9" * 10 * MILLION
    write(folder / FILE, b'{"w":{"dtype":"F32","shape":[' + digits + b'],"data_offsets":[0,4]}}', bytes(4))


@hostile(f"hash {FILE}", r"must be lists of natural numbers")
def a_fraction_of_ten_million_digits(folder: Path) -> None:
    digits = b"1." + b"3" * 10 * MILLION + b"e1"
    write(folder / FILE, b'{"w":{"dtype":"F32","shape":[' + digits + b'],"data_offsets":[0,4]}}', bytes(4))


@hostile(f"hash {FILE}", r"must be lists of natural numbers")
def a_million_numbers_of_fifty_digits(folder: Path) -> None:
    numbers = b",".join([b"9" * 50] * MILLION)
    write(folder / FILE, b'{"w":{"dtype":"F32","shape":[' + numbers + b'],"data_offsets":[0,4]}}', bytes(4))


@hostile(f"hash {FILE}", r"occurs twice in one JSON object")
def a_million_times_one_name(folder: Path) -> None:
    write(folder / FILE, b"{" + b",".join([b'"w":1'] * MILLION) + b"}")


@hostile(f"hash {FILE}", r"overlaps another tensor")
def a_hundred_thousand_overlapping(folder: Path) -> None:
    write(folder / FILE, {f"t{i}": entry([1], 0, 4) for i in range(100_000)}, bytes(4))


@hostile(f"hash {FILE}", r"a hole before it")
def a_hundred_thousand_holes(folder: Path) -> None:
    write(folder / FILE, {f"t{i}": entry([1], 8 * i, 8 * i + 4) for i in range(100_000)}, bytes(800_000))


@hostile(f"hash {FILE}", r"expected exactly dtype, shape and data_offsets")
def an_entry_of_a_million_fields(folder: Path) -> None:
    write(folder / FILE, {"w": entry([1], 0, 4) | {f"f{i}": 0 for i in range(MILLION)}}, bytes(4))


@hostile(f"hash {FILE}", r"tensor .*: unknown dtype")
def a_name_that_drives_the_terminal(folder: Path) -> None:
    write(folder / FILE, {"\x1b[2J\u202e\nerror: all is well\x07": entry([1], 0, 4, "\x1b]0;x\x07")}, bytes(4))


@hostile("inspect adapter", r"line break in")
def names_of_several_lines(folder: Path) -> None:
    peft(folder, pair("layers.0\nwarning: none.q_proj"), bytes(32))


@hostile(f"hash {FILE}", r"not valid UTF-8")
def a_lone_surrogate(folder: Path) -> None:
    write(folder / FILE, b'{"w\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4))
