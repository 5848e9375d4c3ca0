"""Decide a merge, which reads headers and digests and writes nothing: `merge`, `switch` and `unmerge` begin with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loratools.adapter.input import AdapterInput
from loratools.adapter.model import BaseIdentity
from loratools.adapter.placement.gguf import is_gguf, under_adapters_names
from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.settle import Equals, settle
from loratools.adapter.placement.shared import EMBEDDINGS, main_tensor
from loratools.adapter.placement.whole import resolve_replacements
from loratools.decisions import warned
from loratools.engine.device import check as check_device
from loratools.engine.device import described
from loratools.engine.plan import MergePlan
from loratools.engine.run import Settings, in_torch
from loratools.errors import IncompatibleAdapter
from loratools.format.record import BROUGHT, CARRIED, DEVICE, REPLACED, of_merge, refuse_second_merge
from loratools.parallel import cores
from loratools.storage import atomic
from loratools.storage.beside import making, vocabulary
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import logical
from loratools.storage.companions import Companions, companions, own_config
from loratools.storage.sources import Location, local
from loratools.surgery.folding import in_basis_of
from loratools.surgery.inputs import (
    AdapterSource,
    ModelSource,
    Weights,
    check_weights,
    open_adapters,
    open_model,
    places,
    places_of,
    under_names_of,
)  # fmt: skip
from loratools.surgery.merge import single
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.merge.quantized import warn_of_folded


@dataclass(frozen=True, slots=True)
class Account:
    """What became of the tensors of one adapter; `tensors` is the sum of the other three.

    `applied` are parts of updates, `replaced` took the place of a tensor or were added, `passed_over` are copies of the
    base's own tensors, and a tied head's copy of the embedding.
    """

    tensors: int
    applied: int
    replaced: int
    passed_over: int


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """A merge that is decided but not run: the inputs, the plan, and what the output will record of itself."""

    plan: MergePlan
    output: Path
    beside: Companions
    record: dict[str, Any]
    options: MergeOptions
    accounts: tuple[Account, ...]

    @property
    def threads(self) -> int:
        """Threads to work with, where the options leave it open one per core, at most 8."""
        return self.options.threads or min(8, cores())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, with the free space where the output goes."""
        on = Settings(self.threads, self.options.computes_on)
        return self.plan.to_json(self.threads, torch=bool(in_torch(self.plan, on))) | {
            "output": atomic.spelled(self.output),
            "other_files": len(self.beside.sources.keys() | self.beside.texts),
            "left_behind": list(self.beside.left),
            "free_disk": atomic.free_space(self.output),
            "threads": self.threads,
            "consumed": [asdict(account) for account in self.accounts],
        }


def prepare(
    base: ModelSource,
    adapters: AdapterSource | Sequence[AdapterSource],
    output: Location,
    *,
    weights: Weights = None,
    options: MergeOptions = MergeOptions(),  # noqa: B008  (frozen)
) -> Merge:
    """Decide everything about a merge from headers and the adapters' digests; write nothing.

    `base`, `adapters`, `output` and `weights` are those of `merge`; `options` holds its other arguments.

    Raises `IncompatibleAdapter`, `WrongBase`, `BadFile`, `UnsupportedAdapter`, `InvalidOption` for weights that are not
    one for each adapter, `NoDevice`, `OutputRefused` where the output exists, is an input, or the base already holds
    this adapter.
    """
    output = Path(output)
    check_weights(adapters, weights)
    check_device(options.computes_on)
    atomic.check_output(output, force=options.force)
    base = logical(open_model(base))
    if options.model_type:
        base = replace(base, config={**base.config, "model_type": options.model_type})
    inputs = open_adapters(adapters, base, weights)
    others = [] if options.original is None else [local(options.original, "checkpoint")]
    atomic.refuse_inputs(output, [*places_of(base), *places(inputs), *others])
    refuse_second_merge(base, [each.digest for each in inputs])
    basis = in_basis_of(base, inputs, options.original, options.trained_on, options.check_base)
    refuse_second_merge(base, [each.digest for each in basis.inputs])
    built_on = None if basis.is_folded and options.quantized != "requantize" else basis.original
    prepared = decide(base, basis.inputs, output, options, original=built_on, told=basis.told)
    for entry, before in zip(prepared.record["adapters"], basis.carried_from, strict=False):
        entry |= {CARRIED: before} if before else {}
    return replace(prepared, plan=replace(prepared.plan, notes=(*basis.notes, *prepared.plan.notes)))


