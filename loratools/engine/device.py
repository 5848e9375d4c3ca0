"""Where the arithmetic of a merge runs: on the processor, on a CUDA device, or on a GPU of Apple (mps).

The policy: a CUDA device computes what the processor does, in float32 without TF32 (float64 where the processor does),
rounded once to nearest, ties to even, and results near zero again in float64 on the host. Only the last bit of a
float32 sum may differ, for its order does; where that bit decides a tie, one element in some ten thousand of a BF16
tensor is the other neighbour. Processors of other kinds may differ likewise in what torch computes; the C code writes
the same bytes on all of them. On one machine threads, tiles, their order and repetition change no byte: on CUDA the
library asks for algorithms that add in one order (`set_deterministic_debug_mode`, CUBLAS_WORKSPACE_CONFIG), and warns
where torch has none. Another GPU or another version of its libraries may add in another order; a record says which.

A GPU of Apple has no float64: it computes in float32 what CUDA does, and the processor does what needs float64, kinds
that depend on the weight under them, as DoRA by its norms, and tensors of F64.

On CUDA each worker thread is a lane: a stream of its own and page-locked memory for one tile as read and one as
written. While one lane computes, others read, write and copy: with two threads that is double buffering. There are at
most `LANES` of them, so page-locked memory is at most 2 · LANES tiles, for a model of any size.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from loratools.engine.task import TILE
from loratools.errors import NoDevice
from loratools.parallel import one_torch_thread

TILES = {"cpu": TILE, "cuda": 16 << 20, "mps": 16 << 20}
"""Bytes of one tile: in a core's cache, or large enough that starting a kernel costs nothing beside it."""

LANES = 8
"""Most threads that compute on one device; what they hold there and page-locked here is bounded by that."""

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # without it cuBLAS may add in another order on another stream


def kind_of(device: str) -> str:
    """Return what a device is, `cpu`, `cuda` or `mps`, without its number."""
    return device.partition(":")[0]


def check(device: str, *, wide: bool = False) -> None:
    """Raise `NoDevice` where torch has no such device, or cannot compute on it; `wide` asks for float64 there."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return
    import torch

    there: dict[str, Callable[[], int]] = {"cuda": _cuda_devices, "mps": lambda: int(torch.backends.mps.is_available())}
    with warnings.catch_warnings(record=True) as told:  # such as a driver that is too old
        warnings.simplefilter("always")
        count = there[kind]()
    if not count:
        why = "".join(f" ({_first_line(str(each.message))})" for each in told[:1])
        raise NoDevice(
            f"device {device}: torch {torch.__version__} finds none on this machine{why}",
            hint="Leave --device out, or install a torch that is built for the machine's GPU.",
        )
    if number and int(number) >= count:
        listed = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise NoDevice(f"device {device}: this machine has {listed}", hint="The first one has the number 0.")
    if wide and kind == "mps":
        raise NoDevice(
            f"device {device}: it has no float64, which this needs", hint="Leave --device out, or use a CUDA device."
        )
    if kind == "cuda":
        with told_plainly(device):  # a driver or a build that cannot compute shows at the first number
            torch.ones(1, device=device).add_(1).cpu()


def _cuda_devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def told_plainly(device: str) -> Iterator[None]:
    """Raise `NoDevice` for what torch says of a GPU while the block runs: its memory is full, or it failed."""
    try:
        yield
    except RuntimeError as error:
        line = _first_line(str(error))
        if kind_of(device) == "cpu" or not any(word in line for word in ("CUDA", "cuBLAS", "cusolver", "MPS", "HIP")):
            raise
        if "out of memory" in line or "ALLOC_FAILED" in line:
            raise NoDevice(
                f"device {device}: its memory, or page-locked memory, is full ({line})",
                hint="--threads 1 takes the least of it; another program may hold the rest. Or leave --device out.",
            ) from error
        raise NoDevice(
            f"device {device}: torch cannot compute on it ({line})", hint="Leave --device out, or try another device."
        ) from error


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].rstrip(".")


def described(device: str) -> dict[str, str]:
    """Return what a result that is computed on a GPU records of it: its kind and make, and torch's version; else {}."""
    if device == "cpu":
        return {}
    import torch

    kind = kind_of(device)
    make = torch.cuda.get_device_name(device) if kind == "cuda" else "Apple"
    return {"kind": kind, "make": make, "torch": torch.__version__, "precision": "float32, no TF32"}


@contextmanager
def exact_products(device: str) -> Iterator[None]:
    """Do what `computing` does, with one thread of torch in each worker: they share the cores already."""
    with one_torch_thread(), computing(device):
        yield


@contextmanager
def computing(device: str) -> Iterator[None]:
    """Keep products in full float32, and sums in one order, while the block runs; what was set before comes back.

    What torch says of the device is raised as `NoDevice`.
    """
    from loratools.linalg.precision import full_float32

    order = one_order() if kind_of(device) == "cuda" else nullcontext()
    with told_plainly(device), full_float32(), order:
        yield


@contextmanager
def one_order() -> Iterator[None]:
    """Have CUDA add in one order while the block runs, and torch warn of what cannot; nothing is left behind."""
    import torch
    from torch.utils import deterministic

    mode, fill, workspace = torch.get_deterministic_debug_mode(), _fill(), os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.set_deterministic_debug_mode(max(mode, 1))
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        if workspace is None:
            del os.environ[_WORKSPACE]


def _fill() -> bool:
    from torch.utils import deterministic

    return bool(deterministic.fill_uninitialized_memory)  # type: ignore[attr-defined]
