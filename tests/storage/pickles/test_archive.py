"""Legacy `torch.save` files: the same tensors as torch reads, nothing run, nothing beyond the file's own size."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import BadFile
from loratools.storage import dtypes, files
from loratools.storage.pickles.archive import read_pickled
from tests.conftest import clean_env


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def rewrite(path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> None:
    """Write a zip anew, with each record as `change(name, bytes)` has it."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records:
            if changed := change(name, data):
                archive.writestr(*changed)


def refused(path: Path, state: Any, match: str) -> BadFile:
    torch.save(state, path)
    with pytest.raises(BadFile, match=match) as refusal:
        read_pickled(path)
    return refusal.value


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_dtype_and_view_reads_as_torch_reads_it(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.bin"
    storage = torch.arange(24.0)
    state: dict[str, Any] = OrderedDict()
    state["first half"], state["second half"] = storage[:12].view(3, 4), storage[12:].view(2, 6)
    state["again"] = storage[12:].view(2, 6)
    state["scalar"], state["empty"], state["one column"] = torch.tensor(3.5), torch.zeros(0, 3), torch.ones(5, 2)[:1, :]
    state["parameter"] = torch.nn.Parameter(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))
    for name in ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16"):
        state[name] = torch.tensor([1, 0, 1]).to(getattr(torch, name))
    for name in ("bfloat16", "float32", "float64", "complex64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"):
        state[name] = torch.tensor([1.0, 2.0, 4.0]).to(getattr(torch, name))
    torch.save(state, path, pickle_protocol=protocol)
    specs = read_pickled(path)
    expected = torch.load(path, weights_only=False)
    assert list(specs) == list(expected)
    for name, spec in specs.items():
        found = files.read_tensor(spec)
        assert (found.dtype, found.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(bits(found), bits(expected[name])), name
    # Tied tensors and views are the same bytes of one record, not copies.
    assert specs["again"] == specs["second half"]
    assert specs["second half"].start == specs["first half"].start + 48
    assert specs["empty"].nbytes == 0


def test_a_module_s_state_dict_and_a_wrapped_one(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    for state in (module.state_dict(), {"state_dict": module.state_dict(), "epoch": 3, "lr": 0.1}):
        torch.save(state, path)
        specs = read_pickled(path)
        assert list(specs) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert torch.equal(files.read_tensor(specs["0.weight"]), module[0].weight.detach())


class Shell:
    """What an attacker would put into a pickle."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


def test_code_is_never_run(tmp_path: Path) -> None:
    proof = tmp_path / "owned"
    error = refused(
        tmp_path / "m.bin", {"w": torch.zeros(2), "x": Shell(f"touch {proof}")}, r"more than tensors.*system"
    )
    assert "safetensors" in str(error.hint)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (torch.nn.Linear(2, 3), r"torch\.nn\.modules\.linear\.Linear"),
        ({"w": torch.zeros(3).to_sparse()}, r"_rebuild_sparse_tensor"),
        ({"w": torch.zeros(3, dtype=torch.complex64).conj()}, r"lazy bits"),
        ({"w": torch.zeros(3, dtype=torch.complex128)}, r"ComplexDoubleStorage"),
        ({"w": torch.zeros(3, device="meta")}, r"meta_tensor"),
        ([torch.zeros(3)], r"expected a state dict of tensors, found list"),
        (torch.zeros(3), r"expected a state dict of tensors, found Tensor"),
        ({"w": torch.zeros(3), "step": 7}, r"state dict of tensors only"),
        ({1: torch.zeros(3)}, r"state dict of tensors only"),
        ({"w": torch.zeros(3, 4).t()}, r"cannot be read in place"),
        ({"w": torch.zeros(3).expand(4, 3)}, r"cannot be read in place"),
        ({"w": {3 + 4j}}, r"more than tensors"),
    ],
)  # fmt: skip
def test_what_is_no_plain_tensor_is_refused_by_name(tmp_path: Path, state: Any, match: str) -> None:
    refused(tmp_path / "m.bin", state, match)


def test_every_view_with_gaps_is_listed(tmp_path: Path) -> None:
    state = {"a": torch.zeros(3, 4).t(), "b": torch.zeros(2), "c": torch.zeros(9)[::2]}
    error = refused(tmp_path / "m.bin", state, r"2 tensors")
    assert [problem.split(":")[0] for problem in error.problems] == ["a", "c"]
    assert "strides (1, 4)" in error.problems[0]


def test_the_format_from_before_2020_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.bin"
    torch.save({"w": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(BadFile, match=r"not a zip file of torch\.save"):
        read_pickled(path)


def test_a_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")
    with pytest.raises(BadFile, match="Git-LFS pointer") as refusal:
        read_pickled(path)
    assert "git lfs pull" in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda name, data: None if name.endswith("data.pkl") else (name, data), "no record data.pkl"),
        (lambda name, data: (name, b"big") if name.endswith("byteorder") else (name, data), "byte order"),
        (lambda name, data: (name, data[:-1]) if name.endswith("data/0") else (name, data), "outside its record"),
        (lambda name, data: None if name.endswith("data/0") else (name, data), "outside its record"),
        (lambda name, data: (name, data[:-1]) if name.endswith("data.pkl") else (name, data), "its pickle"),
        (lambda name, data: (name, data + b"x") if name.endswith("/data.pkl") else (name, data), None),
    ],
    ids=["no description", "big endian", "short record", "no record", "no STOP", "bytes after STOP"],
)  # fmt: skip
def test_damaged_records(tmp_path: Path, change: Callable[..., Any], match: str | None) -> None:
    path = tmp_path / "m.bin"
    torch.save({"w": torch.arange(4.0)}, path)
    rewrite(path, change)
    if match is None:  # Python and torch stop reading at STOP too
        assert torch.equal(files.read_tensor(read_pickled(path)["w"]), torch.arange(4.0))
        return
    with pytest.raises(BadFile, match=match):
        read_pickled(path)


def test_compressed_and_doubled_records(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"w": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records:
            archive.writestr(name, data)
    with pytest.raises(BadFile, match="is compressed"):
        read_pickled(path)
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for name, data in [*records, records[0]]:
            archive.writestr(name, data)
    with pytest.raises(BadFile, match="two records are named"):
        read_pickled(path)


def _zip(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(64))
        archive.writestr("archive/version", b"3\n")
    return path


def bomb_of_hashes() -> bytes:
    """A dict whose key is a tuple of two of a tuple of two of …, sixty deep: its hash takes 2^60 steps."""
    deeper = b"".join(b"h%ch%c\x86q%ca" % (i, i, i + 1) for i in range(60))
    return b"\x80\x02])q\x00a" + deeper + b"}h\x3cK\x01sa."


def bomb_of_bytes() -> bytes:
    """`bytearray(10**12)`, which torch's restricted unpickler does run."""
    size = (10**12).to_bytes(6, "little")
    return b"\x80\x02}X\x01\x00\x00\x00wc__builtin__\nbytearray\n\x8a\x06" + size + b"\x85Rs."


def bomb_of_sides() -> bytes:
    """Ten thousand tensors that share one shape of a hundred thousand sides."""
    shape = b"(" + b"K\x01" * 100_000 + b"tq\x00a"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQq\x01a"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(h\x01K\x00h\x00h\x00\x89)tRa"
    return b"\x80\x02]" + shape + storage + tensor * 10_000 + b"."


def bomb_of_numbers() -> bytes:
    """A decimal number of a million digits."""
    return b"\x80\x02L" + b"9" * 1_000_000 + b"L\n."


def bomb_of_keys() -> bytes:
    """A dict of forty thousand keys that share one hash: each is compared with all before it."""
    numbers = ((2**61 - 1) * (i + 1) for i in range(40_000))
    packed = (n.to_bytes((n.bit_length() + 8) // 8, "little", signed=True) for n in numbers)
    return b"\x80\x02}(" + b"".join(b"\x8a" + bytes([len(raw)]) + raw + b"N" for raw in packed) + b"u."


@pytest.mark.parametrize("bomb", [bomb_of_keys, bomb_of_hashes, bomb_of_bytes, bomb_of_sides, bomb_of_numbers])
def test_pickles_that_would_take_forever_are_refused_at_once(tmp_path: Path, bomb: Callable[[], bytes]) -> None:
    path = _zip(tmp_path / "m.bin", bomb())
    with pytest.raises(BadFile):
        read_pickled(path)


@pytest.mark.parametrize(
    "pickled",
    [b"", b".", b"\x80\x02.", b"\x80\x02t.", b"\x80\x02}s.", b"\x80\x02h\x07.", b"\x80\x02}}.", b"\x80\x02\x85.",
     b"\x80\x02}]K\x01s.", b"\x80\x02]K\x01b.", b"\x80\x02)R.", b"\x80\x02Q.", b"\x80\x02N\x93.",
     b"\x80\x04\x95\xff\xff."],
)  # fmt: skip
def test_nonsense_pickles_are_refused(tmp_path: Path, pickled: bytes) -> None:
    with pytest.raises(BadFile):
        read_pickled(_zip(tmp_path / "m.bin", pickled))


def test_a_raw_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    path.write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(BadFile, match="not a zip file"):
        read_pickled(path)


def test_no_torch_is_needed(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2, 3)}, tmp_path / "m.bin")
    program = (
        "import sys; from pathlib import Path; from loratools.storage.pickles.archive import read_pickled\n"
        f"print(read_pickled(Path({str(tmp_path / 'm.bin')!r}))['w'].shape, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean_env(), check=True)
    assert done.stdout == "(2, 3) False\n"


def test_the_table_of_dtypes_is_torch_s() -> None:
    for name in ("float8_e4m3fn", "bfloat16", "uint64"):
        assert dtypes.to_torch(dtypes.from_torch(getattr(torch, name))) == getattr(torch, name)
    assert dtypes.from_name("complex128") is None
    with pytest.raises(ValueError, match="complex128"):
        dtypes.from_torch(torch.complex128)


def test_an_embedding_of_a_web_ui_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "e.pt"
    torch.save({"string_to_param": {"*": torch.ones(4, 8)}, "name": "cat"}, path)
    with pytest.raises(BadFile, match=r"e\.pt: a textual-inversion embedding, not a LoRA"):
        read_pickled(path)
