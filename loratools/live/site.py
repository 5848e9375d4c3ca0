"""A module with adapters: its class is swapped for a class over it, and the factors lie in a child that keeps silent.

The swapped class has the name of the old one and derives from it, so `isinstance`, names of parameters, `state_dict`,
strict loading, pickle, deepcopy, FSDP2 and torch.compile stay as they are without us. The child `lora` holds tensors as
parameters and buffers, which move and train with the model, and says nothing in a `state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from loratools.adapter.kinds import Update
from loratools.live.below import checkpoints, classes
from loratools.live.below.meta import device_of
from loratools.live.below.replay import Replay
from loratools.live.below.silent import Silent

BANK = "lora"
"""Name of the child that holds the factors."""

Span = tuple[slice, slice]
"""Rows of ΔW, and the outputs of the module to which they are added."""


class Handle(Protocol):
    """What the parts of the live half ask of a model's handle (`handle.Lora`, which they lie below)."""

    model: nn.Module
    sites: dict[str, Any]
    entries: dict[str, Any]
    active: Any
    replay: Replay
    routes: list[Any]

    def children(self) -> Iterator[tuple[str, Any, str, str]]:
        """Yield (adapter's name, what it has on a module, the module's path, the parameter that it changes)."""
        ...

    def path_of(self, site: Any) -> str:
        """Return the path of a site."""
        ...


