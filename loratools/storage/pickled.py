"""Legacy `torch.save` files: where each tensor's bytes lie, without reading them and without running what they say.

A file of `torch.save` (1.6 and later) is a zip of uncompressed records. It is opened with `weights_only=True` under
torch's FakeTensorMode, which rebuilds names, dtypes and shapes and records the offset of each storage, no data. From
there a tensor is a range of bytes like any other.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

from loratools.errors import BadFile
from loratools.storage import dtypes
from loratools.storage.header import TensorSpec, open_file

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# A state dict may be wrapped once by the trainer that saved it.
_WRAPPERS = ("state_dict", "model_state_dict", "module", "model")


def read_pickled(path: Path) -> dict[str, TensorSpec]:
    """Return where each tensor of a `torch.save` file lies.

    Raises `BadFile` for the pre-2020 format, compressed records, pickles that hold anything but tensors and plain
    containers, tensors that are views with gaps, and ranges outside their record.
    """
    with open_file(path) as file:
        magic = file.read(30)
    if magic.startswith(b"version https://git-lfs"):
        raise BadFile(f"{path}: this is a Git-LFS pointer, not the file itself", hint="Fetch it with `git lfs pull`.")
    if not magic.startswith(b"PK\x03\x04"):
        raise BadFile(
            f"{path}: not a zip file of torch.save (the format from before PyTorch 1.6, or not a checkpoint)",
            hint="Load it where it came from and save it again as safetensors.",
        )
    records = _records(path)
    state = _state_dict(path)
    problems, specs = [], {}
    for name, tensor in state.items():
        spec = _spec(path, tensor, records)
        if isinstance(spec, str):
            problems.append(f"{name}: {spec}")
        else:
            specs[name] = spec
    if problems:
        raise BadFile(f"{path}: {len(problems)} tensor(s) cannot be read in place", problems)
    return specs


def _records(path: Path) -> dict[int, int]:
    """Map the offset of each uncompressed record's data to its size."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise BadFile(f"{path}: record {info.filename!r} is compressed; torch.save never does that")
                file.seek(info.header_offset + 26)
                lengths = file.read(4)
                skip = 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                found[info.header_offset + skip] = info.file_size
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise BadFile(f"{path}: damaged or truncated zip file: {error}") from None
    return found


def _state_dict(path: Path) -> dict[str, Any]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines() or ["other objects"]
        raise BadFile(
            f"{path}: this pickle holds more than tensors and will not be opened: {found[0]}",
            hint="Pickles can run code. Ask for a safetensors file, or convert it where you trust it.",
        ) from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are bytes
        raise BadFile(f"{path}: damaged torch.save file: {str(error).splitlines()[0][:200]}") from None
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    if not isinstance(state, dict):
        raise BadFile(f"{path}: expected a state dict of tensors, found {type(state).__name__}")
    strangers = [f"{name!r}: {type(value).__name__}" for name, value in state.items() if not _is_tensor(name, value)]
    if strangers:
        raise BadFile(f"{path}: expected a state dict of tensors only", strangers[:20])
    return state


def _is_tensor(name: Any, value: Any) -> bool:
    import torch

    return isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided


def _spec(path: Path, tensor: Any, records: dict[int, int]) -> TensorSpec | str:
    storage = tensor.untyped_storage()
    begin = storage._checkpoint_offset
    if not tensor.is_contiguous():
        return f"it is a view with strides {tuple(tensor.stride())}; save it again with .contiguous()"
    try:
        dtype = dtypes.from_torch(tensor.dtype)
    except ValueError as error:
        return str(error)
    size = tensor.numel() * tensor.element_size()
    first = tensor.storage_offset() * tensor.element_size()
    if size and (begin is None or first + size > records.get(begin, -1)):
        return "its bytes lie outside its record"
    start = (begin or 0) + first
    return TensorSpec(dtype, tuple(tensor.shape), path, start, start + size)
