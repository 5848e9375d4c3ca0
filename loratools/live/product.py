"""Products of factors: an autograd function for y = W·x + b + s·B·A·x that keeps x once, not a cast copy, not a mask.

Plain autograd keeps x for A, x for W in another dtype where the factors are float32 and the base is not, and with
dropout a masked copy and the mask. Here the mask is drawn a second time from its seed, and A and B are cast a second
time. The formulas, with D the mask over 1 − p, or 1 where nothing is dropped, and G the gradient of y:

    u = (D∘x)·Aᵀ        y = x·Wᵀ + b + s·u·Bᵀ
    ∂B = s·Gᵀ·u         ∂A = s·(G·B)ᵀ·(D∘x)        ∂x = G·W + s·D∘(G·B·A)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loratools.linalg.native import thin


def draw_seed() -> int:
    """Draw the seed of a mask from torch's global generator, so that who resumes or recomputes draws the same mask."""
    return int(torch.randint(1 << 62, ()))


def mask(x: Tensor, p: float, seed: int) -> Tensor:
    """Return the mask of dropout for x over 1 − p, drawn from a seed, in the dtype of x.

    p is the probability of a zero, in [0, 1). Equal seeds give equal masks on one kind of device.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - p, generator=generator).mul_(1 / (1 - p))


class LowRankLinear(torch.autograd.Function):
    """y = W·x + b + s·B·A·(D∘x); see the head of this file.

    `apply(x, W, b, A, B, s, p, seed)` takes x (…, in), W (out, in), b (out,) or None, A (r, in), B (out, r), the scale
    s, and the probability p and seed of dropout; p = 0 drops nothing. It computes in the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float, p: float, seed: int
    ) -> Tensor:
        """Return y (…, out)."""
        y = F.linear(x, W, b)
        flat = x.reshape(-1, x.shape[-1])
        u, ctx.thin = add_product(y, flat * mask(flat, p, seed) if p else flat, A, B, scale)
        ctx.save_for_backward(x, W, A, B, u)
        ctx.settings = scale, p, seed
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, W, b, A and B, those that somebody needs."""
        if torch.is_grad_enabled():  # create_graph=True: these gradients are to have gradients of their own
            return _differentiable_gradients(ctx, grad)
        x, W, A, B, u = ctx.saved_tensors
        scale, p, seed = ctx.settings
        needs_x, needs_W, needs_b, needs_A, needs_B, *_ = ctx.needs_input_grad
        G, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        D = mask(flat, p, seed) if p and (needs_x or needs_A) else None
        dropped = flat if D is None else flat * D
        dx = G @ W if needs_x else None
        dW = G.T @ flat if needs_W else None
        db = G.sum(0) if needs_b else None
        # What the factors add to ∂x: at once, or by itself where D is to be multiplied with it.
        through = None if dx is None else dx if D is None else torch.zeros_like(dx)
        if ctx.thin and not torch.compiler.is_compiling() and G.dtype is x.dtype:
            dA, dB = thin.backward(G.contiguous(), dropped, u, A, B, scale, through, needs_A, needs_B)
        else:
            dA, dB = gradients(G, dropped, u, A, B, scale, through, needs_A, needs_B)
        if dx is not None and through is not None:
            if D is not None:
                dx.add_(through.mul_(D))
            dx = dx.view_as(x)
        return dx, dW, db, dA, dB, None, None, None


def add_product(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, bool]:
    """Add s·u·Bᵀ to y (…, out) in place; return u = x·Aᵀ (rows, r), and whether C did it.

    x is (rows, in), y contiguous. Computes in the dtype of x.
    """
    flat = y.view(-1, y.shape[-1])
    if thin.serves(x, flat, A, B):
        return thin.forward(x, flat, A, B, scale), True
    u = x @ A.to(x.dtype).T
    flat.addmm_(u, B.to(x.dtype).T, alpha=scale)
    return u, False


def gradients(
    G: Tensor, x: Tensor, u: Tensor, A: Tensor, B: Tensor, scale: float, dx: Tensor | None,
    needs_A: bool, needs_B: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return ∂A and ∂B, None where nobody needs them, and add s·G·B·A to dx in place."""
    dB = (G.T @ u).to(B.dtype).mul_(scale) if needs_B else None
    if dx is None and not needs_A:
        return None, dB
    v = (G @ B.to(G.dtype)).mul_(scale)
    if dx is not None:
        dx.addmm_(v, A.to(G.dtype))
    return (v.T @ x).to(A.dtype) if needs_A else None, dB


def _differentiable_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return what `LowRankLinear.backward` does by operations that autograd knows, u computed again from x and A."""
    x, W, A, B, _ = ctx.saved_tensors
    scale, p, seed = ctx.settings
    G, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    D = mask(flat, p, seed) if p else torch.ones_like(flat[:1, :1])
    v, dropped = (G @ B.to(G.dtype)) * scale, flat * D
    dx = (G @ W + (v @ A.to(G.dtype)) * D).view_as(x)
    dA = (v.T @ dropped).to(A.dtype)
    dB = (G.T @ (dropped @ A.to(x.dtype).T)).to(B.dtype) * scale
    grads = dx, G.T @ flat, G.sum(0), dA, dB
    return (
        *(each if needed else None for each, needed in zip(grads, ctx.needs_input_grad, strict=False)),
        None,
        None,
        None,
    )


def row_norms(W: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return ‖W + scale·left·right‖₂ of each row (rows,), in float32 or the wider dtype of W; W is (rows, columns)."""
    dtype = torch.promote_types(torch.promote_types(W.dtype, left.dtype), torch.float32)
    norms: Tensor = torch.addmm(W.to(dtype), left.to(dtype), right.to(dtype), alpha=scale).norm(dim=1)
    return norms