def decide(
    base: Checkpoint, inputs: Sequence[AdapterInput], output: Path, options: MergeOptions, *,
    taken: Sequence[AdapterInput] = (), below: BaseIdentity | None = None,
    elsewhere: Mapping[str, Equals] | None = None, original: Checkpoint | None = None, told: bool = False,
) -> Merge:  # fmt: skip
    """Decide what becomes of every tensor of `base` and of `inputs`, which are as they were opened.

    Everything that is refused, said and recorded of a merge besides its numbers has its place here. Where `base` is a
    merged model, `taken` are adapters that it holds: their changes are subtracted, and in the plan they come after the
    `inputs`. `below` is what was recorded of the model below, and `elsewhere` compares copies with tensors of it that
    `base` does not hold (`adapter/placement/settle.py`). `original` is what a quantized base is built anew on,
    `told` says that the basis of the adapters is known. Raises what `prepare` raises.
    """
    base = replicated(base, [each.adapter for each in inputs])
    base = under_adapters_names(base, [each.adapter for each in (*inputs, *taken)])
    named, strict = under_names_of(base, inputs), options.check_base == "strict"
    settled, decided = settle(base, named, strict=strict, elsewhere=elsewhere)
    outgoing = [replace(each, weight=-each.weight) for each in under_names_of(base, taken)]
    configs = [*(own_config(each.path) for each in inputs), *(None for _ in taken)]
    name = output.name if single.is_single(output, base) else None
    if name:
        single.refuse_what_needs_a_folder(options)
    plan = plan_merge(
        base, (*settled, *outgoing), options, configs=configs, taken=len(taken), recorded=below, original=original,
        single=name,
    )  # fmt: skip
    plan = replace(plan, notes=(*plan.notes, *decided))
    if not told:
        warn_of_folded(base, plan.touched())
    record = of_merge(base, inputs, plan.turned()[: len(inputs)])
    shapes = {name: change.source.shape for name, change in plan.changes.items()}
    for entry, each in zip(record["adapters"], plan.adapters, strict=False):
        entry |= {REPLACED: sorted(own)} if (own := resolve_replacements(each, shapes, base.config)) else {}
    record |= {"dtype": options.output_dtype, "tied": options.tied if options.tied != "error" else None}
    paths = [each.path for each in inputs]
    beside = single.left_behind(base, paths) if plan.single else companions(base, paths)
    record |= {"model_type": options.model_type} if options.model_type else {}
    record |= {BROUGHT: list(beside.brought)} if beside.brought else {}
    record |= {DEVICE: on} if (on := described(options.computes_on)) else {}
    record |= making.field()
    if is_gguf(base):
        from loratools.surgery.merge.gguf import refuse_what_needs_a_folder, with_record

        refuse_what_needs_a_folder(options)
        plan = with_record(plan, record)
    if plan.single:
        plan = single.with_room(plan, record, [each.words for each in taken])
        plan = replace(plan, notes=(*plan.notes, *single.restated(plan)))
    _check_vocabulary(plan, beside)
    return Merge(plan, output, beside, record, options, tuple(_accounts(plan, (*inputs, *taken))))


def _check_vocabulary(plan: MergePlan, beside: Companions) -> None:
    """Warn of a tokenizer with more tokens than the merged embedding has rows: their ids would lead out of it."""
    shapes = {name: change.source.shape for name, change in plan.changes.items()}
    embedding, count = main_tensor(shapes, EMBEDDINGS), vocabulary.tokens(beside.sources)
    if embedding and count > shapes[embedding][0]:
        warned(
            "the tokenizer has %d tokens, and %s has %d rows: ids from %d on are beyond the model",
            count, embedding, shapes[embedding][0], shapes[embedding][0],
        )  # fmt: skip


def _accounts(plan: MergePlan, inputs: Sequence[AdapterInput]) -> list[Account]:
    """Return what became of every tensor of the adapters, which are as they were opened, with copies and all.

    Raises `IncompatibleAdapter` if a part of an update has no place in the plan: nothing is dropped in silence.
    """

    def paths(module: str, parts: Iterable[str]) -> set[str]:
        return {f"{module.replace('.base_layer', '')}.{part}" for part in parts}

    placed: list[set[str]] = [set() for _ in inputs]
    for i, placement in (pair for change in plan.changes.values() for pair in change.placements):
        update = placement.update
        placed[i] |= paths(placement.module, update.parts.keys() - ({"lora_B.bias"} if update.bias is not None else ()))
    every, problems = [], []
    for i, (each, merged) in enumerate(zip(inputs, plan.adapters, strict=True)):
        parts = set().union(*(paths(module, update.parts) for module, update in merged.updates.items()))
        problems += [f"adapter {i + 1}: {path}" for path in sorted(parts - placed[i])]
        total = len(each.adapter.tensors()) + len(each.adapter.copies)
        applied = sum(len(update.parts) for update in each.adapter.updates.values())
        every.append(Account(total, applied, len(merged.replacements), total - applied - len(merged.replacements)))
    if problems:
        raise IncompatibleAdapter("tensors of the adapter have no place in the plan of the merge", problems)
    return every
