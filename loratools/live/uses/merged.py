"""Merge adapters into the weights of a running model, and take them out again, bit for bit.

W' is computed in float32 and rounded once. What the rounding destroyed is kept as the engine's residual does, W coded
by its place beside the prediction W' − ΔW; where that would be larger than W, or nothing predicts W, a copy is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loratools.adapter.kinds._bias import BiasUpdate
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.site import Site as Rectangle
from loratools.engine.residual import ELEMENTS, codes
from loratools.engine.residual import predict as undo
from loratools.errors import IncompatibleAdapter, LoraToolsError
from loratools.live.export import update_of
from loratools.live.site import Handle, Piece
from loratools.live.whole import Changed, changed
from loratools.parallel import cores, workers
from loratools.storage import dtypes
from loratools.storage.codecs.floats import widen

Weighted = Sequence[tuple[Placement, float]]


@dataclass(slots=True, eq=False)
class Kept:
    """How one parameter comes back: `old`, it or a copy; or `blocks`, which code it beside the merged one."""

    module: nn.Module
    parameter: str
    old: nn.Parameter | Tensor | None = None
    blocks: list[bytes] | None = None
    steps: Sequence[undo.Step] = ()
    dtype: torch.dtype | None = None
    version: int | None = None  # autograd's count of the merged parameter's changes; None where nobody knows

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """Pickle and copy without the version: a copied parameter counts from 0."""
        return None, {name: getattr(self, name) for name in self.__slots__} | {"version": None}

    def remember(self) -> None:
        """Remember the merged parameter as it is now."""
        W = self.module._parameters[self.parameter]
        assert W is not None
        self.dtype, self.version = W.dtype, None if W.is_inference() else W._version

    def is_as_merged(self) -> bool:
        """Tell whether the merged parameter is there still, and nothing has changed it, as far as autograd counts."""
        W = self.module._parameters.get(self.parameter)
        if W is None or W.dtype != self.dtype:
            return False
        return self.version is None or W.is_inference() or W._version == self.version

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        if self.blocks is not None:
            return sum(map(len, self.blocks))
        return 0 if self.old is None else self.old.numel() * self.old.element_size()


@dataclass(slots=True, eq=False)
class Merge:
    """What a merge changed: its adapters with their weights, how each parameter comes back, what acted before."""

    name: str
    before: Any
    pairs: tuple[tuple[str, float], ...] = ()
    kept: list[Kept] = field(default_factory=list)

    def forward(self, site: Any, *args: Any, **settings: Any) -> Any:
        """Compute a module from its merged weights; raise in training, which would reach no factor."""
        if site.training and torch.is_grad_enabled() and any(e.trainable for e in site._lora.entries.values()):
            raise IncompatibleAdapter(f"{self.name} is merged into the weights: unmerge it before training")
        return site.plain_forward(*args, **settings)


@torch.no_grad()
def merge(lora: Handle, pairs: tuple[tuple[str, float], ...]) -> Merge:
    """Change the weights of a model by adapters, each with a weight; nothing is changed where something fails."""
    state = Merge(" and ".join(name for name, _ in pairs), lora.active, pairs)
    tied = _tied(lora.model)
    plans = [
        (module, own, *_change(lora, path, module, own, pairs))
        for path, module in lora.sites.items()
        for own in _parameters(module, pairs)
    ]
    made = []
    with workers(cores()) as pool:
        jobs = [pool.submit(_merged, module, own, after, steps) for module, own, after, steps in plans]
        made = [job.result() for job in jobs]
    for kept, after in made:
        W = kept.module._parameters[kept.parameter]
        if W is None or W.shape != after.shape or id(W) in tied:
            # Another module has the same tensor, or it has another shape: it gets a parameter of its own.
            kept.old, kept.blocks = W, None
            kept.module._parameters[kept.parameter] = nn.Parameter(after, requires_grad=False)
        else:
            W.copy_(after)
        kept.remember()
        state.kept.append(kept)
    return state


@torch.no_grad()
def unmerge(lora: Handle, state: Merge) -> None:
    """Give every parameter its bits back; raise `LoraToolsError`, and do nothing, where one is not as it was merged."""
    paths = {id(module): path for path, module in lora.sites.items()}
    lost = [f"{paths.get(id(kept.module))}.{kept.parameter}" for kept in state.kept if not kept.is_as_merged()]
    if lost:
        raise LoraToolsError(
            f"weights were changed while {state.name} was merged into them, so what they were cannot be told any more",
            lost,
            hint="Unmerge before you load, cast, train, prune or parametrize weights; make the model anew now.",
        )  # fmt: skip
    for kept in state.kept:
        W = kept.module._parameters[kept.parameter]
        if isinstance(kept.old, nn.Parameter) or (kept.old is None and kept.blocks is None):
            kept.module._parameters[kept.parameter] = kept.old
        elif kept.blocks is None:
            W.copy_(kept.old)  # type: ignore[union-attr,arg-type]
        else:
            W.copy_(_decoded(W, kept).to(W.device))  # type: ignore[union-attr,arg-type]


def _parameters(module: Any, pairs: tuple[tuple[str, float], ...]) -> list[str]:
    """Return the parameters of a site that these adapters change."""
    names: dict[str, None] = {}
    for name, _ in pairs:
        for piece in module.lora.pieces.get(name, ()):
            names["weight"] = None
            names |= {"bias": None} if piece.bias is not None else {}
        names |= dict.fromkeys(module.lora.whole.get(name, {}))
    return list(names)


def _change(
    lora: Handle, path: str, module: Any, own: str, pairs: tuple[tuple[str, float], ...]
) -> tuple[Tensor, Weighted]:
    """Return a parameter's merged value, and the placements that predict the old one from it, () where none do."""
    W = module._parameters.get(own)
    if own not in module._parameters and isinstance(getattr(module, own, None), Tensor):
        raise IncompatibleAdapter(
            f"{path}.{own} is made by a parametrization, into which nothing can be merged",
            hint="Take the parametrization, weight norm or pruning away first, or let the adapter act unmerged.",
        )
    if W is not None and W.is_meta:
        raise IncompatibleAdapter(f"{path}.{own} is on the meta device and has no values, so nothing can be merged")
    value, predicts = W, True
    placed: list[tuple[Placement, float]] = []
    added: list[tuple[Placement, float]] = []  # factors come after all that takes the weight's place, as in a forward
    for name, weight in pairs:
        for piece in module.lora.pieces.get(name, ()):
            added += [(p, weight) for p in placements(module, piece, path, own)]
        whole = module.lora.whole.get(name, {}).get(own)
        if isinstance(whole, Changed):
            placed += [(placement, weight) for placement in whole.placements]
        elif whole is not None:
            value, predicts = whole.value(value, weight), False
    placed += added
    if value is None or (not value.is_floating_point() and placed):
        raise IncompatibleAdapter(f"{path}.{own} is stored as codes, into which nothing can be merged")
    after = changed(value, placed) if placed else value.detach().clone()
    steps = placed if predicts and undo.is_predictable([placement for placement, _ in placed]) else []
    return after, steps


