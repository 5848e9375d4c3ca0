"""What a merge will do, decided from headers alone: pure, printable, and a value that serializes to JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratools.adapter.model import Adapter
from loratools.adapter.names import normalized
from loratools.adapter.resolve import Placement, resolve
from loratools.adapter.tied import apply_policy
from loratools.adapter.whole import check_vocabulary, follow, resolve_replacements
from loratools.errors import IncompatibleAdapter, WrongBase
from loratools.storage import digest, dtypes
from loratools.storage.checkpoint import Checkpoint, Shard
from loratools.storage.header import TensorSpec
from loratools.storage.writer import DEFAULT_SHARD, FilePlan, plan_file, plan_shards
from loratools.surgery.replacing import replaced, usual_dtype
from loratools.surgery.tiles import TILE

_Tensor = tuple[str, str, tuple[int, ...]]
# Resident bytes of a process that has imported torch (a CPU build), and of one that has not; measured.
_TORCH, _NUMPY = 260_000_000, 50_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What becomes of one output tensor: `source` bytes, of the base or of an adapter that replaces it, plus updates.

    `placements` pairs the number of an adapter with a placement of one of its updates. `expected` are the digests
    that adapters recorded for the base tensor, each with the number of its adapter.
    """

    source: TensorSpec
    placements: tuple[tuple[int, Placement], ...] = ()
    replaced: bool = False
    expected: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class MergePlan:
    """All decisions of a merge. `files` lists the output's files of tensors, `changes` has every output tensor.

    `adapters` are as placed (tied heads renamed); `config` holds changed fields of config.json; `laid_out` says
    whether files, headers and offsets are the base's own, so that untouched ranges are copied where they lie. `strict`
    makes a tensor that is not the recorded one an error, else it is reported.
    """

    base: Checkpoint
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    files: tuple[FilePlan, ...]
    changes: Mapping[str, Change]
    config: Mapping[str, Any] = field(default_factory=dict)
    laid_out: bool = True
    strict: bool = True
    notes: tuple[str, ...] = ()

    def touched(self) -> dict[str, Change]:
        """Return the tensors whose numbers change."""
        return {name: change for name, change in self.changes.items() if change.placements or change.replaced}

    def rewritten(self) -> dict[str, Change]:
        """Return the tensors that pass through arithmetic: updated, or cast to another dtype."""
        changes = ((slot, self.changes[slot.name]) for plan in self.files for slot in plan.slots)
        return {slot.name: change for slot, change in changes if change.placements or slot.dtype != change.source.dtype}

    def peak_memory(self, threads: int, *, torch: bool = True, tile_bytes: int = TILE) -> int:
        """Estimate the resident bytes: libraries, and for each thread its tiles and its largest factors."""
        largest = 0
        for change in self.changes.values():
            parts = {id(lazy): lazy for _, p in change.placements for lazy in p.update.parts.values()}
            largest = max(largest, sum(lazy.parameters * 8 + lazy.nbytes for lazy in parts.values()))
        return (_TORCH if torch else _NUMPY) + threads * (6 * tile_bytes + largest)

    def to_json(self, threads: int, *, torch: bool = True) -> dict[str, Any]:
        """Return the plan as plain data: sizes in bytes, names, no machine-dependent number but the estimate."""
        touched, rewritten = self.touched(), self.rewritten()
        total = sum(slot.nbytes for plan in self.files for slot in plan.slots)
        worked = sum(slot.nbytes for plan in self.files for slot in plan.slots if slot.name in rewritten)
        return {
            "base": str(self.base.path),
            "files": [{"name": plan.name, "bytes": plan.size, "tensors": len(plan.slots)} for plan in self.files],
            "tensors": {"total": len(self.changes), "changed": len(touched), "cast": len(rewritten) - len(touched)},
            "bytes": {"written": total, "changed": worked, "copied": total - worked},
            "peak_memory": self.peak_memory(threads, torch=torch),
            "verified_tensors": sum(bool(change.expected) for change in self.changes.values()),
            "changed": {
                name: [
                    {"adapter": i, "module": p.module, "kind": p.update.kind, "rank": p.update.rank}
                    | {"scaling": p.update.scaling, "weight": self.weights[i]}
                    for i, p in change.placements
                ]
                for name, change in touched.items()
            },
            "config": dict(self.config),
            "notes": list(self.notes),
        }


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    tied: str = "error",
    check_base: str = "strict",
    configs: Sequence[Mapping[str, Any] | None] = (),
) -> MergePlan:
    """Decide everything about a merge of `adapters`, times their `weights`, into `base`.

    The adapters are settled (`surgery/replacing.py`); `configs` are their own config.json, where they brought one.

    Raises `IncompatibleAdapter` for modules without a place, shapes that do not fit, quantized targets, and tied
    embeddings without a policy; `WrongBase` when an adapter's recorded schema or tensor list contradicts the base.
    """
    untied = apply_policy(tuple(adapters), base.specs, base.config, tied)
    specs = {**base.specs, **{new: base.specs[old] for new, old in untied.copies.items()}}
    shapes = {name: spec.shape for name, spec in specs.items()}
    whole = replaced(untied.adapters, weights, shapes)
    usual = usual_dtype(base.specs)
    outputs = {name: (specs[name].dtype if name in specs else usual) for name in {**specs, **whole}}
    sources = {**specs, **whole}
    check_vocabulary(shapes, {name: spec.shape for name, spec in whole.items()})
    placements = _placed(untied.adapters, {name: spec.shape for name, spec in sources.items()}, base)
    _check_targets({name: specs[name] for name in {**placements, **whole} if name in specs})
    expected, notes = _expected(adapters, specs, placements, base, check_base)
    changes = {
        name: Change(
            source,
            tuple(placements.get(name, ())),
            name in whole,
            () if name in whole else tuple(expected.get(name, ())),
        )
        for name, source in sources.items()
    }
    if base.components and max_shard_size is not None:
        raise IncompatibleAdapter("a pipeline keeps the files of its components; --max-shard-size does not apply to it")
    kept = max_shard_size is None and not any(shard.path.suffix != ".safetensors" for shard in base.shards)
    config = {**base.config, **untied.config}
    for i, adapter in enumerate(untied.adapters):
        found = {name: lazy.shape for name, lazy in resolve_replacements(adapter, shapes).items()}
        fields, said = follow(config, shapes, found, adapter, configs[i] if configs else None)
        config |= fields
        notes += [f"adapter {i + 1}: {one}" for one in said]
    if dtype:
        config |= {key: dtypes.CONFIG_NAMES[dtype] for key in ("torch_dtype", "dtype") if key in base.config}
    own = (base.stored or base).config
    config = {key: value for key, value in config.items() if key not in own or own[key] != value}
    added = [name for name in sources if name not in base.specs]
    notes += [f"added to the model: {', '.join(sorted(added))}"] if added else []
    notes += _order(placements, len(adapters))
    planned = [(name, _cast(outputs[name], dtype), sources[name].shape) for name in sources]
    if kept:
        files = [_same_layout(base, shard, added, {one[0]: one for one in planned}) for shard in base.shards]
    else:
        metadata = {"format": "pt"} | dict(base.shards[0].metadata)
        files = plan_shards(planned, max_shard_size or DEFAULT_SHARD, metadata)
    return MergePlan(
        base, untied.adapters, tuple(weights), tuple(files), changes, config, kept, check_base == "strict", tuple(notes)
    )


