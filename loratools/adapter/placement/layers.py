"""A base model with its layers repeated, as an adapter's `layer_replication` has it: a view, no tensor is copied."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratools.adapter.model import MOST_LAYERS, Adapter
from loratools.errors import IncompatibleAdapter
from loratools.storage.checkpoint import Checkpoint

SETTING = "layer_replication"
# The lists of layers that PEFT's `replicate_layers` finds: those of Llama, BERT and Falcon, in any wrappers.
_LAYER = r"((?:(?:model|bert|transformer)\.)*(?:layers|encoder\.layer|h))\.(\d+)\.(.+)"
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def replicates(adapters: Sequence[Adapter]) -> bool:
    """Tell whether an adapter is one of a model with replicated layers."""
    return any(adapter.settings.get(SETTING) for adapter in adapters)


def replicated(base: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """Return the base with its layers repeated as the adapters say; the base itself if they say nothing.

    `[[0, 4], [2, 5]]` makes the layers 0, 1, 2, 3, 2, 3, 4 of a model of five, as in PEFT's `replicate_layers`. Each
    tensor is known in `origins` by its name in the files. Raises `IncompatibleAdapter` if adapters disagree, if the
    base has no such layers, or if it is not clear which list of layers is meant.
    """
    ranges = [[tuple(part) for part in adapter.settings.get(SETTING) or ()] for adapter in adapters]
    if not any(ranges):
        return base
    if any(layers != ranges[0] for layers in ranges):
        raise IncompatibleAdapter(
            "these adapters are for models of different layers, and cannot be merged together",
            [f"adapter {i + 1}: {SETTING} {list(map(list, layers)) or 'none'}" for i, layers in enumerate(ranges)],
        )
    layer = re.compile(_LAYER, re.ASCII)
    matches = {name: match for name in base.specs if (match := layer.fullmatch(name))}
    lists = sorted({match[1] for match in matches.values()})
    count = 1 + max((int(match[2]) for match in matches.values()), default=-1)
    highest, wanted = max(stop for _, stop in ranges[0]) - 1, sum(stop - start for start, stop in ranges[0])
    if len(lists) != 1 or highest >= count:
        raise IncompatibleAdapter(
            f"{base.path}: the adapter repeats layers up to {highest} of one list of layers",
            [f"the base has {count} layers in {', '.join(lists)}" if lists else "the base has no list of layers"],
            hint="Use the base that the adapter was trained on.",
        )
    if wanted > MOST_LAYERS:
        raise IncompatibleAdapter(
            f"the adapter is for a model of {wanted} layers; {MOST_LAYERS} is the most there can be"
        )
    order = [layer for start, stop in ranges[0] for layer in range(start, stop)]
    copies: dict[int, list[int]] = {}
    for new, old in enumerate(order):
        copies.setdefault(old, []).append(new)
    origins = {
        name if match is None else f"{match[1]}.{new}.{match[3]}": name
        for name in base.specs
        for match in [matches.get(name)]
        for new in (copies.get(int(match[2]), []) if match else [0])
    }
    shards = [
        replace(shard, tensors={new: base.specs[old] for new, old in origins.items() if old in shard.tensors})
        for shard in base.shards
    ]
    return replace(
        base, shards=tuple(shards), specs={new: base.specs[old] for new, old in origins.items()},
        config=_config(base.config, count, order), origins=origins,
        stored=base.stored or base,
    )  # fmt: skip


def _config(config: Mapping[str, Any], count: int, order: Sequence[int]) -> dict[str, Any]:
    """Return config.json for the new layers: their number, and every list that says something of each of them."""
    changed = {key: len(order) for key in _COUNTS if config.get(key) == count}
    lists = {
        key: [value[layer] for layer in order]
        for key, value in config.items()
        if "layer" in key and isinstance(value, list) and len(value) == count
    }
    return {**config, **changed, **lists}
