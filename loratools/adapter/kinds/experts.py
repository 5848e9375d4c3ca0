"""LoRA on a parameter that stacks experts, W (E, out, in): ΔW[e] = s·B[e]·A[e], as PEFT's `target_parameters` has it.

A is (E·r, in), expert after expert; B is (out, r·E) with the expert as its last index: B[e][o, q] = B[o, q·E + e].
To read B expert after expert gives a change of the right size that is wrong everywhere. What the shapes do not say is
the `layout`: the number E, the name of the parameter, and whether it is stored (E, in, out) (`transposed`).

Where `transposed` is None it is settled by the base's shape, or by what a `Rule` and the base's model type say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NoReturn, Self

from loratools.adapter.kinds import Factors, Tensor, Update
from loratools.adapter.kinds._product import LowRank
from loratools.adapter.kinds._shared import Additive
from loratools.adapter.parts import A, B
from loratools.storage.lazy import LazyTensor

Rule = Literal["model", "inverse", "in_out", "out_in", "unknown"]
"""What says how a stack that shapes leave open lies: `model`, (E, in, out) where its class is `is_transposed`, as in
PEFT since 0.19.1; `inverse`, where it is not, as in PEFT 0.19.0; `in_out` and `out_in`, for all classes; or nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsUpdate(Additive):
    """The factors of all experts. Raises `ValueError` where A and B do not hold E equal ranks.

    `rule` counts where `transposed` is None. `alternatives` has the update for each other parameter of the same module
    that it may be for, since PEFT's names of wrappers do not say it; `ordered` tells whether their order is known.
    """

    A: LazyTensor
    B: LazyTensor
    scaling: float
    alpha: float
    experts: int
    parameter: str
    transposed: bool | None = None
    rule: Rule = "model"
    alternatives: Mapping[str, ExpertsUpdate] = field(default_factory=dict)
    ordered: bool = True

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

    @property
    def readings(self) -> Sequence[Update]:
        """The update for each parameter that it may be for, stored (E, out, in) and (E, in, out) where that is open."""
        turns = (False, True) if self.transposed is None else (self.transposed,)
        each = (self, *self.alternatives.values())
        return [replace(update, transposed=turn, alternatives={}, ordered=True) for update in each for turn in turns]

    @property
    def unsettled(self) -> str:
        """Which parameter it is for, and how that lies, as far as the file leaves it open."""
        names = ", ".join(sorted({self.parameter, *self.alternatives}))
        parameter = "" if self.ordered else f"which of {names} it is for"
        lies = "" if self.transposed is not None else "whether these experts are stored (in, out)"
        return " and ".join(filter(None, (parameter, lies)))

    def path(self, module: str) -> str:
        """Return `module.parameter` without PEFT's wrappers; the module where only the base tells the parameter."""
        bare = ".".join(segment for segment in module.split(".") if segment != "base_layer")
        return f"{bare}.{self.parameter}" if self.ordered else module

    def stored_in_out(self, is_transposed: bool | None) -> bool | None:
        """Return whether the parameter lies (E, in, out), by the file's `Rule` and by what its class says of itself."""
        if self.transposed is not None:
            return self.transposed
        if self.rule in ("in_out", "out_in"):
            return self.rule == "in_out"
        if is_transposed is None or self.rule == "unknown":
            return None
        return is_transposed != (self.rule == "inverse")

    def turned_round(self) -> Self:
        """Return the same change in factors of the transpose: (B·A)ᵀ = Aᵀ·Bᵀ, without rounding."""
        (count, out, inner), r = self.shape, self.rank
        A = self.B.map(lambda B: B.reshape(out, r, count).permute(2, 1, 0).reshape(-1, out), (count * r, out))
        B = self.A.map(lambda A: A.reshape(count, r, inner).permute(2, 1, 0).reshape(inner, -1), (inner, r * count))
        return replace(self, A=A, B=B, transposed=None if self.transposed is None else not self.transposed)

    def with_factors(self, left: LazyTensor, right: LazyTensor, bias: LazyTensor | None = None) -> Self:
        """Return a stack of the same parameter from left (E, out, r) and right (E, r, in).

        Raises `ValueError` where only the base tells the parameter, and with it the scaling that is folded in.
        """
        others = {name: other for name, other in self.alternatives.items() if other.scaling == self.scaling}
        if not self.ordered and len(others) < len(self.alternatives):
            raise ValueError(f"only the base tells {self.unsettled}, and their scalings differ")
        (count, out, r), inner = left.shape, right.shape[2]
        A = right.reshaped((count * r, inner))
        B = left.map(lambda tensor: tensor.permute(1, 2, 0).reshape(out, r * count), (out, r * count))
        made = replace(self, A=A, B=B, scaling=1.0, alpha=float(r), alternatives={})
        # Each parameter that it may be for has the same numbers.
        return replace(made, alternatives={name: replace(made, parameter=name) for name in others})

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

    def path(self, module: str) -> str:
        """Return the path of its stack and its number, `….down_proj.7`."""
        return f"{self.stack.path(module)}.{self.number}"

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
    own = ExpertsUpdate(
        parts[A], parts[B], scaling, alpha, layout["experts"], layout["parameter"], layout.get("transposed"),
        layout.get("rule", "model"), ordered=layout.get("ordered", True),
    )  # fmt: skip
    others = {
        each["parameter"]: build(parts, each["scaling"], each["alpha"], each) for each in layout.get("others", ())
    }
    return replace(own, alternatives=others) if others else own