def _placed(
    adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, ...]], base: Checkpoint
) -> dict[str, list[tuple[int, Placement]]]:
    """Return the placements on each tensor, with the adapters' numbers; an error says which adapters do not fit."""
    found: dict[str, list[tuple[int, Placement]]] = {}
    misfits: dict[str, IncompatibleAdapter] = {}
    for i, adapter in enumerate(adapters):
        try:
            for placement in resolve(adapter, shapes, base.config):
                found.setdefault(placement.site.tensor, []).append((i, placement))
        except IncompatibleAdapter as error:
            misfits[f"adapter {i + 1}: " if len(adapters) > 1 else ""] = error
    if misfits:
        raise IncompatibleAdapter(
            f"{base.path}: " + "; ".join(f"{who}{error.message}" for who, error in misfits.items()),
            [f"{who}{problem}" for who, error in misfits.items() for problem in error.problems],
            hint="Was it trained on this base model? `loratools inspect --modules` shows the names of both.",
        )
    return found


def _order(placements: Mapping[str, Sequence[tuple[int, Placement]]], count: int) -> list[str]:
    """Say where the order of the adapters means something: where several change a tensor, and not all only add."""
    tensors = [
        name
        for name, here in placements.items()
        if len({i for i, _ in here}) > 1 and not all(placement.update.additive for _, placement in here)
    ]
    order = ", then ".join(str(i + 1) for i in range(count))
    return [f"the order matters for {len(tensors)} tensor(s), and is as given: adapter {order}"] if tensors else []


