"""Where the arithmetic of a merge runs: on the processor, on a CUDA device, or on a GPU of Apple (mps).

The policy: a CUDA device computes what the processor does, in float32 without TF32 (float64 where the processor does),
rounded once, and results near zero again in float64 on the host. Only the last bit of a float32 sum may differ, for its
order does; where that bit decides a tie, one element in some ten thousand of a BF16 tensor is the other neighbour.
Processors of other kinds may differ likewise in what torch computes; the C code writes the same bytes on all of them.
On one machine threads, tiles, their order and repetition change no byte.

A GPU of Apple has no float64: it computes in float32 what CUDA does, and the processor does what needs float64, kinds
that depend on the weight under them, as DoRA by its norms, and tensors of F64.

On CUDA each worker thread has a stream of its own and page-locked memory for what it reads and writes, so that while
one tile is computed, another one is on its way: with two threads that is double buffering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from loratools.engine.task import TILE
from loratools.errors import NoDevice

if TYPE_CHECKING:
    import torch

TILES = {"cpu": TILE, "cuda": 16 << 20, "mps": 16 << 20}
"""Bytes of one tile: in a core's cache, or large enough that starting a kernel costs nothing beside it."""


def check(device: str) -> None:
    """Raise `NoDevice` where torch has no such device."""
    if device != "cpu":
        import torch

        there: dict[str, Callable[[], bool]] = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        if not there[device]():
            raise NoDevice(
                f"device {device}: torch {torch.__version__} finds none on this machine",
                hint="Leave --device out, or install a torch that is built for the machine's GPU.",
            )


@contextmanager
def exact_products(device: str) -> Iterator[None]:
    """Keep products in full float32 while the context is open; what was set before comes back."""
    import torch

    matmul, threads = torch.backends.cuda.matmul, torch.get_num_threads()
    before = matmul.allow_tf32
    torch.set_num_threads(1)  # the workers share the cores already
    if device == "cuda":
        matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if device == "cuda":
            matmul.allow_tf32 = before


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which the calling thread's work goes to a stream of its own."""
    import torch

    if device.type != "cuda":
        return nullcontext()
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(stream)
