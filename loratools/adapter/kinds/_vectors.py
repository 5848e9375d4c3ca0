"""Singular vectors as PEFT asks torch for them, to the bit, for kinds that do not store them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loratools.adapter.kinds import Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread of torch, as every merge does: what several sum is rounded otherwise."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def largest(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, r), S (r,) and Vᵀ (r, n) of the largest singular values, from the whole decomposition in float32."""
    import torch

    with one_thread():
        U, S, Vt = torch.linalg.svd(W.float().contiguous(), full_matrices=False)
    return U[:, :rank], S[:rank], Vt[:rank]


def sketched(W: Tensor, rank: int, niter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `torch.svd_lowrank` makes after `torch.manual_seed`, Vᵀ for V; all threads share that generator."""
    import torch

    W = W.float().contiguous()
    tall = W.shape[0] >= W.shape[1]
    A = W if tall else W.T
    generator = torch.Generator().manual_seed(seed)
    with one_thread():
        Q = torch.linalg.qr(A @ torch.randn(A.shape[1], rank, generator=generator)).Q
        for _ in range(niter):
            Q = torch.linalg.qr(A @ torch.linalg.qr(A.T @ Q).Q).Q
        U, S, Vt = torch.linalg.svd(Q.T @ A, full_matrices=False)
        U = Q @ U
    return (U, S, Vt) if tall else (Vt.T, S, U.T)