def _check_targets(specs: Mapping[str, TensorSpec]) -> None:
    problems = [
        f"{name}: stored as {spec.dtype} with shape {spec.shape}"
        for name, spec in specs.items()
        if spec.dtype not in dtypes.FLOATS
    ]
    if problems:
        raise IncompatibleAdapter(
            f"{len(problems)} target tensor(s) of the base are quantized, and adding to their codes would be wrong",
            problems,
            hint="Merge into the unquantized base, then quantize again.",
        )


def _same_layout(base: Checkpoint, shard: Shard, added: list[str], planned: Mapping[str, _Tensor]) -> FilePlan:
    """Keep a shard's file name, order and, where nothing forces another, its header byte for byte."""
    name = str(shard.path.relative_to(base.root))
    tensors = [planned[tensor] for tensor in list(shard.tensors) + (added if shard is base.shards[-1] else [])]
    if base.origins or tensors != [(tensor, spec.dtype, spec.shape) for tensor, spec in shard.tensors.items()]:
        return plan_file(name, tensors, shard.metadata, prefix=shard.prefix)
    begin = min((spec.start for spec in shard.tensors.values()), default=0)
    with shard.path.open("rb") as file:
        header = file.read(begin)
    return plan_file(name, tensors, header=header)


def _cast(stored: str, wanted: str | None) -> str:
    return wanted if wanted and stored in dtypes.FLOATS else stored


def _expected(
    adapters: Sequence[Adapter],
    specs: Mapping[str, TensorSpec],
    placements: Mapping[str, list[tuple[int, Placement]]],
    base: Checkpoint,
    check_base: str,
) -> tuple[dict[str, list[tuple[int, str]]], list[str]]:
    """Collect the digests that adapters recorded for the tensors they touch."""
    expected: dict[str, list[tuple[int, str]]] = {}
    notes: list[str] = []
    problems: list[str] = []
    for i, adapter in enumerate(adapters):
        identity = adapter.base
        if check_base == "off":
            notes.append(f"adapter {i + 1}: base model not checked (--check-base off)")
            continue
        if identity is None or not identity.sealed:
            notes.append(f"adapter {i + 1}: carries no base hash, so the base model cannot be checked")
            continue
        if not identity.tensors:
            if identity.schema is None:
                notes.append(f"adapter {i + 1}: has a root hash only; compare it with `loratools hash`")
                continue
            algorithm = digest.algorithm_of(identity.schema)
            if base.schema(algorithm) != identity.schema:
                problems.append(
                    f"adapter {i + 1}: names, dtypes or shapes of the base differ from those it was sealed with"
                )
            continue
        known = {normalized(name): value for name, value in identity.tensors.items()} | dict(identity.tensors)
        for name in sorted(name for name, here in placements.items() if any(j == i for j, _ in here)):
            if value := known.get(base.origin(name)) or known.get(normalized(base.origin(name))):
                expected.setdefault(name, []).append((i, value))
            elif name in base.specs:
                problems.append(f"adapter {i + 1}: changes {name}, which its recorded base does not list")
    if problems and check_base == "strict":
        raise WrongBase(
            f"{base.path} is not the base model that was recorded",
            problems,
            hint="Use the right base, or --check-base warn if you know better.",
        )
    return expected, notes + problems
