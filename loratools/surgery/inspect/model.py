"""What a model is, from the headers of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loratools.adapter.naming.compact import natural
from loratools.storage.sources import Location
from loratools.surgery.inspect.amounts import Amount, TensorSummary, amount_of, by_dtype, sizes_of, summary_of, total_of

if TYPE_CHECKING:
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.quantization import Quantization


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """What a model's files are; `schema` is the first tier of its base hash, `shards` maps file to what is in it.

    `architecture`, `model_type` and `quantization` are what its config.json says, or the fields and types of a GGUF
    file, or `modelspec.architecture` in the header of a safetensors file, None where these are silent; `tied` is too,
    or what its class does by default. Of a diffusers pipeline `architecture` is the class in its model_index.json, and
    `classes` maps each component to that in its own config.json; that of a component by itself stands under "".
    `parent` is the model that a GGUF file says it was made from. `record` is what loratools.json says of the merge that
    it came out of. `codes` says how a quantized model is, module by module; None for any other. `entries` are those of
    its files' headers.
    """

    path: str
    architecture: str | None
    model_type: str | None
    tied: bool | None
    quantization: str | None
    components: tuple[str, ...]
    total: Amount
    dtypes: Mapping[str, Amount]
    shards: Mapping[str, Amount]
    schema: str
    record: Mapping[str, Any] | None
    tensors: tuple[TensorSummary, ...] = field(repr=False)
    codes: Quantization | None = None
    type: str = "checkpoint"
    parent: str | None = None
    entries: Mapping[str, str] = field(default_factory=dict, repr=False)
    classes: Mapping[str, str] = field(default_factory=dict)


def describe_checkpoint(checkpoint: Checkpoint, path: Location) -> CheckpointSummary:
    """Summarize an open checkpoint; `path` is where it is said to lie."""
    from loratools.format.record import read  # an adapter need not wait for these imports
    from loratools.surgery.quantization import gguf_codes, quantization, stated_codes

    checkpoint.tell_unread()
    config, specs = checkpoint.config, checkpoint.specs
    model_type = config.get("model_type")
    record = read(checkpoint) or None
    entries = {key: text for shard in checkpoint.shards for key, text in shard.metadata.items()}
    dtypes = by_dtype(sizes_of(specs.values()))
    tied, in_gguf = _tied(checkpoint), config.get("gguf") or {}
    return CheckpointSummary(
        path=str(path), components=checkpoint.components, schema=checkpoint.schema(), record=record,
        architecture=_class_of(_pipeline(checkpoint) or config)
        or in_gguf.get("architecture", entries.get("modelspec.architecture")),
        model_type=model_type if isinstance(model_type, str) else None,
        tied=tied, quantization=stated_codes(config) or gguf_codes(specs), parent=in_gguf.get("parent"),
        total=total_of(dtypes.values()), dtypes=dtypes,
        shards={
            shard.path.relative_to(checkpoint.root).as_posix(): amount_of(shard.tensors.values())
            for shard in checkpoint.shards
        },
        tensors=tuple(summary_of(name, specs[name]) for name in sorted(specs, key=natural)),
        codes=quantization(checkpoint, record), entries=entries,
        classes={name: found for name, each in _parts(checkpoint).items() if (found := _class_of(each))},
    )  # fmt: skip


def _pipeline(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the model_index.json of a diffusers pipeline, {} for any other model."""
    from loratools.storage.checkpoint import PIPELINE
    from loratools.storage.strict_json import read_json

    return read_json(checkpoint.root / PIPELINE) if checkpoint.components else {}


def _parts(checkpoint: Checkpoint) -> Mapping[str, Mapping[str, Any]]:
    """Return the configs of what diffusers loads, by component: those of a pipeline, or that of one by itself."""
    return checkpoint.configs or ({"": checkpoint.config} if "_class_name" in checkpoint.config else {})


def _class_of(config: Mapping[str, Any]) -> str | None:
    """Return the class that a config states: `architectures` is transformers' word, `_class_name` diffusers'."""
    names = config.get("architectures")
    stated = names[0] if isinstance(names, list) and names else config.get("_class_name")
    return None if stated in (None, "") else str(stated)


def _tied(checkpoint: Checkpoint) -> bool | None:
    """Tell whether head and embedding are one weight: by config.json, or by the class where it is silent."""
    from loratools.adapter.placement.shared import flag_of, ties_of

    if (stated := flag_of(checkpoint.config)) is not None:
        return stated
    ties = ties_of(checkpoint.specs, checkpoint.config)
    of_head = [tie for tie in ties.ties if tie.has_head]
    if ties.model is None or any(tie.asked for tie in of_head):
        return None
    return True if of_head else False if ties.head else None


def listed(summary: CheckpointSummary, patterns: tuple[tuple[str, ...], tuple[str, ...]]) -> CheckpointSummary:
    """Return the summary with the tensors that patterns keep."""
    from loratools.surgery.inputs import kept_names

    names = kept_names([tensor.name for tensor in summary.tensors], patterns)
    return replace(summary, tensors=tuple(tensor for tensor in summary.tensors if tensor.name in names))