class Piece(Silent):
    """The factors of one update on one module, by their role: `A`, `B`, and `magnitude` and `bias` where there are.

    Tensors have the shapes that PEFT gives them. `path` is the module's path in the adapter, `update` tells kind,
    alpha and scaling. `spans` says which rows of ΔW land on which outputs, None where all land on all; `places` is the
    output of each row, where several spans have them all. `A0` and `B0` are the factors that training started from,
    where their product is taken off again (PiSSA, OLoRA).
    """

    path: str
    kind: str
    scaling: float
    alpha: float
    roles: dict[str, str]
    spans: tuple[Span, ...] | None
    dropout: float
    plain: bool  # nothing but A, B and a scale
    gains: tuple[Any, Tensor] | None  # what g of DoRA was, and of which tensors
    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    A0: Tensor | None
    B0: Tensor | None
    places: Tensor | None

    def __init__(
        self, path: str, update: Update, tensors: Mapping[str, Tensor], spans: tuple[Span, ...] | None = None,
        dropout: float = 0.0, start: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        plain = spans is None and start is None and "magnitude" not in tensors and "bias" not in tensors
        # Past nn.Module.__setattr__, which looks at every value: there are hundreds of pieces.
        self.__dict__.update(
            path=path, kind=update.kind, scaling=update.scaling, alpha=update.alpha, roles=dict(update.roles),
            spans=spans, dropout=dropout, plain=plain, gains=None,
        )  # fmt: skip
        for role in ("A", "B", "magnitude", "bias"):
            tensor = tensors.get(role)
            if isinstance(tensor, nn.Parameter):
                self._parameters[role] = tensor
            else:
                self._buffers[role] = tensor
                self._non_persistent_buffers_set.add(role)
        self._buffers["A0"], self._buffers["B0"] = start or (None, None)
        self._buffers["places"] = None if spans is None else _places(spans, tensors["B"])
        self._non_persistent_buffers_set |= {"A0", "B0", "places"}

    def forget(self) -> None:
        """Forget g of DoRA."""
        self.__dict__["gains"] = None

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return int(self.A.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors under PEFT's names of them."""
        return {part: getattr(self, role) for role, part in self.roles.items()}


def _places(spans: tuple[Span, ...], B: Tensor) -> Tensor | None:
    """Return the output of each row of B, where several spans, or one with a step, have all of its rows."""
    ordered = sorted(spans, key=lambda span: span[0].start)
    if (len(spans) == 1 and ordered[0][1].step in (None, 1)) or sum(r.stop - r.start for r, _ in spans) < len(B):
        return None
    outputs = [place for _, at in ordered for place in range(at.start, at.stop, at.step or 1)]
    return torch.tensor(outputs, device=B.device)


class Bank(Silent):
    """All factors on one module: `pieces` by the adapter's name; `whole` has tensors that take a parameter's place."""

    pieces: dict[str, tuple[Piece, ...]]
    whole: dict[str, dict[str, Any]]

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(pieces={}, whole={})  # as Piece does

    def follow(self, device: torch.device) -> None:
        """Give tensors on the meta device their values, where the module's own have come from there."""
        for child in self._modules.values():
            if isinstance(child, Silent) and child.values is not None and device.type != "meta":
                child.to_empty(device=device)

    def _load_from_state_dict(self, *_: Any) -> None:
        """Refuse to resume a training whose checkpoint has the base alone: its factors would start untrained."""
        if not any(parameter.requires_grad for parameter in self.parameters()):
            return
        checkpoints.resumed()

    def state_dict(self, *args: Any, **settings: Any) -> Any:
        """Add nothing; say so where a trainer makes a checkpoint of it and the adapter is trained."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            checkpoints.saved()
        return super().state_dict(*args, **settings)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a copy of a child, as nn.DataParallel puts in its place, is found by its adapter too."""
        before = self.__dict__.get("_modules", {}).get(name)
        super().__setattr__(name, value)
        if before is not None and before is not value:
            new = {id(before): value}
            self.pieces = {own: tuple(new.get(id(p), p) for p in pieces) for own, pieces in self.pieces.items()}
            self.whole = {own: {n: new.get(id(w), w) for n, w in held.items()} for own, held in self.whole.items()}

    def put(self, name: str, piece: nn.Module) -> None:
        """Take in a child of an adapter, under a key that shows its name."""
        number = next(n for n in count(len(self._modules)) if f"{name.replace('.', '_')}_{n}" not in self._modules)
        self._modules[f"{name.replace('.', '_')}_{number}"] = piece

    def shadows(self, site: nn.Module, pairs: Iterable[tuple[str, float]]) -> dict[str, Tensor]:
        """Return what stands for parameters of the site under these adapters, each with its weight, in turn."""
        tensors: dict[str, Tensor] = {}
        for name, weight in pairs:
            for parameter, whole in self.whole.get(name, {}).items():
                before = tensors[parameter] if parameter in tensors else site._parameters.get(parameter)
                tensors[parameter] = whole.value(before, weight)
        return tensors

    def drop(self, name: str) -> None:
        """Give up all that an adapter has here."""
        own = {id(piece) for piece in (*self.pieces.pop(name, ()), *self.whole.pop(name, {}).values())}
        for key in [key for key, child in self._modules.items() if id(child) in own]:
            del self._modules[key]


class Site:
    """What is mixed over the class of a module that has adapters; each type of module has a subclass in `modules/`.

    `changed` computes the module's output with these pieces, each with a weight.
    """

    base: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[Site]]
    turned: ClassVar[bool] = False  # whether the weight is stored (in, out)
    lora: Bank
    _lora: Handle

    if not TYPE_CHECKING:

        def forward(self, *args: Any, **settings: Any) -> Any:
            """Compute the module with the adapters that are in use."""
            active = self._lora.active
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._lora.replay.see(active)
            if active is None:
                return type(self).base.forward(self, *args, **settings)
            return active.forward(self, *args, **settings)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Load as the class does; a weight that is assigned may leave the meta device, and the factors with it."""
        super()._load_from_state_dict(*args)  # type: ignore[misc]
        self.lora.follow(device_of(self))  # type: ignore[arg-type]

    def plain_forward(self, *args: Any, **settings: Any) -> Any:
        """Compute the module as it is without any adapter."""
        return type(self).base.forward(self, *args, **settings)

    def changed(self, pieces: list[tuple[Piece, float]], *args: Any, **settings: Any) -> Any:
        """Compute the module with pieces, each times a weight."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle and copy as an object of the class below, with the mixin to put over it: this class has no module."""
        return classes.blank, (type(self).base, type(self).mixin), self.__getstate__()


def swap(module: Any, mixin: Any, lora: Handle) -> None:
    """Put a mixin over a module's class, and an empty `Bank` into it."""
    module._modules[BANK] = Bank()
    module.__dict__["_lora"] = lora
    classes.over(module, mixin)


def restore(module: Any) -> None:
    """Give a module its own class back, and take what `swap` put there away."""
    classes.under(module, type(module).mixin)
    del module._modules[BANK], module.__dict__["_lora"]


@contextmanager
def shadowed(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Let tensors stand for parameters of a module while the block runs; its parameters stay registered as they are.

    A name in the instance's dictionary is found before a parameter is looked up.
    """
    module.__dict__.update(tensors)
    try:
        yield
    finally:
        for name in tensors:
            module.__dict__.pop(name, None)


def added(y: Tensor, delta: Tensor, spans: tuple[Span, ...] | None) -> Tensor:
    """Return y + delta (…, rows of ΔW), the rows of each span at its outputs; y itself stays as it is."""
    delta = delta.to(y.dtype)
    if spans is None:
        return y + delta
    y = y.clone()
    for rows, outputs in spans:
        y[..., outputs] += delta[..., rows]
    return y


def slice_of(W: Tensor, spans: Iterable[Span]) -> Tensor:
    """Return those rows of a weight W (out, in) on which a ΔW lands, in the order of its own rows."""
    return torch.cat([W[outputs] for _, outputs in sorted(spans, key=lambda span: span[0].start)])


def rows_landing(spans: Iterable[Span], device: torch.device) -> Tensor:
    """Return the numbers of those rows of a ΔW, ascending."""
    return torch.tensor(sorted(row for rows, _ in spans for row in range(rows.start, rows.stop)), device=device)
