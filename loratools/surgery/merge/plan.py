"""What a merge will do, decided from headers alone: pure, printable, and a value that serializes to JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratools.adapter.model import Adapter
from loratools.adapter.placement.resolve import Placement, resolve
from loratools.adapter.placement.settle import replaced, usual_dtype
from loratools.adapter.placement.tied import apply_policy
from loratools.adapter.placement.whole import check_vocabulary, follow, resolve_replacements
from loratools.engine.plan import Change, MergePlan
from loratools.errors import IncompatibleAdapter
from loratools.storage import dtypes
from loratools.storage.checkpoint import Checkpoint, Shard
from loratools.storage.header import TensorSpec
from loratools.storage.layout import DEFAULT_SHARD, FilePlan, plan_file, plan_shards
from loratools.surgery.base import _expected
from loratools.surgery.merge.options import MergeOptions

_Tensor = tuple[str, str, tuple[int, ...]]


def plan_merge(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    options: MergeOptions,
    *,
    configs: Sequence[Mapping[str, Any] | None] = (),
) -> MergePlan:
    """Decide everything about a merge of `adapters`, times their `weights`, into `base`.

    The adapters are settled (`surgery/merge/accounts.py`); `configs` are their own config.json, where they brought one.

    Raises `IncompatibleAdapter` for modules without a place, shapes that do not fit, quantized targets, and tied
    embeddings without a policy; `WrongBase` when an adapter's recorded schema or tensor list contradicts the base.
    """
    untied = apply_policy(tuple(adapters), base.specs, base.config, options.tied)
    specs = {**base.specs, **{new: base.specs[old] for new, old in untied.copies.items()}}
    shapes = {name: spec.shape for name, spec in specs.items()}
    whole = replaced(untied.adapters, weights, shapes)
    usual = usual_dtype(base.specs)
    outputs = {name: (specs[name].dtype if name in specs else usual) for name in {**specs, **whole}}
    sources = {**specs, **whole}
    check_vocabulary(shapes, {name: spec.shape for name, spec in whole.items()})
    placements = _placed(untied.adapters, {name: spec.shape for name, spec in sources.items()}, base)
    _check_targets({name: specs[name] for name in {**placements, **whole} if name in specs})
    expected, notes = _expected(adapters, specs, placements, base, options.check_base)
    changes = {
        name: Change(
            source,
            tuple(placements.get(name, ())),
            name in whole,
            () if name in whole else tuple(expected.get(name, ())),
        )
        for name, source in sources.items()
    }
    dtype, max_shard_size = options.output_dtype, options.shard_bytes
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
    strict = options.check_base == "strict"
    return MergePlan(base, untied.adapters, tuple(weights), tuple(files), changes, config, kept, strict, tuple(notes))


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