def placements(module: Any, piece: Piece, path: str, own: str) -> list[Placement]:
    """Return where a piece lies on one of a module's parameters, as a merge of files would place it."""
    name, update = f"{path}.{own}", update_of(piece)
    W = module._parameters[own]
    rows, columns = W.shape[0], W.numel() // max(1, W.shape[0])
    if own == "bias":
        if piece.bias is None or update.bias is None:
            return []
        added = BiasUpdate(update.bias, update.scaling, update.alpha)
        spans = piece.spans or ((slice(0, rows), slice(0, rows, 1)),)
        return [
            Placement(
                piece.path, added, Rectangle(name, (rows, 1), (o.start, o.stop, o.step), (0, 1, 1), (r.start, r.stop))
            )
            for r, o in spans
        ]
    if own != "weight":
        return []
    if piece.spans is None:
        return [Placement(piece.path, update, Rectangle.whole(name, (rows, columns), transposed=module.turned))]
    made = []
    for r, o in piece.spans:
        outputs, part = (o.start, o.stop, o.step or 1), (r.start, r.stop)
        all_rows, all_columns = (0, rows, 1), (0, columns, 1)
        down, across = (all_rows, outputs) if module.turned else (outputs, all_columns)
        site = Rectangle(name, (rows, columns), down, across, part, module.turned)
        made.append(Placement(piece.path, update, site))
    return made


