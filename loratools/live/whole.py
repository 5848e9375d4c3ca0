"""What takes a parameter's place while a module runs: a tensor trained whole, or a weight that an update changed.

Each has `value(W, weight)`: what stands for the parameter W in a forward, with an adapter's weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loratools.adapter.kinds import Update
from loratools.adapter.placement.resolve import Placement
from loratools.live.below.silent import Silent


class Whole(Silent):
    """Something that takes a parameter's place. `path` names it in the adapter."""

    path: str

    @property
    def replaces(self) -> bool:
        """Whether it stands for numbers of the parameter, whatever those are: then no weight can scale it."""
        return False

    @property
    def rows(self) -> Sequence[int]:
        """Rows of the parameter that it replaces, where it replaces single ones."""
        return ()

    def value(self, W: Tensor | None, weight: float) -> Tensor:
        """Return what stands for the parameter W."""
        raise NotImplementedError


class Replacement(Whole):
    """A tensor that was trained whole, or is: `tensor`, a parameter or a buffer. No weight can scale it."""

    tensor: Tensor

    def __init__(self, path: str, tensor: Tensor) -> None:
        super().__init__()
        self.path = path
        if isinstance(tensor, nn.Parameter):
            self.register_parameter("tensor", tensor)
        else:
            self.register_buffer("tensor", tensor, persistent=False)

    @property
    def replaces(self) -> bool:
        return True

    def value(self, W: Tensor | None, weight: float) -> Tensor:
        return self.tensor if W is None else self.tensor.to(W.dtype)


class Changed(Whole):
    """A weight as placed updates of any kind change it, by the arithmetic of the kinds themselves; nothing trains it.

    The changed weight is made when it is first needed and kept, which takes as much memory as the weight.
    """

    def __init__(self, path: str, placements: Sequence[Placement]) -> None:
        super().__init__()
        self.path, self.placements = path, tuple(placements)
        self.kept: tuple[object, Tensor] | None = None

    @property
    def replaces(self) -> bool:
        return bool(self.rows)

    @property
    def rows(self) -> Sequence[int]:
        return [row for placement in self.placements for row in placement.update.replaced_rows]

    def forget(self) -> None:
        """Forget the changed weight."""
        self.kept = None

    def value(self, W: Tensor | None, weight: float) -> Tensor:
        assert W is not None
        version = None if W.is_inference() else W._version
        key = W.data_ptr(), version, W.dtype, weight, torch.is_inference_mode_enabled()
        if self.kept is None or self.kept[0] != key:
            self.kept = key, changed(W, [(placement, weight) for placement in self.placements])
        return self.kept[1]


def changed(W: Tensor, placements: Sequence[tuple[Placement, float]]) -> Tensor:
    """Return a copy of a parameter W with placed updates, each times a weight, in float32 and rounded once.

    W has any floating-point dtype and the shape of its base tensor; a float64 one is computed in float64.
    """
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    base = W.detach().to(dtype).reshape(placements[0][0].site.matrix)
    after = base.clone()
    with torch.no_grad():
        for placement, weight in placements:
            site = placement.site
            term = placement.update.term(site, weight, dtype, W.device)
            # Views of the one rectangle; steps of rows make them, as slices do.
            rows, columns = slice(*site.rows), slice(*site.columns)
            region, unchanged = after[rows, columns], base[rows, columns].contiguous()
            tile = region.contiguous()
            if term.needs_pass:
                term.observe_rows(unchanged, slice(0, len(tile)))
            term.apply_rows(tile, slice(0, len(tile)), unchanged if term.needs_base else None)
            region.copy_(tile)
    return after.reshape(W.shape).to(W.dtype)


class TokenRows(Whole):
    """Trainable rows in the place of some of W's: W'[i] = the row of token i, as PEFT's `trainable_token_indices`.

    Where nothing is trained the changed weight is kept from call to call, which takes as much memory as the weight.
    """

    delta: nn.Parameter
    indices: Tensor

    def __init__(self, path: str, update: Update, delta: nn.Parameter) -> None:
        super().__init__()
        self.path, self.kind, self.scaling, self.alpha = path, update.kind, update.scaling, update.alpha
        self.layout, (self.name,) = dict(update.layout), update.parts
        self.kept: tuple[object, Tensor] | None = None
        self.register_parameter("delta", delta)
        self.register_buffer("indices", torch.tensor(list(update.replaced_rows), device=delta.device), persistent=False)

    def forget(self) -> None:
        """Forget the changed weight."""
        self.kept = None

    @property
    def replaces(self) -> bool:
        return True

    @property
    def rows(self) -> Sequence[int]:
        rows: list[int] = self.layout["rows"]
        return rows

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensor under PEFT's name of it."""
        return {self.name: self.delta}

    def value(self, W: Tensor | None, weight: float) -> Tensor:
        assert W is not None
        inputs = W, self.delta
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or any(each.is_inference() for each in inputs):
            self.kept = None
            return W.index_copy(0, self.indices, self.delta.to(W.dtype))
        key = W.dtype, torch.is_inference_mode_enabled(), *((each.data_ptr(), each._version) for each in inputs)
        if self.kept is None or self.kept[0] != key:
            self.kept = key, W.index_copy(0, self.indices, self.delta.to(W.dtype))
        return self.kept[1]


class Stack(Whole):
    """The trainable factors of stacked experts, W (E, out, in) or (E, in, out): W + s·B[e]·A[e] of every expert."""

    A: nn.Parameter
    B: nn.Parameter

    def __init__(self, path: str, update: Update, A: nn.Parameter, B: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        self.path, self.kind, self.scaling, self.alpha = path, update.kind, update.scaling, update.alpha
        self.layout, self.transposed = {**update.layout, "transposed": transposed}, transposed
        self.names = tuple(update.parts)
        self.register_parameter("A", A)
        self.register_parameter("B", B)

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors under PEFT's names of them."""
        return dict(zip(self.names, (self.A, self.B), strict=True))

    def value(self, W: Tensor | None, weight: float) -> Tensor:
        assert W is not None
        experts = int(self.layout["experts"])
        A = self.A.reshape(experts, -1, self.A.shape[1]).to(W.dtype)
        B = self.B.reshape(len(self.B), -1, experts).to(W.dtype)
        product = "ore,eri->eio" if self.transposed else "ore,eri->eoi"
        return W + (self.scaling * weight) * torch.einsum(product, B, A).reshape(W.shape)
