"""Pickles, zip and tar archives, YAML."""

from __future__ import annotations

import json
import struct
import tarfile
import zipfile
from pathlib import Path

from tests.make.hostile import hostile
from tests.make.hostile.headers import MILLION

INSPECT = "inspect adapter"
NAME = "base_model.model.q_proj.lora_A.weight"


def pickled(folder: Path, program: bytes, data: bytes = bytes(64)) -> None:
    """Write an adapter whose tensors a pickle describes."""
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with zipfile.ZipFile(folder / "adapter" / "adapter_model.bin", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", data)
        archive.writestr("x/version", "3\n" * 512)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(number: int) -> bytes:
    raw = number.to_bytes((number.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], elements: int = 16) -> bytes:
    """Return the operations that make a tensor over the storage 0."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(elements) + b"tQ"
    sides = b"(" + b"".join(map(integer, shape)) + b"t"
    steps = b"(" + b"".join(map(integer, strides)) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + sides + steps + b"\x89}tR"


def state(**tensors: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(text(name) + made for name, made in tensors.items()) + b"u."


@hostile(INSPECT, r"a number as a key that no state dict has")
def keys_with_one_hash(folder: Path) -> None:
    pickled(folder, b"\x80\x02}(" + b"".join(integer((2**61 - 1) * (i + 1)) + b"N" for i in range(40_000)) + b"u.")


@hostile(INSPECT, r"expected a state dict|small|operations")
def keys_that_share_low_bits(folder: Path) -> None:
    pickled(folder, b"\x80\x02}(" + b"".join(integer(i << 16) + b"N" for i in range(2**15 - 1)) + b"u.")


@hostile(INSPECT, r"operations")
def fifty_million_dicts(folder: Path) -> None:
    pickled(folder, b"\x80\x02" + b"}" * 50 * MILLION + b".")


@hostile(INSPECT, r"operations")
def fifty_million_marks(folder: Path) -> None:
    pickled(folder, b"\x80\x02" + b"(" * 50 * MILLION + b".")


@hostile(INSPECT, r"operations")
def ten_million_memos(folder: Path) -> None:
    pickled(folder, b"\x80\x02}" + b"".join(b"r" + struct.pack("<I", i) for i in range(10 * MILLION)) + b".")


@hostile(INSPECT, r"operations|expected a state dict")
def tuples_nested_deeply(folder: Path) -> None:
    pickled(folder, b"\x80\x02)" + b"\x85" * 900_000 + b".")


@hostile(INSPECT, r"operations|expected a state dict|small")
def a_dict_of_tuples_nested_deeply(folder: Path) -> None:
    pickled(folder, b"\x80\x02}" + text(NAME) + b")" + b"\x85" * 900_000 + b"s.")


@hostile(INSPECT, r"damaged torch.save file")
def a_text_longer_than_the_file(folder: Path) -> None:
    pickled(folder, b"\x80\x02}X" + struct.pack("<I", 2**31 - 1) + b"x" * 1000)


@hostile(INSPECT, r"damaged torch.save file")
def a_number_of_two_gigabytes(folder: Path) -> None:
    pickled(folder, b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x" * 1000)


@hostile(INSPECT, r"holds more than tensors")
def a_pickle_that_calls(folder: Path) -> None:
    pickled(folder, b"\x80\x02cos\nsystem\n(" + text("true") + b"tR." + bytes(2000))


@hostile(INSPECT, r"holds more than tensors")
def a_global_of_ten_megabytes(folder: Path) -> None:
    pickled(folder, b"\x80\x02c" + b"o" * 10 * MILLION + b"\nsystem\n.")


@hostile(INSPECT, r"are empty")
def a_pickle_of_zero_and_2_to_the_62(folder: Path) -> None:
    pickled(folder, state(**{NAME: tensor((0, 2**62), (1, 1)), NAME.replace("_A", "_B"): tensor((4, 1), (1, 1))}))


@hostile(INSPECT, r"its bytes lie outside its record")
def a_pickle_of_2_to_the_62(folder: Path) -> None:
    pickled(folder, state(**{NAME: tensor((2**62, 2**62), (2**62, 1), 2**62)}))


@hostile(INSPECT, r"strides")
def a_pickle_of_strides_of_zero(folder: Path) -> None:
    pickled(folder, state(**{NAME: tensor((2**40, 4), (0, 1))}))


@hostile("convert adapter --to loratools -o out", r"times the bytes|in place")
def twenty_thousand_views_of_one_storage(folder: Path) -> None:
    names = [f"base_model.model.layers.{i}.q_proj.lora_{side}.weight" for i in range(10_000) for side in "AB"]
    side = 2 * MILLION
    tensors = {name: tensor((1, side) if "_A" in name else (side, 1), (side, 1) if "_A" in name else (1, 1), side)
               for name in names}  # fmt: skip
    pickled(folder, state(**tensors), bytes(4 * side))


@hostile(INSPECT, r"directory")
def a_zip_of_half_a_million_records(folder: Path) -> None:
    pickled(folder, state(**{NAME: tensor((4, 4), (4, 1))}))
    with zipfile.ZipFile(folder / "adapter" / "adapter_model.bin", "a", zipfile.ZIP_STORED) as archive:
        info = archive.infolist()[-1]
        for i in range(MILLION // 2):
            copied = zipfile.ZipInfo(f"x/data/{i + 1}")
            copied.header_offset, copied.file_size, copied.compress_size, copied.CRC = info.header_offset, 1, 1, 0
            archive.filelist.append(copied)
        archive._didModify = True  # type: ignore[attr-defined]


@hostile(INSPECT, r"damaged or truncated zip file|two records")
def records_that_overlap(folder: Path) -> None:
    pickled(folder, state(**{NAME: tensor((4, 4), (4, 1))}))
    path = folder / "adapter" / "adapter_model.bin"
    path.write_bytes(path.read_bytes().replace(b"x/byteorder", b"x/data/0\0\0\0"))


@hostile(INSPECT, r"compressed")
def a_zip_bomb(folder: Path) -> None:
    pickled(folder, b"")
    with zipfile.ZipFile(folder / "adapter" / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(200 * MILLION))


def nemo(folder: Path, *members: tuple[str, bytes | str, int], tail: bytes = bytes(1024)) -> Path:
    """Write x.nemo of (name, content or type of a lone header, declared size)."""
    path = folder / "x.nemo"
    with path.open("wb") as file:
        for name, content, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            if isinstance(content, str):
                info.type, content = content.encode(), b""
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.write(content + bytes(-len(content) % 512))
        file.write(tail)
    return path


def yaml(folder: Path, document: bytes) -> None:
    """Write an archive with tensors of NeMo's names, and this configuration."""
    name = "model.language_model.encoder.layers.0.self_attention.adapter_layer.lora_kqv_adapter.linear_%s.weight"
    pickled(folder, state(**{name % "in": tensor((4, 4), (4, 1)), name % "out": tensor((4, 4), (4, 1))}))
    weights = (folder / "adapter" / "adapter_model.bin").read_bytes()
    nemo(folder, ("model_config.yaml", document, len(document)), ("model_weights.ckpt", weights, len(weights)))


@hostile("inspect x.nemo", r"damaged")
def a_long_name_of_eight_gigabytes(folder: Path) -> None:
    nemo(folder, ("x", "L", 2**33))


@hostile("inspect x.nemo", r"damaged")
def a_pax_header_of_eight_gigabytes(folder: Path) -> None:
    nemo(folder, ("x", "x", 2**33))


@hostile("inspect x.nemo", r"an extended header of|no model_weights.ckpt")
def a_global_header_for_ten_thousand_files(folder: Path) -> None:
    records = b"".join(b"%d k%06d=v\n" % (len(f"{i:06d}") + 8, i) for i in range(100_000))
    nemo(folder, ("g", records, len(records)), *((f"f{i}", b"", 0) for i in range(9_900)))
    path = folder / "x.nemo"
    raw = bytearray(path.read_bytes())
    head = tarfile.TarInfo("g")
    head.size, head.type = len(records), b"g"
    raw[:512] = head.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(raw)


@hostile("inspect x.nemo", r"more than \d+ files in this archive")
def a_hundred_thousand_files(folder: Path) -> None:
    nemo(folder, *((f"f{i}", b"", 0) for i in range(100_000)))


@hostile("inspect x.nemo", r"damaged")
def a_file_that_is_longer_than_its_archive(folder: Path) -> None:
    nemo(folder, ("model_weights.ckpt", bytes(2000), 2**40))


@hostile("inspect x.nemo", r"damaged")
def a_file_of_less_than_nothing(folder: Path) -> None:
    nemo(folder, ("model_weights.ckpt", b"", -512), ("model_weights.ckpt", b"", -1024))


@hostile("inspect x.nemo", r"damaged|no model_weights.ckpt")
def a_sparse_file_in_an_archive(folder: Path) -> None:
    nemo(folder, ("model_weights.ckpt", "S", 2**30))


@hostile("inspect x.nemo", r"damaged|no archive")
def an_archive_of_zeros(folder: Path) -> None:
    (folder / "x.nemo").touch()
    with (folder / "x.nemo").open("wb") as file:
        file.truncate(2**40)


@hostile("inspect x.nemo", r"aliases")
def yaml_of_aliases(folder: Path) -> None:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    yaml(folder, "\n".join(lines).encode())


@hostile("inspect x.nemo", r"nest")
def yaml_nested_deeply(folder: Path) -> None:
    yaml(folder, b"a: " + b"[" * 50_000)


@hostile("inspect x.nemo", r"larger than")
def yaml_of_many_small_things(folder: Path) -> None:
    yaml(folder, b"a: [" + b"[]," * 330_000 + b"]")


@hostile("inspect x.nemo", r"a number of \d+ characters as a name")
def yaml_keys_with_one_hash(folder: Path) -> None:
    yaml(folder, b"".join(b"%d: 1\n" % ((2**61 - 1) * (i + 1)) for i in range(6_000)))


@hostile("inspect x.nemo", r"a number of \d+ characters")
def a_yaml_number_in_base_sixty(folder: Path) -> None:
    yaml(folder, b"a: 1" + b":59" * 60_000)


@hostile("inspect x.nemo", r"not plain YAML")
def yaml_that_calls(folder: Path) -> None:
    yaml(folder, b"a: !!python/object/apply:os.system [true]\n")
