"""LoRA on a parameter that stacks experts, W (E, out, in): ΔW[e] = s·B[e]·A[e], as PEFT's `target_parameters` has it.

A is (E·r, in), expert after expert; B is (out, r·E) with the expert as its last index: B[e][o, q] = B[o, q·E + e].
To read B expert after expert gives a change of the right size that is wrong everywhere. What the shapes do not say is
the `layout`: the number E, the name of the parameter, and whether it is stored (E, in, out) (`transposed`).

Where `transposed` is None it is settled by the base's shape, or by what its model type is known to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

from loratools.adapter.kinds import Factors, Tensor
from loratools.adapter.kinds._product import LowRank
from loratools.adapter.kinds._shared import Additive
from loratools.adapter.parts import A, B
from loratools.storage.lazy import LazyTensor


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsUpdate(Additive):
    """The factors of all experts. Raises `ValueError` where A and B do not hold E equal ranks."""

    A: LazyTensor
    B: LazyTensor
    scaling: float
    alpha: float
    experts: int
    parameter: str
    transposed: bool | None = None

    kind = "experts"

    def __post_init__(self) -> None:
        A, B = self.A.shape, self.B.shape
        if len(A) != 2 or len(B) != 2 or 0 in A + B or A[0] != B[1]:
            raise ValueError(f"A {A} and B {B} do not share a rank; expected (E·r, in) and (out, r·E)")
        if self.experts < 1 or A[0] % self.experts:
            raise ValueError(f"A {A} does not hold the same rank for each of {self.experts} experts")

    @property
    def rank(self) -> int:
        return self.A.shape[0] // self.experts

    @property
    def shape(self) -> tuple[int, ...]:
        """(E, out, in), whatever the order in which the base stores them."""
        return self.experts, self.B.shape[0], self.A.shape[1]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        return {A: self.A, B: self.B}

    @property
    def layout(self) -> Mapping[str, Any]:
        return {"experts": self.experts, "parameter": self.parameter, "transposed": self.transposed}

    @property
    def members(self) -> Sequence[Expert]:
        """The update of each expert."""
        return [Expert(self, number, self.scaling, self.alpha) for number in range(self.experts)]

    def term(self, *_: Any) -> NoReturn:
        """Raise `ValueError`: a site holds one expert."""
        raise ValueError("a stack of experts lands on one site for each expert")

    project = term

    def delta_weight(self) -> Tensor:
        """Return s·B[e]·A[e] of every expert in float32, (E, out, in)."""
        import torch

        return torch.stack([expert.delta_weight() for expert in self.members])


@dataclass(frozen=True, slots=True, eq=False)
class Expert(LowRank):
    """One expert of a stack: s·B[e]·A[e], (out, in)."""

    stack: ExpertsUpdate
    number: int
    scaling: float
    alpha: float

    kind = "experts"

    @property
    def rank(self) -> int:
        return self.stack.rank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def parts(self) -> Mapping[str, LazyTensor]:
        """The tensors of the whole stack, in which it lies."""
        return self.stack.parts

    def factored(self) -> Factors:
        """Return B[e] and A[e]."""
        (out, columns), A, B = self.shape, self.stack.A, self.stack.B
        left = LazyTensor(B.dtype, (out, self.rank), lambda: _loaded(self.stack)[1][:, :, self.number], file=B.file)
        right = LazyTensor(A.dtype, (self.rank, columns), lambda: _loaded(self.stack)[0][self.number], file=A.file)
        return Factors(left, right, self.scaling)


@lru_cache(maxsize=4)
def _loaded(stack: ExpertsUpdate) -> tuple[Tensor, Tensor]:
    """Return A (E, r, in) and B (out, r, E); kept for a moment, for the experts of a stack come one after the other."""
    A, B = stack.A.load(), stack.B.load()
    return A.reshape(stack.experts, stack.rank, -1), B.reshape(len(B), stack.rank, stack.experts)


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Return False: the tensors are named as those of `lora`; only a layout tells that they are stacked."""
    return False


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> ExpertsUpdate:
    """Return the update; raise `ValueError` where nothing says how many experts there are, and of which parameter."""
    if not layout:
        raise ValueError("nothing says how many experts are stacked here, and in which parameter")
    return ExpertsUpdate(
        parts[A], parts[B], scaling, alpha, layout["experts"], layout["parameter"], layout.get("transposed")
    )
