"""What a merge will do, decided from headers alone: pure, printable, and a value that serializes to JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from loratools.adapter.input import AdapterInput
from loratools.adapter.model import BaseIdentity
from loratools.adapter.placement.codes import HINT
from loratools.adapter.placement.gguf import is_gguf, resolve_on
from loratools.adapter.placement.resolve import Placement
from loratools.adapter.placement.settle import replaced, usual_dtype
from loratools.adapter.placement.tied import apply_policy
from loratools.adapter.placement.whole import Shapes, check_vocabulary, follow, resolve_replacements
from loratools.engine.plan import Change, MergePlan
from loratools.errors import IncompatibleAdapter, counted
from loratools.storage import dtypes
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.logical import encodings
from loratools.storage.codecs import schemes
from loratools.storage.header import TensorSpec
from loratools.storage.layout import DEFAULT_SHARD, FilePlan, plan_file, plan_shards
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.quantized import as_written
from loratools.surgery.merge.sealed import sealed
from loratools.surgery.merge.single import metadata_of, still_true

_Configs = Sequence[Mapping[str, Any] | None]
_Placements = Mapping[str, Sequence[tuple[int, Placement]]]


def plan_merge(
    base: Checkpoint, inputs: Sequence[AdapterInput], options: MergeOptions, *, configs: _Configs = (),
    taken: int = 0, recorded: BaseIdentity | None = None, original: Checkpoint | None = None, single: str | None = None,
) -> MergePlan:  # fmt: skip
    """Decide everything about a merge of adapters into `base`.

    The adapters have the base's names and no copies of its tensors (`adapter/placement/settle.py`); `configs` are
    their own config.json, where they brought one. Where `base` is a merged model, the last `taken` inputs are those
    that it holds and that are taken out of it; `recorded` is what their merge recorded of the model below, with which
    the other inputs are compared. `original` is what a quantized base was made from. `single` is the name of the one
    file that is written, None for a folder.

    Raises `IncompatibleAdapter` for modules without a place, shapes that do not fit, quantized targets, and tied
    embeddings without a policy; `WrongBase` when an adapter's recorded schema or tensor list contradicts the base.
    """
    untied = apply_policy(tuple(each.adapter for each in inputs), base.specs, base.config, options.tied)
    inputs = tuple(replace(each, adapter=adapter) for each, adapter in zip(inputs, untied.adapters, strict=True))
    specs = {**base.specs, **{new: base.specs[old] for new, old in untied.copies.items()}}
    shapes = {name: spec.shape for name, spec in specs.items()}
    whole = replaced(inputs, shapes, base.config)
    check_vocabulary(shapes, {name: spec.shape for name, spec in whole.items()})
    placements = _placements(inputs, shapes | {name: spec.shape for name, spec in whole.items()}, base)
    touched = {**placements, **whole}.keys() | untied.copies.values()
    written = as_written(base, touched, options.quantized, original, options.output_dtype)
    base = written.base
    specs = {**base.specs, **{new: base.specs[old] for new, old in untied.copies.items()}}
    sources = {**specs, **whole}
    targets = [(name, specs[name]) for name in {**placements, **whole} if name in specs]
    codes = schemes.find(base.specs, base.config)
    if coded := [(name, spec) for name, spec in targets if spec.dtype not in dtypes.FLOATS or name in codes.tensors]:
        raise IncompatibleAdapter(
            f"{base.path}: quantized, and adding to codes would be wrong: {counted(len(coded), 'target tensor')}",
            [f"{name}: {codes.of_tensor(name)}, stored as {spec.dtype} {spec.shape}" for name, spec in coded],
            hint=HINT,
        )
    below = _below(base, placements, len(inputs) - taken, recorded or BaseIdentity()) if taken else None
    of_new = inputs[: len(inputs) - taken]
    seal = sealed(of_new, placements, base, options.check_base, below)
    changes = {
        name: Change(source, tuple(placements.get(name, ())), True)
        if name in whole
        else Change(
            source,
            tuple(placements.get(name, ())),
            expected=seal.numbers.get(name, ()),
            stored=seal.parts.get(name, ()),
        )
        for name, source in sources.items()
    }
    added = [name for name in sources if name not in base.specs]
    stated = {**untied.config, **written.config}
    config, followed = _config(base, inputs, stated, shapes, options.output_dtype, configs)
    notes = [*seal.notes, *written.notes, *followed]
    notes += [f"added to the model: {', '.join(sorted(added))}"] if added else []
    notes += _order(placements, len(inputs))
    if options.output_dtype and codes.tensors:
        named = codes.named() if codes.modules else "a calibration"
        tensors = counted(len(codes.tensors), "tensor")
        notes.append(f"no dtype changes in {tensors} of the quantization ({named})")
    parts = written.parts
    specs |= parts
    sources = {name: spec for name, spec in sources.items() if name not in written.recoded} | parts
    if is_gguf(base):
        from loratools.surgery.merge.gguf import plan_gguf

        new = whole | {name: sources[name] for name in added}
        files: tuple[FilePlan, ...] = (plan_gguf(base, new, written.recoded, options.output_dtype),)
        laid_out = True
    else:
        kept_dtypes = codes.tensors | parts.keys()
        files, laid_out = _files(written.layout, specs, sources, added, kept_dtypes, options, single)
    for name, recoded in written.recoded.items():
        source = changes[name].source if changes[name].replaced else recoded.original or changes[name].source
        kept = (options.keep_loss or 0) * (len(recoded.encoding.shape) == 2)
        changes[name] = replace(changes[name], recoded=replace(recoded, loss_rank=kept), source=source)
        for part, spec in recoded.parts.items():
            changes.setdefault(part, Change(spec, part_of=name))
    strict = options.check_base == "strict"
    metadata = metadata_of(written.layout.shards) if single else None
    return MergePlan(
        base, inputs, files, changes, config, written.dropped, laid_out, strict, metadata, tuple(notes)
    )  # fmt: skip


def _files(
    base: Checkpoint, specs: Mapping[str, TensorSpec], sources: Mapping[str, TensorSpec], added: list[str],
    kept: Set[str], options: MergeOptions, single: str | None,
) -> tuple[tuple[FilePlan, ...], bool]:  # fmt: skip
    """Lay out the output's files of tensors; tell whether they are the base's own. Those `kept` keep their dtype."""
    if base.components and options.shard_bytes is not None:
        raise IncompatibleAdapter("a pipeline keeps the files of its components; --max-shard-size does not apply to it")
    planned = {}
    for name, source in sources.items():
        stored = specs[name].plain_dtype if name in specs else usual_dtype(base.specs)
        cast = options.output_dtype if stored in dtypes.FLOATS and name not in kept else None
        planned[name] = (name, cast or stored, source.shape)
    if single:
        ordered = [planned[name] for name in [*(name for shard in base.shards for name in shard.tensors), *added]]
        return (plan_file(single, ordered, metadata_of(base.shards)),), False
    grows = options.quantized == "dequantize" and bool(encodings(base)) and base.path.is_dir() and not base.components
    as_base = not grows and all(shard.path.suffix == ".safetensors" for shard in base.shards)
    if options.shard_bytes is not None or not as_base:
        metadata = {"format": "pt"} | still_true(base.shards[0].metadata)
        return tuple(plan_shards(list(planned.values()), options.shard_bytes or DEFAULT_SHARD, metadata)), False
    files = []
    for shard in base.shards:  # names and order stay, and where nothing forces another the header, byte for byte
        name = shard.path.relative_to(base.root).as_posix()
        tensors = [planned[tensor] for tensor in [*shard.tensors, *(added if shard is base.shards[-1] else ())]]
        metadata = still_true(shard.metadata)
        same = tensors == shard.layout and any(shard is own for own in (base.stored or base).shards)
        header = shard.header() if same and metadata == shard.metadata else None
        files.append(plan_file(name, tensors, metadata, header=header, prefix=shard.prefix))
    return tuple(files), True


def _config(
    base: Checkpoint, inputs: Sequence[AdapterInput], untied: Mapping[str, Any], shapes: Shapes, dtype: str | None,
    configs: _Configs,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Return the fields of config.json that change, and notes: what an untied head, new tensors and a dtype ask for."""
    config, notes = {**base.config, **untied}, []
    for i, each in enumerate(inputs):
        replaced = resolve_replacements(each.adapter, shapes, base.config)
        whole = {name: tensor.shape for name, tensor in replaced.items()}
        fields, sentences = follow(config, shapes, whole, each.adapter, configs[i] if configs else None)
        config |= fields
        notes += [f"adapter {i + 1}: {sentence}" for sentence in sentences]
    if dtype:
        config |= {key: dtypes.CONFIG_NAMES[dtype] for key in ("torch_dtype", "dtype") if key in base.config}
    own = (base.stored or base).config
    return {key: value for key, value in config.items() if key not in own or own[key] != value}, notes


