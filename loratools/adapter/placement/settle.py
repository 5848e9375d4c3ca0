"""Settle what in an adapter is a copy of the base's own tensors, and what replaces them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.placement.tied import EMBEDDINGS, HEADS, main_tensor
from loratools.adapter.placement.whole import resolve_replacements
from loratools.errors import IncompatibleAdapter, WrongBase
from loratools.storage import dtypes, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    pass


def settle(base: Checkpoint, adapters: Sequence[Adapter], *, strict: bool = True) -> tuple[list[Adapter], list[str]]:
    """Decide what the copies of base tensors are, by their bytes; return the adapters without copies, and notes.

    A copy that equals the base's tensor (after a cast) is passed over. One of another shape was saved after a resize of
    the vocabulary, and takes the base's place, as it does in PEFT. One that only has other numbers raises `WrongBase`,
    or, unless `strict`, takes the base's place too. A head that is replaced by the same bytes as the embedding to which
    it is tied becomes the same tensor.
    """
    settled, notes, problems = [], [], []
    names = Names(base.specs)
    for i, adapter in enumerate(adapters):
        kept = dict(adapter.replacements)
        for path, lazy in adapter.copies.items():
            name = _of_base(names, base, path)
            if name is not None and base.specs[name].shape == lazy.shape:
                if _equal(lazy, base.specs[name]):
                    continue
                problems.append(f"adapter {i + 1}: its copy of {name} is another tensor than the base's")
            kept[path] = lazy
            notes.append(f"adapter {i + 1}: its own {path} takes the place of the base's, as in PEFT")
        heads = {path for path in kept if path.removesuffix(".weight").rpartition(".")[2] in HEADS}
        for head in heads:
            for path in kept.keys() - heads:
                if path.removesuffix(".weight").rpartition(".")[2] in EMBEDDINGS and _same(kept[head], kept[path]):
                    kept[head] = kept[path]
        settled.append(replace(adapter, replacements=kept, copies={}))
    if problems and strict:
        raise WrongBase(
            f"{base.path} is not the base model that was copied into the adapter",
            problems,
            hint="Use the right base, or --check-base warn to let the adapter's copy take its place, as PEFT does.",
        )
    return settled, [*problems, *notes]


def replaced(
    adapters: Sequence[Adapter], weights: Sequence[float], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorSpec]:
    """Return output tensor -> what takes its place; two adapters cannot replace one tensor, nor half of one do it.

    Raises `IncompatibleAdapter` with all that cannot be: also rows for single tokens that two adapters replace.
    """
    found: dict[str, TensorSpec] = {}
    rows: dict[tuple[str, int], int] = {}
    problems = []
    for i, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        for module, update in adapter.updates.items():
            if update.replaced_rows and weight != 1:
                problems.append(
                    f"{module}: rows trained whole in adapter {i + 1}, which cannot have the weight {weight:g}"
                )
            taken = [row for row in update.replaced_rows if rows.setdefault((module, row), i) != i]
            problems += [f"{module}: row {row} is replaced by more than one adapter" for row in taken[:3]]
        for name, lazy in resolve_replacements(adapter, shapes).items():
            if name in found:
                problems.append(f"{name}: replaced by more than one adapter")
            elif weight != 1:
                problems.append(f"{name}: trained whole in adapter {i + 1}, which cannot have the weight {weight:g}")
            elif lazy.spec is None:
                problems.append(f"{name}: adapter {i + 1} does not store it in the base's layout")
            elif lazy.dtype not in dtypes.FLOATS:
                problems.append(f"{name}: adapter {i + 1} stores it as {lazy.dtype}, which is no floating-point dtype")
            else:
                found[name] = lazy.spec
    if problems:
        raise IncompatibleAdapter("these adapters cannot be merged together", problems)
    return found


def usual_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """Return the floating-point dtype of most of a model's numbers, which a new head gets too."""
    sizes: dict[str, int] = {}
    for spec in specs.values():
        if spec.dtype in dtypes.FLOATS:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.parameters
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype), default="F32")


def _of_base(names: Names, base: Checkpoint, path: str) -> str | None:
    """Return the base tensor that a copy should equal; for a tied head that is not stored, the embedding."""
    module, _, parameter = path.rpartition(".")
    tensors = names.find(module, parameter)
    if not tensors and module.rpartition(".")[2] in HEADS:
        return main_tensor(base.specs, EMBEDDINGS)
    return tensors[0] if len(tensors) == 1 else None


def _equal(lazy: LazyTensor, spec: TensorSpec) -> bool:
    """Compare a copy with the base's tensor, each cast to the other's dtype: either cast may have been made."""
    if lazy.spec is not None and lazy.dtype == spec.dtype:
        return all(bytes(a) == bytes(b) for a, b in zip(files.chunks(lazy.spec), files.chunks(spec), strict=True))
    import torch

    copy, own = lazy.load(), files.read_tensor(spec)
    return torch.equal(copy.to(own.dtype), own) or torch.equal(own.to(copy.dtype), copy)


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.spec is None or other.spec is None:
        return False
    return all(bytes(a) == bytes(b) for a, b in zip(files.chunks(one.spec), files.chunks(other.spec), strict=True))
