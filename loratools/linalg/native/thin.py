"""`thin.c`: what a linear layer's factors add to it, and their gradients, where torch's general products are slow.

A product with a thin factor costs torch as much for its start as for its arithmetic. C is worth it on CPU tensors of
BF16 and F32 while the numbers are few enough for one thread; `serves` says where. Elsewhere torch does the same.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LIBRARY = Path(__file__).with_name("libthin.so")
LANES = 16  # as in thin.c
_MOST = 1 << 22  # rows × rank × (in + out), from which on several threads of torch are quicker
_PLAIN = (Tensor, nn.Parameter)


@cache
def _library() -> tuple[Any, tuple[torch.dtype, ...]]:
    """Return the compiled library and the dtypes that it serves on this processor; (None, ()) where it does not."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:  # not compiled here
        return None, ()
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    layer: list[Any] = [pointer, pointer, size, size, size, size, ctypes.c_float, ctypes.c_int]
    library.loratools_thin_forward.argtypes = [*layer, *[pointer] * 3]
    library.loratools_thin_backward.argtypes = [*layer, *[pointer] * 6]
    library.loratools_thin_batch.argtypes = [*[size] * 5, *[pointer] * 4]
    return library, (torch.float32, torch.bfloat16)[: library.loratools_thin_served()]


def dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes of x that the C code serves on this processor; none where it is not compiled."""
    return _library()[1]


def serves(x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> bool:
    """Tell whether `forward` takes these: x (rows, in), y (rows, out), A (r, in) and B (out, r) in float32."""
    if torch.compiler.is_compiling() or x.dtype not in _library()[1]:
        return False
    # Who traces (jit.trace, make_fx) or counts operations sees torch's alone: there would be no adapter in the graph.
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
        return False
    (rank, inputs), (rows, outputs) = A.shape, y.shape
    kind, other = type(A), type(B)
    return (
        A.dtype is B.dtype is torch.float32
        and x.dtype is y.dtype
        and inputs % LANES == outputs % LANES == 0
        and rank * rows > 0
        and kind in _PLAIN
        and other in _PLAIN
        and type(x) is type(y) is Tensor
        and x.is_cpu
        and A.is_cpu
        and B.is_cpu
        and x.is_contiguous()
        and A.is_contiguous()
        and B.is_contiguous()
        and (rows * rank * (inputs + outputs) <= _MOST or torch.get_num_threads() == 1)
    )


def forward(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Add s·u·Bᵀ to y (rows, out) in place; return u = x·Aᵀ (rows, r).

    Takes what `serves` says yes to, y contiguous. Factors and u have the dtype of x; sums are in float32.
    """
    (rank, inputs), (rows, outputs) = A.shape, y.shape
    u = x.new_empty(rows, rank)
    layer = A.data_ptr(), B.data_ptr(), rows, inputs, outputs, rank, scale, x.dtype is torch.bfloat16
    if not _library()[0].loratools_thin_forward(*layer, x.data_ptr(), y.data_ptr(), u.data_ptr()):
        raise MemoryError
    return u


def backward(
    grad: Tensor, x: Tensor, u: Tensor, A: Tensor, B: Tensor, scale: float, dx: Tensor | None,
    needs_A: bool, needs_B: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return ∂A = s·(G·B)ᵀ·x and ∂B = s·Gᵀ·u in float32, None where nobody needs them; add s·G·B·A to dx in place.

    x, A, B and u are as `forward` took and gave them; G (rows, out) and dx (rows, in) are like x in dtype, contiguous.
    """
    (rank, inputs), (rows, outputs) = A.shape, grad.shape
    dA, dB = torch.empty_like(A) if needs_A else None, torch.empty_like(B) if needs_B else None
    layer = A.data_ptr(), B.data_ptr(), rows, inputs, outputs, rank, scale, x.dtype is torch.bfloat16
    results = (None if tensor is None else tensor.data_ptr() for tensor in (dx, dA, dB))
    if not _library()[0].loratools_thin_backward(*layer, grad.data_ptr(), x.data_ptr(), u.data_ptr(), *results):
        raise MemoryError
    return dA, dB


def serves_batch(x: Tensor, outputs: int, rank: int) -> bool:
    """Tell whether `batch` takes x (b, rows, in) for so many outputs, with factors of a rank rounded up to 16."""
    if torch.compiler.is_compiling() or x.dtype is not torch.float32 or x.dtype not in _library()[1]:
        return False
    inputs = x.shape[-1]
    products = x.numel() // inputs * rank * (inputs + outputs)
    return (
        type(x) is Tensor
        and x.is_cpu
        and inputs % LANES == outputs % LANES == 0
        and (products <= _MOST or torch.get_num_threads() == 1)
    )


def batch(x: Tensor, y: Tensor, F: Tensor, P: Tensor) -> None:
    """Add x·F·P to y in place, for each of a batch: x (b, rows, in), y (b, rows, out), F (b, in, R), P (b, R, out).

    All are contiguous CPU tensors of float32; R, in and out are multiples of 16.
    """
    count, rows, inputs = x.shape
    at = (tensor.data_ptr() for tensor in (x, F, P, y))
    if not _library()[0].loratools_thin_batch(count, rows, inputs, y.shape[2], F.shape[2], *at):
        raise MemoryError
