"""What linear layers have in common, however they store their weight: y = W·x + b + s·B·A·x."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from loratools.live.modules._slices import joinable, joined
from loratools.live.product import LowRankLinear, add_product, draw_seed, mask, row_norms
from loratools.live.site import Piece, Site, added, rows_landing, slice_of


class AffineSite(Site):
    """A linear layer with adapters.

    A subclass says by `matrix` what W is, (out, in), or None where the weight is stored as codes; and by `usual` the
    same where the class computes W·x + b and nothing else. Then x is kept once while training; a class with a forward
    of its own computes as it does, and the change is added to what it returns.
    """

    weight: Any
    bias: Any

    def matrix(self) -> Tensor | None:
        """Return W (out, in), a view of the weight, or None."""
        raise NotImplementedError

    def usual(self) -> Tensor | None:
        """Return W (out, in) where the module's own forward is W·x + b with a plain weight, else None."""
        raise NotImplementedError

    def changed(self, pieces: list[tuple[Piece, float]], x: Tensor, *args: Any, **settings: Any) -> Any:
        one = len(pieces) == 1 and pieces[0][0].plain
        alone = (one or joinable([piece for piece, _ in pieces])) and not args and not settings
        W = self.usual() if alone else None
        if W is not None:
            piece, weight = pieces[0]
            p = piece.dropout if self.training else 0.0  # type: ignore[attr-defined]
            if one:
                A, B, scale = piece.A, piece.B, piece.scaling * weight
            else:
                A, B, scale = *joined(pieces, len(W)), 1.0
            compiling = torch.compiler.is_compiling()
            grad = torch.is_grad_enabled() and (A.requires_grad or x.requires_grad or W.requires_grad)
            plain = not x.is_nested and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
            if not compiling:
                # torch.func and forward mode know no function with a backward of its own.
                plain = plain and not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0
            compiled = p and compiling  # a generator of its own is not for graphs
            if not grad and plain and not compiled:
                y = F.linear(x, W, self.bias)
                flat = x.reshape(-1, x.shape[-1])
                if p:  # as below: the first forward of a checkpoint has no gradients, its repetition has
                    flat = flat * mask(flat, p, draw_seed())
                add_product(y, flat, A, B, scale)
                return y
            if grad and plain and not compiled:
                return LowRankLinear.apply(x, W, self.bias, A, B, scale, p, draw_seed() if p else 0)  # type: ignore
        y = self.plain_forward(x, *args, **settings)
        for piece, weight in pieces:
            y = self.plus(y, piece, weight, x)
        return y

    def plus(self, y: Tensor, piece: Piece, weight: float, x: Tensor) -> Tensor:
        """Return y and what a piece adds to it, or makes of it, by operations that autograd knows."""
        dtype, scale = x.dtype if x.is_floating_point() else piece.A.dtype, piece.scaling * weight
        dropped = F.dropout(x, piece.dropout, self.training)  # type: ignore[attr-defined]
        delta = F.linear(F.linear(dropped.to(dtype), piece.A.to(dtype)), piece.B.to(dtype)) * scale
        if piece.A0 is not None and piece.B0 is not None:
            delta = delta - F.linear(F.linear(dropped.to(dtype), piece.A0.to(dtype)), piece.B0.to(dtype)) * scale
        if piece.bias is None and piece.magnitude is None:
            return added(y, delta, piece.spans)
        shift = 0 if piece.bias is None else scale * piece.bias.to(y.dtype)
        if piece.magnitude is None:
            return added(y, delta + shift, piece.spans)
        # y = g∘(W·x + s·B·A·x) + b, g detached from the gradient by its norm alone (DoRA §4.3); as PEFT, dropout is
        # of both x.
        W, g = self.matrix(), self.gains(piece, weight).to(y.dtype)
        if dropped is x:
            straight = y if self.bias is None else y - self.bias.to(y.dtype)
        else:
            straight = F.linear(dropped, W.to(dropped.dtype))  # type: ignore[union-attr]
        outputs = [(slice(None), slice(None))] if piece.spans is None else piece.spans
        for rows, places in outputs:
            own = (g[rows] - 1) * straight[..., places] + g[rows] * delta[..., rows].to(y.dtype)
            y = added(y, own, None if piece.spans is None else ((slice(None), places),))
        return y if piece.bias is None else added(y, torch.zeros_like(delta) + shift, piece.spans)

    def gains(self, piece: Piece, weight: float) -> Tensor:
        """Return g = m/‖W + s·B·A‖ of each output of a piece; where nothing is trained it is kept from call to call."""
        assert piece.magnitude is not None
        key = None
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            tensors = self.weight, piece.A, piece.B, piece.magnitude
            if not any(t.is_inference() for t in tensors):
                key = (*((t._version, t.data_ptr()) for t in tensors), weight)
            if key is not None and piece.gains is not None and piece.gains[0] == key:
                return piece.gains[1]
        with torch.no_grad():
            W = self.matrix()
            assert W is not None
            B = piece.B
            if piece.spans is not None:
                W, rows = slice_of(W, piece.spans), rows_landing(piece.spans, W.device)
                B = B[rows]
            norms = row_norms(W, B, piece.A, piece.scaling * weight)
            if piece.spans is not None:  # rows that land elsewhere are not asked for
                norms = norms.new_ones(len(piece.B)).index_copy(0, rows, norms)
        g = piece.magnitude.flatten() / norms.to(piece.magnitude.dtype)
        if key is not None:
            piece.gains = key, g
        return g


def has_own_forward(module: Any, usual: type[nn.Module]) -> bool:
    """Tell whether a module's class computes otherwise than `usual`, which it derives from."""
    kind: Any = type(module)
    return (kind.base if isinstance(module, Site) else kind).forward is not usual.forward
