"""The memory of one worker thread: a tile as read, in working precision, and as written. Reused from tensor to tensor.

Fresh memory costs a page fault for every four kilobytes, which for a merge would cost more than its arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.storage import files

if TYPE_CHECKING:
    import torch


class Workspace:
    """Grown on demand, never shared between threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: dict[str, torch.Tensor] = {}

    def tile(self, elements: int, stored: torch.dtype, out: torch.dtype, work: torch.dtype) -> Tile:
        """Return the buffers for tiles of at most so many elements; they are valid until the next call."""
        import torch

        return Tile(
            self._of("stored", elements, stored),
            self._of("arrived", elements if self.device.type != "cpu" else 0, stored),
            self._of("out", elements, out),
            self._of("work", elements, work),
            self._of("base", elements, work),
            self._of("bits", elements, torch.int16),
            self._of("mask", elements, torch.bool),
        )

    def _of(self, name: str, elements: int, dtype: torch.dtype) -> torch.Tensor:
        import torch

        nbytes = elements * dtype.itemsize
        held = self._memory.get(name)
        if held is None or len(held) < nbytes:
            on_device = name in ("arrived", "work", "base")
            pinned = self.device.type == "cuda" and name in ("stored", "out")
            where = self.device if on_device else torch.device("cpu")
            self._memory[name] = held = torch.empty(nbytes, dtype=torch.uint8, device=where, pin_memory=pinned)
        return held[:nbytes].view(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """The buffers of one tensor's tiles; `arrived`, `work` and `base` lie on the device, the others on the host."""

    _stored: torch.Tensor
    _arrived: torch.Tensor
    _out: torch.Tensor
    _work: torch.Tensor
    _base: torch.Tensor
    _bits: torch.Tensor
    _mask: torch.Tensor

    def read(self, source: int, offset: int, rows: int, columns: int) -> tuple[torch.Tensor, memoryview]:
        """Read rows at `offset` of a descriptor; return them in working precision, and their raw bytes."""
        count = rows * columns
        raw = _bytes_of(self._stored[:count])
        files.read_into(source, raw, offset)
        stored = self._stored[:count]
        if len(self._arrived):  # moved as it is stored, and widened there: half the bytes of float32
            stored = self._arrived[:count].copy_(stored, non_blocking=True)
        self._work[:count].copy_(stored)
        return self._work[:count].view(rows, columns), raw

    def copy_of(self, W: torch.Tensor) -> torch.Tensor:
        """Return a copy of the tile, as it is before it is changed."""
        return self._base[: W.numel()].view(W.shape).copy_(W)

    def stored(self, W: torch.Tensor) -> torch.Tensor:
        """Return the tile that was read last as it is stored, in the shape of `W`."""
        return self._stored[: W.numel()].view(W.shape)

    def rounded(self, W: torch.Tensor) -> tuple[torch.Tensor, memoryview]:
        """Round a tile to the output dtype, to nearest even; return it and its raw bytes."""
        rounded = self._out[: W.numel()].view(W.shape)
        rounded.copy_(W)
        return rounded, _bytes_of(self._out[: W.numel()])

    def below(self, region: torch.Tensor, limit: int) -> torch.Tensor:
        """Return where in a 16-bit float region, flattened, the magnitude is below `limit`, both read as integers.

        Without their sign, 16-bit floats are in the order of their bits. NumPy looks through a tile in a tenth of the
        time that torch takes.
        """
        import numpy as np
        import torch

        count = region.numel()
        bits, mask = (scratch[:count].numpy().reshape(region.shape) for scratch in (self._bits, self._mask))
        np.bitwise_and(region.view(torch.int16).numpy(), 0x7FFF, out=bits)
        np.less(bits, np.int16(limit), out=mask)
        return torch.from_numpy(np.flatnonzero(mask))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor, shared, not copied."""
    import torch

    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array)
