"""BOFT on outputs, as LyCORIS and ComfyUI have it: W' = diag(s)·R_m⋯R_1·W, a butterfly of rotations (arXiv 2311.06243).

`oft_blocks` (m, n, b, b) has m stages of n blocks. Stage i rotates outputs that are k = 2^i·b/2 apart: the outputs are
read as (c, 2, k), brought into the order (c, k, 2), cut into blocks of b, multiplied by R = (I + Q)·(I − Q)⁻¹ with
Q = X − Xᵀ, and put back. `alpha` is the constraint: all Q together are scaled down to ‖Q‖ = alpha·out where they are
longer. `rescale` (out, 1…) multiplies each row afterwards. A weight w stands within each stage, as in LyCORIS: R
becomes I + w·(R − I), and w has no effect on `rescale`. PEFT's BOFT, which is on inputs, is `boft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing, Mapped
from loratools.adapter.site import Site
from loratools.storage.lazy import LazyTensor

BLOCKS, RESCALE = "oft_blocks", "rescale"


@dataclass(frozen=True, slots=True, eq=False)
class BoftOutputUpdate(Changing):
    """The stages, and the factors of rows. Raises `ValueError` for shapes that are none of rotations."""

    kind = "boft_output"

    def check(self) -> None:
        shape = self.tensors[BLOCKS].shape
        if len(shape) != 4 or 0 in shape or shape[2] != shape[3]:
            raise ValueError(f"{BLOCKS} has shape {shape}, expected (m, n, b, b)")
        outputs, widest = shape[1] * shape[2], shape[2] // 2 * 2 ** shape[0]
        if shape[2] % 2 or outputs % widest:
            raise ValueError(f"{BLOCKS} has shape {shape}, which is no butterfly of even blocks")
        if RESCALE in self.tensors and self.tensors[RESCALE].parameters != outputs:
            raise ValueError(f"{RESCALE} has shape {self.tensors[RESCALE].shape}, expected {outputs} numbers")
        Changing.check(self)

    @property
    def rank(self) -> int:
        """The size b of a block."""
        return self.tensors[BLOCKS].shape[2]

    @property
    def own_shape(self) -> tuple[int, ...]:
        return self.tensors[BLOCKS].shape[1] * self.rank, 0

    @property
    def together(self) -> int:
        """Rows that the widest stage turns together."""
        stages: int = self.tensors[BLOCKS].shape[0]
        return self.rank << (stages - 1)

    def skew(self) -> Tensor:
        """Return Q of each block, constrained, (m, n, b, b), in float64."""
        X = self.number(BLOCKS)
        Q = X - X.mT
        limit, length = self.layout["constraint"] * self.own_shape[0], float(Q.norm()) + 1e-8
        return Q * (limit / length) if 0 < limit < length else Q

    def scales(self, dtype: DType, device: Device) -> Tensor:
        """Return the factor of each row, (out,)."""
        import torch

        scales = self.number(RESCALE).flatten() if RESCALE in self.tensors else torch.ones(self.own_shape[0])
        return scales.to(device, dtype)

    def change(self, dtype: DType, device: Device) -> Change:
        """Return the function of rows at weight 1."""
        return self.staged(1.0, dtype, device)

    def staged(self, weight: float, dtype: DType, device: Device) -> Change:
        """Return the function of rows with the weight in each stage: pairs of rows are brought together and rotated."""
        import torch

        Q, identity = self.skew(), torch.eye(self.rank, dtype=torch.float64)
        R = torch.linalg.solve(identity - Q, identity + Q, left=False)
        stages = (identity + weight * (R - identity)).to(device, dtype)
        scales, size = self.scales(dtype, device), self.rank

        def changed(W: Tensor, rows: slice) -> Tensor:
            Y = W.flatten(1)
            for i, blocks in enumerate(stages):
                apart = 2**i * size // 2
                pairs = Y.reshape(-1, 2, apart, Y.shape[1]).transpose(1, 2).reshape(-1, size, Y.shape[1])
                turned = blocks[rows.start // size : rows.stop // size] @ pairs
                Y = turned.reshape(-1, apart, 2, Y.shape[1]).transpose(1, 2).reshape(Y.shape)
            return (Y * scales[rows, None]).reshape(W.shape)

        return changed

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Mapped:
        """Return the term with the weight in its stages; raise `IncompatibleAdapter` where rows lie in several."""
        return replace(Changing.term(self, site, 1.0, dtype, device), change=self.staged(weight, dtype, device))

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return X·Wᵀ with its outputs turned stage by stage, and scaled."""
        return self._turned(under.below(X), weight)

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·f(W)ᵀ."""
        return self._turned(under.below(X), 1.0)

    def _turned(self, Y: Tensor, weight: float) -> Tensor:
        """Return outputs (k, out) after all stages: which outputs a block turns is reckoned from their numbers."""
        import torch

        identity, numbers = torch.eye(self.rank, dtype=torch.float64), torch.arange(Y.shape[1])
        for i, Q in enumerate(self.skew()):
            apart = 2**i * self.rank // 2
            inside = numbers % (2 * apart)
            order = numbers - inside + inside % 2 * apart + inside // 2
            R = (identity + Q) @ torch.linalg.inv(identity - Q)
            turned = torch.einsum("nij,knj->kni", R.to(Y), Y[:, order].view(len(Y), len(R), -1)).flatten(1)
            after = torch.empty_like(Y)
            after[:, order] = turned
            Y = Y + weight * (after - Y)
        return Y * self.scales(Y.dtype, Y.device)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the stages of a butterfly; blocks of three dimensions are those of `oft`."""
    return BLOCKS in parts and parts.keys() <= {BLOCKS, RESCALE} and len(parts[BLOCKS].shape) == 4


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> BoftOutputUpdate:
    """Return the update; its alpha is the constraint, where no layout has it.

    A file without one gives its rank, which constrains nothing.
    """
    constraint = layout["constraint"] if layout else alpha
    return BoftOutputUpdate(dict(parts), 1.0, constraint, {"constraint": constraint})
