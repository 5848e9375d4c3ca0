"""PEANuT: W' = W + s·B·f(A·W), a small network makes the difference out of the weight (arXiv 2410.01870), as in PEFT.

`peanut_A.weight` (r, out), `peanut_B.weight` (out, r) and n encoders and decoders (r, r) in turn, with φ the function
that `layout["activation"]` names: h₀ = φ(A·W), hᵢ = φ(Eᵢ·hᵢ₋₁), and back g = φ(Dᵢ·g) + hₙ₋ᵢ. W is the unchanged base,
whatever other adapters have made of it. The network acts on weights, not on what runs through the layer, so that it can
be merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.kinds import Device, DType, Tensor, Underlying
from loratools.adapter.kinds._onweight import Change, Changing
from loratools.storage.lazy import LazyTensor

A, B = "peanut_A.weight", "peanut_B.weight"
_ENCODERS, _DECODERS = "peanut_encoders.{}.weight", "peanut_decoders.{}.weight"


def _tanh_gelu(x: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.gelu(x, approximate="tanh")


def _named(name: str) -> Callable[[Tensor], Tensor]:
    """Return a function of `torch.nn.functional` by name, without torch until it is called."""

    def function(x: Tensor) -> Tensor:
        from torch.nn import functional

        result: Tensor = getattr(functional, name)(x)
        return result

    return function


_GELU, _SILU = _named("gelu"), _named("silu")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("gelu", "gelu_python"), _GELU),
    **dict.fromkeys(("gelu_fast", "gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), _tanh_gelu),
    "gelu_10": lambda x: _GELU(x).clip(-10, 10),
    "hardswish": _named("hardswish"),
    "laplace": lambda x: 0.5 * (1 + ((x - 0.707107) / (0.282095 * 2**0.5)).erf()),
    "leaky_relu": _named("leaky_relu"),
    "linear": lambda x: x,
    "mish": _named("mish"),
    "prelu": lambda x: x.clamp(min=0) + 0.25 * x.clamp(max=0),
    "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu": lambda x: x.relu(),
    "relu2": lambda x: x.relu().square(),
    "relu6": _named("relu6"),
    "sigmoid": lambda x: x.sigmoid(),
    **dict.fromkeys(("silu", "swish"), _SILU),
    "sqrtsoftplus": lambda x: _named("softplus")(x).sqrt(),
    "tanh": lambda x: x.tanh(),
}
"""Those that transformers has under these names; all but xIELU, whose numbers are trained and not in the file."""


@dataclass(frozen=True, slots=True, eq=False)
class PeanutUpdate(Changing):
    """The matrices of the network. Raises `ValueError` where they do not go together."""

    kind = "peanut"
    together = 0
    of_base = True

    def check(self) -> None:
        """Raise `ValueError` for matrices that do not go together, or are of another weight."""
        shapes = {name: lazy.shape for name, lazy in self.tensors.items()}
        a, b = shapes[A], shapes[B]
        inner = {shape for name, shape in shapes.items() if name not in (A, B)}
        expected = {A, B} | {name.format(i) for i in range(self.depth) for name in (_ENCODERS, _DECODERS)}
        if len(a) != 2 or b != a[::-1] or not inner <= {(a[0], a[0])} or shapes.keys() != expected:
            raise ValueError(f"PEANuT's matrices do not go together: {shapes}")
        Changing.check(self)

    @property
    def depth(self) -> int:
        """Number of encoders, which is that of decoders."""
        return (len(self.tensors) - 2) // 2

    @property
    def rank(self) -> int:
        return self.tensors[A].shape[0]

    @property
    def own_shape(self) -> tuple[int, ...]:
        return self.tensors[B].shape[0], 0

    def change(self, dtype: DType, device: Device) -> Change:
        """Return W + s·B·f(A·W)."""
        import torch

        activate, depth = ACTIVATIONS[self.layout["activation"]], self.depth
        a = self.number(A).to(device)
        encoders, decoders = (
            [self.number(name.format(i)).to(device) for i in range(depth)] for name in (_ENCODERS, _DECODERS)
        )
        b = (self.scaling * self.number(B)).to(device, dtype)

        def change(W: Tensor, rows: slice) -> Tensor:
            hidden = [activate(a @ W.double())]
            for encoder in encoders:
                hidden.append(activate(encoder @ hidden[-1]))
            result = hidden.pop()
            for decoder in decoders:
                result = activate(decoder @ result) + hidden.pop()
            return torch.addmm(W, b, result.to(dtype))

        return change

    def outputs(self, X: Tensor, under: Underlying) -> Tensor:
        """Return X·Wᵀ + s·(X·f(A·W)ᵀ)·Bᵀ, with A·W of unit probes, and one pair of matrices inside the other."""
        import torch

        activate = ACTIVATIONS[self.layout["activation"]]
        start = activate(under.below(torch.eye(X.shape[1], dtype=X.dtype)) @ self.number(A).to(X).T)
        pairs = [
            (self.number(_ENCODERS.format(i)).to(X), self.number(_DECODERS.format(self.depth - 1 - i)).to(X))
            for i in range(self.depth)
        ]

        def network(h: Tensor, depth: int) -> Tensor:
            if depth == self.depth:
                return h
            inside = network(activate(h @ pairs[depth][0].T), depth + 1)
            return activate(inside @ pairs[depth][1].T) + h

        return under.below(X) + self.scaling * (X @ network(start, 0)) @ self.number(B).to(X).T


def claims(parts: Mapping[str, LazyTensor]) -> bool:
    """Tell whether these are the matrices of such a network."""
    return {A, B} <= parts.keys() and all(name.startswith("peanut_") for name in parts)


def build(
    parts: Mapping[str, LazyTensor], scaling: float, alpha: float, layout: Mapping[str, Any] | None = None
) -> PeanutUpdate:
    """Return the update; raise `ValueError` where nothing says the function, or one that is not known."""
    name = (layout or {}).get("activation")
    if name not in ACTIVATIONS:
        raise ValueError(f"its function is {name!r}, known are {', '.join(ACTIVATIONS)}")
    return PeanutUpdate(dict(parts), scaling, alpha, {"activation": name})
