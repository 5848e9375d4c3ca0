"""C³A: circulant blocks, ΔW[m·b + j, n·b + q] = κ[m, n, (q − j) mod b]/in (arXiv 2407.19342), as in PEFT.

`c3a_kernel` is (out/b, in/b, b); there is no rank and no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools.adapter.kinds import Device, DType, Rows, Tensor
from loratools.adapter.kinds._rowwise import Named
from loratools.storage.lazy import LazyTensor

KERNEL = "c3a_kernel"


@dataclass(frozen=True, slots=True, eq=False)
class C3aUpdate(Named):
    """The kernels of all blocks. Raises `ValueError` where they are no such kernels."""

    kind = "c3a"
    rank = 0

    def __post_init__(self) -> None:
        if len(self.tensors[KERNEL].shape) != 3:
            raise ValueError(f"{KERNEL} has shape {self.tensors[KERNEL].shape}, expected (out/b, in/b, b)")

    @property
    def shape(self) -> tuple[int, ...]:
        m, n, size = self.tensors[KERNEL].shape
        return m * size, n * size

    def rows(self, dtype: DType, device: Device, transposed: bool) -> Rows:
        """Return rows, each a kernel for every block, turned round by its place in the block."""
        import torch

        kernel = self.tensors[KERNEL].load().double() / self.shape[1]
        size = kernel.shape[2]
        kernel = (kernel.transpose(0, 1) if transposed else kernel).to(device, dtype)
        turn = -1 if transposed else 1  # (q − j) with the row as q, or as j

        def made(rows: slice) -> Tensor:
            at = torch.arange(rows.start, rows.stop, device=device)
            across = torch.arange(size, device=device)
            places = (turn * (across - at[:, None] % size)) % size
            blocks = kernel[at // size]
            return blocks.gather(2, places[:, None, :].expand(-1, blocks.shape[1], -1)).flatten(1)

        return made

    def dense(self) -> Tensor:
        """Return what the kernels make of unit vectors, by Fourier transforms, for a circulant block convolves."""
        import torch

        kernel = self.tensors[KERNEL].load().double()
        _, n, size = kernel.shape
        units = torch.eye(n * size, dtype=torch.float64).reshape(-1, n, size)
        spectra = torch.einsum("xnf,mnf->xmf", torch.fft.fft(units), torch.fft.fft(kernel).conj())
        whole: Tensor = torch.fft.ifft(spectra).real.flatten(1).T
        return whole / (n * size)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are kernels."""
    return parts.keys() == {KERNEL}


def build(parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> C3aUpdate:
    """Return the update; it has no scaling."""
    return C3aUpdate(dict(parts), 1.0, 1.0)
