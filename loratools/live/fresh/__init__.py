"""A new adapter to be trained: its options as one value, and its first factors on the modules of a model.

targets   which modules are meant
start     how A and B start
tokens    rows that are trained for single tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.parts import MAGNITUDE
from loratools.errors import IncompatibleAdapter, InvalidOption
from loratools.live.below.meta import device_of
from loratools.live.fresh import start
from loratools.live.fresh.targets import Target
from loratools.live.fresh.tokens import Tokens, problems, stated
from loratools.live.fresh.tokens import places as token_places
from loratools.live.modules import ModuleType, type_of
from loratools.live.modules._slices import spans_of_parts
from loratools.live.place import Layout, Place, walk
from loratools.live.product import row_norms
from loratools.live.site import Piece, Span, slice_of
from loratools.live.whole import Replacement
from loratools.options import Options
from loratools.storage.lazy import LazyTensor

Bias = Literal["none", "all", "lora_only"]
"""Which biases are trained besides: none, all of the model, those of the modules with an adapter."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """The options of `attach`, checked when the value is built; raises `InvalidOption` with all that cannot be."""

    rank: int
    alpha: float
    targets: str | Sequence[str]
    seed: int
    init: start.Init
    dropout: float
    dora: bool
    rslora: bool
    bias: Bias
    dtype: torch.dtype
    tokens: Tokens = None

    def __post_init__(self) -> None:
        options = Options().number("rank", self.rank, least=1).word("init", self.init, start.Init)
        options.real("alpha", self.alpha, lambda value: value > 0, "a number above 0")
        options.real("dropout", self.dropout, lambda value: 0 <= value < 1, "a probability from 0 to below 1")
        options.word("bias", self.bias, Bias).flag("dora", self.dora).flag("rslora", self.rslora)
        options.number("seed", self.seed)
        options.problems += problems(self.tokens)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            options.problems.append(f"dtype is {self.dtype!r}; it is a floating-point dtype of torch")
        if self.dora and self.init in start.OF_WEIGHT:
            options.problems.append(
                f"dora is True and init is {self.init!r}; magnitudes go with init='kaiming' or 'gaussian'"
            )
        options.done()

    @property
    def scaling(self) -> float:
        """The number s that B·A is multiplied with."""
        return start.trained(self.rank, self.alpha, self.rslora)

    def parameters(self) -> dict[str, Any]:
        """Return what the provenance says of the training's start, as JSON values."""
        targets = self.targets if isinstance(self.targets, str) else sorted(self.targets)
        start_of = {"rank": self.rank, "alpha": self.alpha, "targets": targets, "init": self.init}
        more = {"dropout": self.dropout, "dora": self.dora, "rslora": self.rslora, "tokens": stated(self.tokens)}
        start_of |= {name: value for name, value in more.items() if value}
        return start_of | ({"bias": self.bias} if self.bias != "none" else {})


Updates = dict[tuple[Any, ...], Update]
"""What was built for pieces of a kind and of these shapes."""


def places(model: nn.Module, chosen: Sequence[Target], options: Fresh) -> dict[str, Place]:
    """Return by path what a new adapter brings to each module; the model is not touched.

    A module that is reached by two paths gets one piece, or one for each slice that is meant, under the first.
    """
    generator = torch.Generator().manual_seed(options.seed)
    parts = [target.part for target in chosen if target.part]
    layout = Layout.of(model) if parts else Layout({}, {}, {})
    spans = spans_of_parts(parts, options.rank, layout.shapes, layout.config)
    places: dict[str, Place] = {}
    first: dict[int, str] = {}
    updates: Updates = {}
    for target in chosen:
        if first.setdefault(id(target.module), target.path) == target.path:
            place = places.setdefault(target.path, Place(target.module))
            place.pieces.append(_piece(target, spans.get(target.name), options, generator, updates))
    rows = token_places(model, options.tokens, options.dtype)
    if both := [path for path in rows if path in places]:
        raise InvalidOption("these targets have rows of tokens, and cannot have factors besides", both)
    places |= rows
    if options.bias != "none":
        targeted = {target.path: target.module for target in chosen}
        for path, module in walk(model) if options.bias == "all" else targeted.items():
            old = module._parameters.get("bias")
            if old is not None:
                name = f"{path}.bias" if path else "bias"
                if old.is_meta:
                    raise IncompatibleAdapter(
                        f"{name}: is on the meta device and has no values, of which a copy could be trained",
                        hint="Load the weights into the model first, or say bias='none'.",
                    )
                copy = nn.Parameter(old.detach().to(options.dtype, copy=True))
                places.setdefault(path, Place(module)).whole["bias"] = Replacement(name, copy)
    return places


