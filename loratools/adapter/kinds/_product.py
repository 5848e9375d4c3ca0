"""A change that is a product, ΔW = s·left·right, and what kinds of two factors have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, ClassVar, Self

from loratools.adapter import kinds
from loratools.adapter import parts as part_names
from loratools.adapter.kinds import Device, DType, Factors, Tensor, Underlying, Update
from loratools.adapter.kinds._shared import Additive
from loratools.adapter.parts import BIAS
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.adapter.basis import Basis
    from loratools.adapter.kinds._sum import Product
    from loratools.adapter.site import Site


class LowRank(Additive):
    """An update s·left·right of the weight seen as a matrix: its first side × all others.

    A kind says by `factored` which of its tensors stand left and right; everything else follows.
    """

    __slots__ = ()

    @abstractmethod
    def factored(self) -> Factors:
        """Return (rows, r) and (r, columns), with the scaling."""

    def term(self, site: Site, weight: float, dtype: DType, device: Device) -> Product:
        """Return w·s·left · right, or w·s·rightᵀ · leftᵀ where the base stores the transpose."""
        from loratools.adapter.kinds._sum import Product

        left, right = (factor.to(device=device, dtype=dtype) for factor in self.factored().load())
        left = left[site.part_rows]
        if site.transposed:
            left, right = right.T, left.T
        return Product.of(weight * self.scaling, left.contiguous(), right.contiguous())

    def project(self, X: Tensor, weight: float, under: Underlying) -> Tensor:
        """Return X·Wᵀ + w·s·(X·rightᵀ)·leftᵀ."""
        left, right = (factor.to(X) for factor in self.factored().load())
        return under.below(X) + weight * self.scaling * ((X @ right.T) @ left[under.site.part_rows].T)

    def with_factors(self, left: LazyTensor, right: LazyTensor, bias: LazyTensor | None = None) -> Update:
        """Return a plain product, of kind `lora` or `conv` by the shape: what else a kind has is in the factors."""
        out, rank, *inner = *left.shape, *self.shape[1:]
        A, B = right.reshaped((rank, *inner)), left.reshaped((out, rank, *(1 for _ in inner[1:])))
        parts = {part_names.A: A, part_names.B: B} | ({} if bias is None else {BIAS: bias})
        update: Update = kinds.get("conv" if len(inner) > 1 else "lora").build(parts, 1.0, float(rank))
        return update

    def delta_weight(self) -> Tensor:
        """Return s·left·right in float32, with `shape`."""
        left, right = (factor.float() for factor in self.factored().load())
        return (self.scaling * (left @ right)).reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class TwoFactors(LowRank):
    """s·B·A of two tensors as a file has them, A (r, in, …) and B (out, r, …), with or without a bias (out,) of B.

    Kinds state the class variables. Raises `ValueError` where A and B are not factors as `expected` says, do not share
    a rank, or one is empty.
    """

    A: LazyTensor
    B: LazyTensor
    scaling: float
    alpha: float
    bias: LazyTensor | None = None

    names: ClassVar[tuple[str, str]] = (part_names.A, part_names.B)  # of the parts A and B
    sides: ClassVar[tuple[int, ...]] = (2,)  # how many A can have
    expected: ClassVar[str] = "(r, in) and (out, r)"
    takes_bias: ClassVar[bool] = True
    transposed: ClassVar[bool] = False  # the weight is (in, out), an embedding's (V, d)

    def __post_init__(self) -> None:
        A, B = self.A.shape, self.B.shape
        if 0 in A + B:
            raise ValueError(f"empty factors, A {A} and B {B} (an ungathered ZeRO-3 or FSDP save?)")
        if len(A) not in self.sides or len(B) != len(A) or set(B[2:]) > {1}:
            raise ValueError(f"A {A} and B {B} are no factors of kind {self.kind}; expected {self.expected}")
        if A[0] != B[1]:
            grouped = len(A) > 2 and A[0] > B[1] and A[0] % B[1] == 0
            why = f": a convolution with {A[0] // B[1]} groups, which cannot be merged" if grouped else ""
            raise ValueError(f"A {A} and B {B} do not share a rank{why or '; expected ' + self.expected}")
        if self.bias is not None and self.bias.shape != B[:1]:
            raise ValueError(f"{BIAS} has shape {self.bias.shape}, expected {B[:1]}")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.B.shape[0], *self.A.shape[1:]
        return shape[::-1] if self.transposed else shape

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        a, b = self.names
        return {a: self.A, b: self.B, BIAS: self.bias} if self.bias else {a: self.A, b: self.B}

    @property
    def roles(self) -> Mapping[str, str]:
        return dict(zip(("A", "B"), self.names, strict=True)) | ({"bias": BIAS} if self.bias else {})

    def factored(self) -> Factors:
        """Return B as (out, r) and A as (r, in·…), or Aᵀ and Bᵀ."""
        A = self.A.reshaped((self.rank, prod(self.A.shape[1:])))
        B = self.B.reshaped((self.B.shape[0], self.rank))
        if not self.transposed:
            return Factors(B, A, self.scaling)
        left, right = (lazy.map(lambda tensor: tensor.T, lazy.shape[::-1]) for lazy in (A, B))
        return Factors(left, right, self.scaling)

    def with_factors(self, left: LazyTensor, right: LazyTensor, bias: LazyTensor | None = None) -> Self:
        """Return an update of the same kind and shape whose tensors are these."""
        rank = left.shape[1]
        if self.transposed:
            left, right = (lazy.map(lambda tensor: tensor.T, lazy.shape[::-1]) for lazy in (right, left))
        A = right.reshaped((rank, *self.A.shape[1:]))
        B = left.reshaped((left.shape[0], rank, *self.B.shape[2:]))
        return type(self)(A, B, 1.0, float(rank), bias)

    def weighted(self, weight: float) -> Self:
        """Return the update with the scaling times the weight."""
        return replace(self, scaling=self.scaling * weight)

    def carried(self, basis: Basis) -> Self:
        """Return A·diag(columns) and diag(rows)·B, with the bias of B; of an embedding's (V, d) the other way round."""
        from loratools.adapter.basis import along

        rows, columns = (basis.columns, basis.rows) if self.transposed else (basis.rows, basis.columns)
        c = None if self.bias is None else along(self.bias, rows, 0)
        return replace(self, A=along(self.A, columns, 1), B=along(self.B, rows, 0), bias=c)

    @classmethod
    def claims(cls, parts: Mapping[str, LazyTensor]) -> bool:
        """Tell whether these are the two factors, with or without a bias of B."""
        names = parts.keys() - {BIAS} if cls.takes_bias else parts.keys()
        return names == set(cls.names) and len(parts[cls.names[0]].shape) in cls.sides

    @classmethod
    def build(cls, parts: Mapping[str, LazyTensor], scaling: float, alpha: float) -> Self:
        """Return the update of two factors."""
        a, b = cls.names
        return cls(parts[a], parts[b], scaling, alpha, parts.get(BIAS))