def _tied(model: nn.Module) -> set[int]:
    """Return the ids of parameters that a model has under more than one name."""
    seen: set[int] = set()
    twice: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def _merged(module: nn.Module, own: str, after: Tensor, placed: Weighted) -> tuple[Kept, Tensor]:
    """Return how a parameter will come back, by what takes less memory, and the merged one."""
    W = module._parameters[own]
    kept = Kept(module, own)
    if W is None or W.shape != after.shape:
        kept.old = W
        return kept, after
    if placed and W.numel() and W.dtype in _CODED:
        torch.set_num_threads(1)
        kept.steps = undo.steps(placed)
        matrix = placed[0][0].site.matrix
        flat = W.detach().cpu().reshape(matrix)
        rows = lambda start, stop: flat[start:stop].double().numpy()  # noqa: E731
        undo.measure(placed, kept.steps, rows, max(1, ELEMENTS // max(1, matrix[1])))
        blocks, size, dtype = [], 0, dtypes.from_torch(W.dtype)
        limit = W.numel() * W.element_size()
        for start, stop, bits, predicted in _tiles(after, kept.steps, matrix):
            blocks.append(codes.encode(_bits(flat[start:stop]), bits, predicted, dtype, dtype))
            size += len(blocks[-1])
            if size >= limit:
                break
        else:
            kept.blocks = blocks
            return kept, after
    kept.steps, kept.old = (), W.detach().clone()
    return kept, after


_CODED = (torch.bfloat16, torch.float16, torch.float32)


def _tiles(after: Tensor, steps: Sequence[undo.Step], matrix: tuple[int, int]) -> Any:
    """Yield (start, stop, bits of the merged rows, W' − ΔW as numbers) of each tile."""
    flat, dtype = after.detach().cpu().reshape(matrix), dtypes.from_torch(after.dtype)
    height = max(1, ELEMENTS // max(1, matrix[1]))
    for start in range(0, matrix[0], height):
        stop = min(start + height, matrix[0])
        bits = _bits(flat[start:stop])
        P = widen(bits, dtype, np.float32).reshape(-1, matrix[1])
        with np.errstate(all="ignore"):
            for step in reversed(steps):
                step.take_back(P, start)
        yield start, stop, bits, P.reshape(-1)


def _bits(rows: Tensor) -> Any:
    width = {2: torch.int16, 4: torch.int32}[rows.element_size()]
    return rows.contiguous().view(width).numpy().reshape(-1).view(f"<u{rows.element_size()}")


def _decoded(W: Tensor, kept: Kept) -> Tensor:
    matrix, dtype = kept.steps[0].site.matrix, dtypes.from_torch(W.dtype)
    before = np.empty(W.numel(), f"<u{W.element_size()}")
    assert kept.blocks is not None
    tiles = zip(_tiles(W, kept.steps, matrix), kept.blocks, strict=True)
    for (start, stop, bits, predicted), block in tiles:
        columns = matrix[1]
        before[start * columns : stop * columns] = codes.decode(memoryview(block), bits, predicted, dtype, dtype)
    width = {2: torch.int16, 4: torch.int32}[W.element_size()]
    return torch.from_numpy(before.view(f"<i{W.element_size()}")).view(width).view(W.dtype).reshape(W.shape)