def _piece(
    target: Target, spans: tuple[Span, ...] | None, options: Fresh, generator: torch.Generator, updates: Updates
) -> Piece:
    path, module = target.name, target.module
    known = type_of(module)
    assert known is not None  # `choose` took no other
    device = device_of(module)
    outputs, *inputs = known.sides(module)
    rank, ones = options.rank, [1] * len(inputs[1:])
    W = known.matrix(module)
    if W is None and (options.dora or options.init in start.OF_WEIGHT):
        asks = "dora" if options.dora else f"init={options.init!r}"
        raise IncompatibleAdapter(f"{path}: its weight is stored as codes, and {asks} has to look at it")
    if W is not None and W.is_meta and (options.dora or options.init in start.OF_WEIGHT):
        asks = "dora" if options.dora else f"init={options.init!r}"
        raise IncompatibleAdapter(
            f"{path}: its weight is on the meta device and has no values, and {asks} has to look at them",
            hint="Load the weights into the model first, or start with init='kaiming' or 'gaussian'.",
        )
    if spans is not None:
        outputs = sum(rows.stop - rows.start for rows, _ in spans)
        W = None if W is None else slice_of(W, spans)
    beginning = None
    if options.init in start.RANDOM:
        if known.ZERO == "B":
            A, B = (
                torch.empty(rank, *inputs, dtype=options.dtype),
                torch.zeros(outputs, rank, *ones, dtype=options.dtype),
            )
            start.RANDOM[options.init](A, generator)
        else:
            A, B = (
                torch.zeros(rank, *inputs, dtype=options.dtype),
                torch.empty(outputs, rank, *ones, dtype=options.dtype),
            )
            B.normal_(generator=generator)
    else:
        assert W is not None
        A, B = start.of_weight(W, rank, options.scaling, options.init, options.seed)
        A, B = A.to(options.dtype).reshape(rank, *inputs), B.to(options.dtype).reshape(outputs, rank, *ones)
        beginning = A.to(device, copy=True), B.to(device, copy=True)
    tensors: dict[str, Tensor] = {"A": nn.Parameter(A.to(device)), "B": nn.Parameter(B.to(device))}
    if options.dora:
        assert W is not None
        norms = row_norms(W, B.flatten(1).to(device), A.flatten(1).to(device), options.scaling)
        sides = (1, outputs, *ones) if ones else (outputs,)
        tensors["magnitude"] = nn.Parameter(norms.to(options.dtype).reshape(sides))
    # A piece takes of an update what modules of a type and shape share: there are hundreds of pieces, and few shapes.
    shapes = known, *((role, tensor.shape) for role, tensor in tensors.items())
    if (update := updates.get(shapes)) is None:
        updates[shapes] = update = built(known, tensors, options)
    piece = Piece(path, update, tensors, spans, options.dropout, beginning)
    if device.type == "meta":
        piece.values = {"A": A, "B": B}
    return piece


def built(known: ModuleType, tensors: Mapping[str, Tensor], options: Fresh) -> Update:
    """Return the update that tensors by role are, on a module of a type."""
    names = dict(zip(("A", "B", "magnitude"), (*known.NAMES, MAGNITUDE), strict=True))
    parts = {names[role]: LazyTensor.of(tensor) for role, tensor in tensors.items()}
    kind = kinds.get("dora" if options.dora else known.KIND)
    update: Update = kind.build(parts, options.scaling, float(options.alpha))
    return update