def _placements(inputs: Sequence[AdapterInput], shapes: Shapes, base: Checkpoint) -> _Placements:
    """Return the placements on each tensor, with the adapters' numbers; an error says which adapters do not fit."""
    placements: dict[str, list[tuple[int, Placement]]] = {}
    misfits: dict[str, IncompatibleAdapter] = {}
    for i, each in enumerate(inputs):
        try:
            for placement in resolve_on(base, each.adapter, shapes):
                placements.setdefault(placement.site.tensor, []).append((i, placement))
        except IncompatibleAdapter as error:
            misfits[f"adapter {i + 1}: " if len(inputs) > 1 else ""] = error
    if misfits:
        raise IncompatibleAdapter(
            f"{base.path}: " + "; ".join(f"{which}{error.message}" for which, error in misfits.items()),
            [f"{which}{problem}" for which, error in misfits.items() for problem in error.problems],
            hint="Was it trained on this base model? `loratools inspect --modules` shows the names of both.",
        )
    return placements


def _below(base: Checkpoint, placements: _Placements, new: int, recorded: BaseIdentity) -> BaseIdentity:
    """Return what is known of the model below a merged one, with "" for tensors that are no longer its own.

    `new` counts the inputs that are not in the merged model. Where no schema was recorded, it is the merged model's.
    """
    changed = {base.origin(name) for name, on_it in placements.items() if any(i >= new for i, _ in on_it)}
    of_all = recorded.schema or base.schema()
    return BaseIdentity(schema=of_all, tensors=dict.fromkeys(changed, "") | dict(recorded.tensors))


def _order(placements: _Placements, count: int) -> list[str]:
    """Say where the order of the adapters means something: where several change a tensor, and not all only add."""
    ordered = sum(
        len({i for i, _ in on_it}) > 1 and not all(placement.update.additive for _, placement in on_it)
        for on_it in placements.values()
    )
    order = ", then ".join(str(i + 1) for i in range(count))
    return [f"the order matters for {counted(ordered, 'tensor')}, and is as given: adapter {order}"] if ordered else []
