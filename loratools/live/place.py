"""From an adapter to the modules of a running model: what goes where is decided here, before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.placement.image import for_base
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.whole import resolve_replacements
from loratools.errors import IncompatibleAdapter, UnsupportedAdapter
from loratools.live.below.meta import device_of, refuse_uninitialized
from loratools.live.below.silent import Silent
from loratools.live.modules import type_of
from loratools.live.site import Piece, Span
from loratools.live.whole import Changed, Replacement, Stack, TokenRows, Whole

_CONFIG = ("model_type", "num_attention_heads", "n_head", "num_key_value_heads", "hidden_size")


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A model as an adapter sees it: `owners` name -> (module's path, module, parameter), `shapes` by the same names.

    Names are those of the live parameters, tied ones under each of their names. A layer whose weight is stored as codes
    has the shape that it computes with.
    """

    owners: Mapping[str, tuple[str, nn.Module, str]]
    shapes: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Look at every module of a model, without those that hold adapters."""
        owners, shapes, lazy = {}, {}, []
        for path, module in walk(model):
            dot = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if isinstance(parameter, UninitializedParameter):
                        lazy.append(dot + name)
                        continue
                    owners[dot + name] = path, module, name
                    shapes[dot + name] = tuple(parameter.shape)
            if hasattr(module, "in_features") and (known := _known(module)) and known.shape(module):
                owners.setdefault(f"{dot}weight", (path, module, "weight"))
                shapes[f"{dot}weight"] = known.shape(module)
        refuse_uninitialized(lazy)
        config = getattr(model, "config", None)
        fields: Mapping[str, Any] = config if isinstance(config, Mapping) else vars(config) if config else {}
        stated = {key: value for key in _CONFIG if (value := fields.get(key, getattr(config, key, None))) is not None}
        return cls(owners, shapes, stated)

    def first_names(self) -> dict[str, str]:
        """Return name -> the first name of the same parameter: files store tied tensors once."""
        first: dict[int, str] = {}
        return {
            name: first.setdefault(id(owner._parameters.get(own, owner)), name)
            for name, (_, owner, own) in self.owners.items()
        }


def walk(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with its path, without those that hold adapters; a shared one under each of its paths."""
    yield path, model
    for name, child in model._modules.items():
        if child is not None and not isinstance(child, Silent):
            yield from walk(child, f"{path}.{name}" if path else name)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return what a model calls its output embeddings; None where it does not say."""
    ask = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = ask() if callable(ask) else None
    return head


def _known(module: nn.Module) -> Any:
    try:
        return type_of(module)
    except IncompatibleAdapter:
        return None


@dataclass(slots=True, eq=False)
class Place:
    """What one adapter brings to one module: pieces, and by parameter what takes its place."""

    module: nn.Module
    pieces: list[Piece] = field(default_factory=list)
    whole: dict[str, Whole] = field(default_factory=dict)


def place(layout: Layout, adapter: Adapter, *, trainable: bool, dropout: float = 0.0) -> dict[str, Place]:
    """Return by the path of a module what an adapter, whose tensors are in memory, brings to it.

    Trainable factors become parameters in float32, or float64 where they are; others are buffers in the dtype of the
    weight they change. Raises `IncompatibleAdapter` with all that does not fit, `UnsupportedAdapter` for kinds that
    cannot be trained here.
    """
    if not all(f"{module}.weight" in layout.shapes for module in adapter.updates) and not any(
        update.members for update in adapter.updates.values()
    ):
        names = Names(layout.shapes, layout.config)
        if not all(names.find(module) for module in adapter.updates):
            adapter = for_base(adapter, layout.shapes)
    whole = resolve_replacements(adapter, layout.shapes, layout.config)
    shapes = {**layout.shapes, **{name: tensor.shape for name, tensor in whole.items()}}
    placements = resolve(adapter, shapes, layout.config) if adapter.updates else []
    placements += _on_other_names(placements, adapter, layout)
    builder = _Builder(layout, adapter, trainable, dropout)
    by_update: dict[tuple[str, str], list[Placement]] = defaultdict(list)
    for placement in placements:
        if not (placement.bias and adapter.updates[placement.module].roles):  # a piece adds its bias itself
            by_update[placement.module, placement.site.tensor].append(placement)
    for (module, tensor), together in by_update.items():
        builder.update(module, tensor, together)
    for name, lazy in whole.items():
        builder.replacement(name, lazy.load())
    builder.check()
    return builder.places


def _on_other_names(placements: Sequence[Placement], adapter: Adapter, layout: Layout) -> list[Placement]:
    """Return the same changes of what else is the same weight: PEFT gives a tied head the rows of tokens, too.

    Not where another tensor, rows of its own, or a changed weight takes the place of the other name. Factors do not:
    they are added to the rows, as in PEFT.
    """
    rows = [placement for placement in placements if placement.update.replaced_rows]
    first = layout.first_names() if rows else {}
    changed = {placement.site.tensor for placement in placements if not placement.update.roles}
    changed |= set(adapter.replacements)
    seats = {layout.owners[placement.site.tensor][1:] for placement in rows}
    return [
        replace(placement, site=replace(placement.site, tensor=name))
        for placement in rows
        for name, of in first.items()
        if of == first[placement.site.tensor] and name not in changed and layout.owners[name][1:] not in seats
    ]


class _Builder:
    """Makes the pieces of one adapter, and gathers what is wrong."""

    def __init__(self, layout: Layout, adapter: Adapter, trainable: bool, dropout: float) -> None:
        self.layout, self.adapter, self.trainable, self.dropout = layout, adapter, trainable, dropout
        self.places: dict[str, Place] = {}
        self.problems: list[str] = []
        self.untrainable: list[str] = []
        self.shared: dict[str, dict[str, Tensor]] = {}  # tensors of an update that lands on several modules
        self.rows: dict[str, Whole] = {}  # rows of tokens by module, for each name of a tied weight
        self.values: dict[str, dict[str, Tensor]] = {}  # and what they are, where they are on the meta device

    def update(self, module: str, tensor: str, together: list[Placement]) -> None:
        """Put one update on one tensor, by its factors where the module's type can, else by the changed weight."""
        path, owner, parameter = self.layout.owners[tensor]
        if why := bypassed(self.layout, path):
            self.problems.append(f"{module}: {why}")
            return
        try:
            known = type_of(owner) if parameter == "weight" else None
        except IncompatibleAdapter as error:
            self.problems.append(f"{module}: {error}")
            return
        update = self.adapter.updates[module]
        place = self.places.setdefault(path, Place(owner))
        if known and update.roles and not update.members:
            place.pieces.append(self._piece(module, update, together, owner))
        elif update.replaced_rows and parameter in owner._parameters:
            if module not in self.rows:
                self.rows[module] = self._rows(module, update, together, owner)
            place.whole[parameter] = self.rows[module]
        elif self.trainable and update.members:
            A, B = self._tensors(module, update, owner, dict(zip("AB", update.parts, strict=True))).values()
            turned = together[0].site.transposed
            place.whole[parameter] = Stack(module, update, A, B, turned)  # type: ignore[arg-type]
            place.whole[parameter].values = self.values.get(module)
        elif self.trainable:
            self.untrainable.append(f"{module}: kind {update.kind}")
        elif parameter in owner._parameters and owner._parameters[parameter].is_floating_point():  # type: ignore
            place.whole[parameter] = Changed(module, together)
        else:
            self.problems.append(f"{module}: kind {update.kind} changes a weight that is stored as codes")

    def _piece(self, module: str, update: Update, together: list[Placement], owner: nn.Module) -> Piece:
        sites = [placement.site for placement in together]
        spans: tuple[Span, ...] | None = tuple((site.part_rows, slice(*site.outputs)) for site in sites)
        rows = update.shape[0]
        out = sites[0].matrix[1] if sites[0].transposed else sites[0].matrix[0]
        if len(sites) == 1 and sites[0].part == (0, rows) and sites[0].outputs == (0, out, 1):
            spans = None
        tensors = self._tensors(module, update, owner, update.roles)
        piece = Piece(module, update, tensors, spans, self.dropout)
        piece.values = self.values.get(module)
        return piece

    def _rows(self, module: str, update: Update, together: list[Placement], owner: nn.Module) -> Whole:
        if not self.trainable:
            return Changed(module, together)
        (values,) = self._tensors(module, update, owner, {"rows": next(iter(update.parts))}).values()
        whole = TokenRows(module, update, values)  # type: ignore[arg-type]
        if module in self.values:
            whole.values = {"delta": self.values[module]["rows"], "indices": torch.tensor(update.replaced_rows)}
        return whole

    def _tensors(self, module: str, update: Update, owner: nn.Module, roles: Mapping[str, str]) -> dict[str, Tensor]:
        """Load the tensors of an update by role, as parameters or as buffers; one that lands twice shares them."""
        if module in self.shared:
            return self.shared[module]
        weight, device = next((p for p in owner._parameters.values() if p is not None), None), device_of(owner)
        tensors: dict[str, Tensor] = {}
        parts = update.parts
        for role, part in roles.items():
            loaded = parts[part].load()
            if device.type == "meta":
                self.values.setdefault(module, {})[role] = loaded
            tensor = loaded.to(device)
            if self.trainable:
                wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
                tensors[role] = nn.Parameter(tensor.to(wide, copy=True))
            else:
                usual = weight is not None and weight.is_floating_point()
                tensors[role] = tensor.to(weight.dtype) if usual and role in "AB" else tensor  # type: ignore[union-attr]
        self.shared[module] = tensors
        return tensors

    def replacement(self, name: str, tensor: Tensor) -> None:
        """Let a tensor take the place of a parameter, which must be there."""
        if name not in self.layout.owners:
            self.problems.append(f"{name}: trained whole, and this model has no such parameter")
            return
        path, owner, parameter = self.layout.owners[name]
        if why := bypassed(self.layout, path):
            self.problems.append(f"{name}: {why}")
            return
        old = owner._parameters[parameter]
        assert old is not None
        device = device_of(owner)
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        held = tensor.to(device, wide if self.trainable else old.dtype, copy=self.trainable)
        whole = Replacement(name, nn.Parameter(held) if self.trainable else held)
        whole.values = {"tensor": tensor} if device.type == "meta" else None
        self.places.setdefault(path, Place(owner)).whole[parameter] = whole

    def check(self) -> None:
        """Raise for all that was found wrong."""
        if self.problems:
            raise IncompatibleAdapter("the adapter cannot act in this running model", self.problems)
        if self.untrainable:
            raise UnsupportedAdapter(
                "these updates act on a running model, and cannot be trained in it", self.untrainable,
                hint="Load it with trainable=False.",
            )  # fmt: skip


def bypassed(layout: Layout, path: str) -> str | None:
    """Return why what is put on a module would never run: its parent reads its weight and does not call it; or None."""
    parent, _, last = path.rpartition(".")
    if last == "out_proj":
        above = next((owner for p, owner, _ in layout.owners.values() if p == parent), None)
        if isinstance(above, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads the weight of its out_proj itself and never calls it; merge instead"
    return None
