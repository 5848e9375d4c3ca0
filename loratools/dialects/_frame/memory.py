"""A state dict in memory as the file that it would be saved as: every dialect reads files.

Tensors are copied, so that training goes on without changing the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter.model import Adapter
from loratools.dialects._frame.values import OTHER_CONFIGS
from loratools.errors import BadFile, printable
from loratools.storage import atomic, save
from loratools.storage.atomic.inputs import afresh
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    import torch

STATE = Path("the state dict")
"""What messages call it."""


@contextmanager
def as_file(value: Any) -> Iterator[Path]:
    """Yield a temporary file of a value for which `is_saved`, or a folder where a config lies beside it.

    Raises `BadFile` with every entry that is no tensor.
    """
    state, beside = (value, {}) if isinstance(value, Mapping) else value
    tensors = tensors_of(state)
    with atomic.temporary("adapter") as folder:
        field = next((field for field in OTHER_CONFIGS if field in beside), None)
        path = folder / (OTHER_CONFIGS[field] if field else "state.safetensors")
        with path.open("wb") as output:
            output.write(save.header(tensors, {} if field else beside))
            output.writelines(save.pieces(tensors))
        if field:
            (folder / "adapter_config.json").write_text(json.dumps(beside, default=str), encoding="utf-8", newline="\n")
        with afresh():  # it is no input that has to be there when the output appears
            yield folder if field else path


def kept(adapter: Adapter) -> Adapter:
    """Return an adapter of a file with all its tensors in memory."""
    return adapter.mapped(lambda lazy: LazyTensor.of(lazy.load()))


def tensors_of(state: Mapping[Any, Any]) -> dict[str, LazyTensor]:
    """Return copies of the tensors of a state dict; raise `BadFile` with all entries that are none."""
    made: dict[str, LazyTensor] = {}
    faults = []
    for name, value in state.items():
        try:
            if not isinstance(name, str):
                raise TypeError(f"found a key of type {type(name).__name__}, expected a name")
            made[name] = LazyTensor.of(_copied(value))
        except (TypeError, ValueError) as error:
            faults.append(f"{printable(name) if isinstance(name, str) else repr(name)}: {error}")
    if faults:
        raise BadFile(f"{STATE}: {len(faults)} of {len(state)} entries are no tensors of an adapter", faults)
    return made


def _copied(value: Any) -> torch.Tensor:
    """Return a copy on the processor, of a tensor that is spread over processes in one piece, or of an array."""
    import torch

    if not isinstance(value, torch.Tensor):
        return _of_array(value)
    if value.is_meta:
        raise ValueError("it is on the device meta, where tensors have no numbers")
    gathered: Any = getattr(value, "full_tensor", None)
    whole: torch.Tensor = (value if gathered is None else gathered()).detach()
    return whole.to("cpu", copy=True).contiguous()


def _of_array(value: Any) -> torch.Tensor:
    """Return a copy of an array of numpy, or of what gives one (JAX, MLX), in its own dtype."""
    import torch

    if isinstance(value, str | bytes | list | tuple) or not hasattr(value, "__array__"):
        raise TypeError(f"found {type(value).__name__}, expected a torch.Tensor or an array of numpy")
    import numpy as np

    array = np.array(value, order="C")  # a copy
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    twin = getattr(torch, array.dtype.name, None)
    if not isinstance(twin, torch.dtype):
        raise TypeError(f"found an array of dtype {array.dtype}, which torch does not have")
    if type(array.dtype).__module__ == "numpy.dtypes" or array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    # bfloat16 and the float8 of ml_dtypes are numpy's, but not torch's from numpy.
    width = {1: np.uint8, 2: np.uint16}[array.dtype.itemsize]
    return torch.from_numpy(array.view(width)).view(twin)
