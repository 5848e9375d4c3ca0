"""GLoRA as PEFT has it: W' = W + W∘A + B and b' = b + b∘D + E + W·C, with W and b unchanged (arXiv 2306.07967).

Each of A … E is a product `Xd`·`Xu`, a vector or a number `X`, or nothing, `zeros`; parts are named `glora_A.Xd` and so
on. A and B are (out, in), (out, 1) or one number, C is (in, 1), D and E are (out,) or one number. There is no alpha.
LyCORIS' GLoRA, kind `glora`, multiplies W by a matrix instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from loratools.adapter.kinds import Device, DType, Tensor, Underlying, Update
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.storage.lazy import LazyTensor

PATHS = "ABCDE"


@dataclass(frozen=True, slots=True, eq=False)
class GloraSumsUpdate(Changing):
    """The tensors of the five paths. Raises `ValueError` where one is missing or a product does not fit."""

    kind = "glora_sums"

    def check(self) -> None:
        for path in PATHS:
            parts = {name.rpartition(".")[2] for name in self.tensors if name.startswith(f"glora_{path}.")}
            if parts not in ({"Xd", "Xu"}, {"X"}, {"zeros"}):
                raise ValueError(f"glora_{path} has {', '.join(sorted(parts)) or 'nothing'}, expected Xd and Xu, or X")
            if parts == {"Xd", "Xu"} and self._shape(path, "Xd")[1:] != self._shape(path, "Xu")[:1]:
                raise ValueError(f"glora_{path}: Xd and Xu do not share a rank")
        Changing.check(self)
        for path in "ABDE":
            own, whole = self._shape(path, "X"), self.weight_shape or ()
            whole = whole if path in "AB" else whole[:1]
            sides = zip(reversed(own), reversed(whole), strict=False)
            if whole and (len(own) > len(whole) or any(a not in (1, b) for a, b in sides)):
                raise ValueError(f"glora_{path}.X has shape {own}, the base's weight {self.weight_shape}")

    def _shape(self, path: str, part: str) -> tuple[int, ...]:
        name = f"glora_{path}.{part}"
        return self.tensors[name].shape if name in self.tensors else ()

    @property
    def rank(self) -> int:
        """The rank of the first product; 0 where there is none."""
        return next((self._shape(path, "Xu")[0] for path in "ABC" if self._shape(path, "Xu")), 0)

    @property
    def own_shape(self) -> tuple[int, ...]:
        outs, ins = [0], [0]
        for path in "AB":
            outs += [*self._shape(path, "Xd")[:1], *self._shape(path, "zeros")[:1]]
            outs += [self._shape(path, "X")[0]] if len(self._shape(path, "X")) == 2 else []
            ins += [*self._shape(path, "Xu")[1:], *self._shape(path, "zeros")[1:]]
        ins += [(self._shape("C", part) or (0,))[0] for part in ("Xd", "X", "zeros")]
        for path in "DE":
            outs += [*self._shape(path, "zeros")]
            outs += [side for side in self._shape(path, "X") if side > 1]
        return max(outs), max(ins)

    def _path(self, path: str) -> tuple[Tensor, Tensor] | Tensor | None:
        """Return the two factors of a path, its vector or number, or None, in float64."""
        if f"glora_{path}.zeros" in self.tensors:
            return None
        if f"glora_{path}.X" in self.tensors:
            return self.number(f"glora_{path}.X")
        return self.number(f"glora_{path}.Xd"), self.number(f"glora_{path}.Xu")

    def filled(self, path: str) -> Tensor:
        """Return A or B, or what is broadcast to it; C (in, 1); D and E (out,) or one number, in float64."""
        found = self._path(path)
        if found is None:
            return self.tensors[f"glora_{path}.zeros"].load().double()
        return found[0] @ found[1] if isinstance(found, tuple) else found

    @property
    def on_bias(self) -> Update | None:
        return GloraBias(self.tensors, weight_shape=(self.shape[0], 1))

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W∘(1 + A) + B of rows."""
        A, B = (self.filled(path).to(device, dtype) for path in "AB")
        A, B = (M.expand(self.shape) if M.dim() == 2 else M for M in (A, B))

        def changed(W: Tensor, rows: slice) -> Tensor:
            a, b = (M[rows] if M.dim() == 2 else M for M in (A, B))
            return W * (1 + a) + b

        return changed

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·Wᵀ + Σₖ ((X∘Xu_k)·Wᵀ)∘Xd_k + X·Bᵀ, in products of the probes."""
        before = under.below(X)
        rows, count = under.site.part_rows, before.shape[1]
        found = self._path("A")
        result = before.clone()
        if isinstance(found, tuple):
            Xd, Xu = (factor.to(X) for factor in found)
            result += sum((under.below(X * Xu[k]) * Xd[rows, k] for k in range(len(Xu))), X.new_zeros(before.shape))
        elif found is not None:
            result += before * (found.to(X).flatten() if found.numel() == 1 else found.to(X).flatten()[rows])
        found = self._path("B")
        if isinstance(found, tuple):
            Xd, Xu = (factor.to(X) for factor in found)
            result += (X @ Xu.T) @ Xd[rows].T
        elif found is not None:
            vector = found.to(X).flatten()
            vector = vector.expand(count) if len(vector) == 1 else vector[rows]
            result += X.sum(1, keepdim=True) * vector
        return result


@dataclass(frozen=True, slots=True, eq=False)
class GloraBias(GloraSumsUpdate):
    """What the same tensors do to the bias; `read` gives the unchanged weight beside it, (out, in) of these rows."""

    read: Callable[[], Tensor] | None = None

    kind = "glora_bias"

    @property
    def own_shape(self) -> tuple[int, ...]:
        return 0, 1

    def over(self, weight: Callable[[], Tensor]) -> Self:
        """Return the update that reads the weight so."""
        return replace(self, read=weight)

    def _added(self, weight: Callable[[], Tensor] | None) -> Tensor:
        """Return W·C + E in float64, a number for each row of the site or for all."""
        E = self.filled("E")
        if self._path("C") is None:
            return E
        if weight is None:
            raise ValueError("its bias depends on the base's weight, which is not at hand")
        return E + (weight().double() @ self.filled("C")).flatten()

    def change(self, dtype: DType, device: Device) -> Change:
        """Return b∘(1 + D) + E + W·C of rows."""
        D, added = self.filled("D").to(device, dtype), self._added(self.read).to(device, dtype)
        D, added = (v.expand(self.shape[0]) for v in (D, added))
        return lambda b, rows: b * (1 + D[rows, None]) + added[rows, None]

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·b'ᵀ of the one column."""
        D, added = (
            v.to(X).expand(self.shape[0])[under.site.part_rows] for v in (self.filled("D"), self._added(self.read))
        )
        return under.below(X) * (1 + D) + X * added


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are paths of PEFT's GLoRA."""
    return bool(parts) and all(part.startswith("glora_") for part in parts)


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> GloraSumsUpdate:
    """Return the update; it has no scaling."""
    return GloraSumsUpdate(dict(parts))
