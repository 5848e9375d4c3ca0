"""Settle what in an adapter is a copy of the base's own tensors, and what replaces them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from loratools.adapter.input import AdapterInput
from loratools.adapter.kinds import Update
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.placement.shared import Ties, ties_for
from loratools.adapter.placement.whole import resolve_replacements
from loratools.errors import IncompatibleAdapter, WrongBase
from loratools.storage import dtypes, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.adapter.placement.classes import Tie

_Change = TypeVar("_Change")

Equals = Callable[[LazyTensor], bool]
"""Tells whether an adapter's copy of a tensor is the base's."""


def settle(
    base: Checkpoint,
    inputs: Sequence[AdapterInput],
    *,
    strict: bool = True,
    elsewhere: Mapping[str, Equals] | None = None,
) -> tuple[tuple[AdapterInput, ...], list[str]]:
    """Decide by their bytes what the adapters' copies of base tensors are; return the inputs without copies, and notes.

    A copy that equals the base's tensor (after a cast) is passed over. One of another shape was saved after a resize of
    the vocabulary, and takes the base's place, as it does in PEFT. One that only has other numbers raises `WrongBase`,
    or, unless `strict`, takes the base's place too. Changes of a head and of the embedding to which it
    is tied that are the same numbers become one change. `elsewhere` compares with tensors of the base that `base` does
    not hold as they were, for it is a merged model.
    """
    elsewhere = elsewhere or {}
    without_copies, notes, problems = [], [], []
    names, ties = Names(base.specs, base.config), ties_for([each.adapter for each in inputs], base.specs, base.config)
    for i, each in enumerate(inputs):
        replacements = dict(each.adapter.replacements)
        for path, copy in each.adapter.copies.items():
            name = _of_base(names, ties, path)
            if name is not None and base.specs[name].shape == copy.shape:
                if elsewhere[name](copy) if name in elsewhere else equal(copy, base.specs[name]):
                    continue
                problems.append(f"adapter {i + 1}: its copy of {name} is another tensor than the base's")
            replacements[path] = copy
            notes.append(f"adapter {i + 1}: its own {path} takes the place of the base's, as in PEFT")
        replacements |= _same_once(replacements, ties, _same_bytes)
        updates = {**each.adapter.updates, **_same_once(each.adapter.updates, ties, _same_product)}
        adapter = replace(each.adapter, updates=updates, replacements=replacements, copies={})
        without_copies.append(replace(each, adapter=adapter))
    if problems and strict:
        raise WrongBase(
            f"{base.path} is not the base model that was copied into the adapter",
            problems,
            hint="Use the right base, or --check-base warn to let the adapter's copy take its place, as PEFT does.",
        )
    return tuple(without_copies), [*problems, *notes]


def replaced(
    inputs: Sequence[AdapterInput], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None
) -> dict[str, TensorSpec]:
    """Return output tensor -> what takes its place; two adapters cannot replace one tensor, nor half of one do it.

    `shapes` are the base's tensors, `config` its config.json.

    Raises `IncompatibleAdapter` with all that cannot be: also rows for single tokens that two adapters replace.
    """
    replacements: dict[str, TensorSpec] = {}
    rows: dict[tuple[str, int], int] = {}
    problems = []
    for i, each in enumerate(inputs):
        half = f"adapter {i + 1}, which cannot have the weight {each.weight:g}"
        for module, update in each.adapter.updates.items():
            if update.replaced_rows and each.weight != 1:
                problems.append(f"{module}: rows trained whole in {half}")
            taken = [row for row in update.replaced_rows if rows.setdefault((module, row), i) != i]
            problems += [f"{module}: row {row} is replaced by more than one adapter" for row in taken[:3]]
        for name, tensor in resolve_replacements(each.adapter, shapes, config).items():
            if name in replacements:
                problems.append(f"{name}: replaced by more than one adapter")
            elif each.weight != 1:
                problems.append(f"{name}: trained whole in {half}")
            elif tensor.spec is None:
                problems.append(f"{name}: adapter {i + 1} does not store it in the base's layout")
            elif tensor.dtype not in dtypes.FLOATS:
                problems.append(
                    f"{name}: adapter {i + 1} stores it as {tensor.dtype}, which is no floating-point dtype"
                )
            else:
                replacements[name] = tensor.spec
    if problems:
        raise IncompatibleAdapter("these adapters cannot be merged together", problems)
    return replacements


def usual_dtype(specs: Mapping[str, TensorSpec]) -> str:
    """Return the floating-point dtype of most of a model's numbers, which a new head gets too."""
    sizes: Counter[str] = Counter()
    for spec in specs.values():
        if spec.dtype in dtypes.FLOATS:
            sizes[spec.dtype] += spec.parameters
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype), default="F32")


def _same_once(
    changes: Mapping[str, _Change], ties: Ties, same: Callable[[_Change, _Change], bool]
) -> dict[str, _Change]:
    """Return the changes of names of one weight, those that are the same as one."""
    by_tie: dict[Tie, list[_Change]] = {}
    once = {}
    for path, change in changes.items():
        if pair := ties.find(path):
            known = by_tie.setdefault(pair[0], [])
            once[path] = next((other for other in known if same(change, other)), change)
            known.append(once[path])
    return once


def _same_bytes(first: LazyTensor, second: LazyTensor) -> bool:
    return first.spec is not None and second.spec is not None and files.same_bytes(first.spec, second.spec)


def _same_product(first: Update, second: Update) -> bool:
    """Tell whether two updates add one product, as PEFT saves it for an embedding and the head that it keeps tied."""
    one, other = first.factored(), second.factored()
    if one is None or other is None or not (first.additive and second.additive) or first.bias or second.bias:
        return False
    if (one.scale, one.left.shape, one.right.shape) != (other.scale, other.left.shape, other.right.shape):
        return False
    import torch

    return all(torch.equal(*pair) for pair in zip(one.load(), other.load(), strict=True))


def _of_base(names: Names, ties: Ties, path: str) -> str | None:
    """Return the base tensor that a copy should equal; for a name that is not stored, the tensor it is tied to."""
    module, _, parameter = path.rpartition(".")
    tensors = names.find(module, parameter)
    if not tensors and (pair := ties.find(path)):
        return pair[0].stored[0]
    return tensors[0] if len(tensors) == 1 else None


def equal(copy: LazyTensor, spec: TensorSpec) -> bool:
    """Compare a copy with the base's tensor, each cast to the other's dtype: either cast may have been made."""
    if copy.spec is not None and copy.dtype == spec.dtype:
        return files.same_bytes(copy.spec, spec)
    import torch

    copied, own = copy.load(), files.read_tensor(spec)
    return torch.equal(copied.to(own.dtype), own) or torch.equal(own.to(copied.dtype), copied)
