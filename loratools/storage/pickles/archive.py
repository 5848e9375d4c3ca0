"""Legacy `torch.save` files: where each tensor's bytes lie, without reading them and without running what they say.

A file of `torch.save` (1.6 and later) is a zip of uncompressed records: a pickle that describes the tensors, and a
record of raw bytes for each storage. The pickle is read as data (`unpickle.py`), without torch. From there
a tensor is a range of bytes like any other.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.errors import BadFile, counted
from loratools.storage.header import TensorSpec, check_name, nbytes
from loratools.storage.pickles import EMBEDDING
from loratools.storage.pickles.bare import foreign
from loratools.storage.pickles.unpickle import Damaged, Refused, View, unpickle
from loratools.storage.pickles.window import Window
from loratools.storage.sources import open_file, refuse_pointer

MAX_PICKLE = 100_000_000
"""Bytes of the description; that of a thousand tensors has about a hundred thousand."""

MAX_DIRECTORY = 20_000_000
"""Bytes of the zip file's directory; a record of `torch.save` takes about seventy."""

MAX_SHARING = 256
"""How many times the bytes of a file its tensors may have, when several share a storage."""

# A state dict may be wrapped once by the trainer that saved it.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model")

_DAMAGED = (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error, OverflowError, EOFError)


def read_pickled(path: Path, within: tuple[int, int] | None = None) -> dict[str, TensorSpec]:
    """Return where each tensor of a `torch.save` file lies; `within` are the bytes of a larger file that hold it.

    Raises `BadFile` for the pre-2020 format, compressed records, pickles that hold anything but tensors and plain
    containers, tensors that are views with gaps, and ranges outside their record.
    """
    with open_file(path) as file:
        start, stop = within or (0, os.fstat(file.fileno()).st_size)
        file.seek(start)
        magic = file.read(min(30, stop - start))
    refuse_pointer(magic, path)
    if not magic.startswith(b"PK\x03\x04"):
        if stranger := foreign(path, start, stop):
            raise _refused(path, stranger)
        fault = "not a zip file of torch.save (the format from before PyTorch 1.6, or not a checkpoint)"
        raise BadFile(f"{path}: {fault}", hint="Load it where it came from and save it again as safetensors.")
    records = _records(path, start, stop)
    folder, pickled = _description(path, records)
    state = _state_dict(path, pickled)
    problems, specs = [], {}
    for name, view in state.items():
        check_name(name, path)
        spec = _spec(path, view, records.get(f"{folder}/data/{view.storage.key}"))
        if isinstance(spec, str):
            problems.append(f"{name}: {spec}")
        else:
            specs[name] = spec
    if problems:
        raise BadFile(f"{path}: {counted(len(problems), 'tensor')} cannot be read in place", problems)
    if sum(spec.nbytes for spec in specs.values()) > MAX_SHARING * (stop - start):
        raise BadFile(
            f"{path}: its tensors share storages, and have more than {MAX_SHARING} times the bytes of the file"
        )
    return specs


def _records(path: Path, begin: int, end: int) -> dict[str, tuple[int, int]]:
    """Map the name of each record of the zip at bytes [`begin`, `end`) to where its bytes begin and end."""
    records: dict[str, tuple[int, int]] = {}
    try:
        with open_file(path) as file, zipfile.ZipFile(Window(file, begin, end, MAX_DIRECTORY)) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise BadFile(f"{path}: record {info.filename!r} is compressed; torch.save never does that")
                file.seek(begin + info.header_offset)
                local = file.read(30)
                if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
                    raise zipfile.BadZipFile(f"record {info.filename!r} is not where the directory says")
                skip = 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                start = begin + info.header_offset + skip
                if info.file_size != info.compress_size or start + info.file_size > end:
                    raise zipfile.BadZipFile(f"record {info.filename!r} reaches beyond the file")
                if info.filename in records:
                    raise zipfile.BadZipFile(f"two records are named {info.filename!r}")
                records[info.filename] = (start, start + info.file_size)
    except _DAMAGED as error:
        raise BadFile(f"{path}: damaged or truncated zip file: {error}") from None
    return records


def _description(path: Path, records: Mapping[str, tuple[int, int]]) -> tuple[str, bytes]:
    """Return the folder of the records inside the zip, and the pickle that describes the tensors."""
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BadFile(f"{path}: a zip file, but none of torch.save: it has no record data.pkl")
    folder = pickles[0].removesuffix("/data.pkl")

    def read(start: int, stop: int) -> bytes:
        with open_file(path) as file:
            file.seek(start)
            return file.read(min(stop - start, MAX_PICKLE + 1))

    pickled = read(*records[pickles[0]])
    order = read(*records[f"{folder}/byteorder"]) if f"{folder}/byteorder" in records else b"little"
    if len(pickled) > MAX_PICKLE:
        raise BadFile(f"{path}: its description of the tensors is larger than {MAX_PICKLE} bytes")
    if order != b"little":
        raise BadFile(f"{path}: saved on a machine of another byte order ({order[:12]!r})")
    return folder, pickled


def _state_dict(path: Path, pickled: bytes) -> dict[str, View]:
    try:
        state = unpickle(pickled)
    except Refused as error:
        raise _refused(path, str(error)) from None
    except Damaged as error:
        raise BadFile(f"{path}: damaged torch.save file: {error}") from None
    if not isinstance(state, dict):
        raise BadFile(f"{path}: expected a state dict of tensors, found {_kind(state)}")
    if isinstance(state.get("string_to_param"), dict):
        raise BadFile(f"{path}: {EMBEDDING}", hint="It has a new word for the prompt, and changes no weight.")
    state = next((state[name] for name in _WRAPPERS if isinstance(state.get(name), dict)), state)
    if strangers := [
        f"{name!r:.200}: {_kind(value)}"
        for name, value in state.items()
        if not isinstance(name, str) or not isinstance(value, View)
    ]:
        raise BadFile(f"{path}: expected a state dict of tensors only", strangers[:20])
    return state


def _refused(path: Path, what: str) -> BadFile:
    hint = "Pickles can run code. Ask for a safetensors file, or convert it where you trust it."
    return BadFile(f"{path}: this pickle holds more than tensors and will not be opened: {what}", hint=hint)


def _kind(value: Any) -> str:
    return "Tensor" if isinstance(value, View) else type(value).__name__


def _spec(path: Path, view: View, record: tuple[int, int] | None) -> TensorSpec | str:
    if not view.is_contiguous():
        return f"it is a view with strides {view.strides}; save it again with .contiguous()"
    size = nbytes(view.dtype, view.shape)
    if size == 0:
        return TensorSpec(view.dtype, view.shape, path, 0, 0)
    start, stop = record or (0, 0)
    first = start + view.offset * nbytes(view.dtype, ())
    if first + size > stop:
        return "its bytes lie outside its record"
    return TensorSpec(view.dtype, view.shape, path, first, first + size)
