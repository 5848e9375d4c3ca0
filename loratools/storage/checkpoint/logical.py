"""A model with its quantized weights shown as weights: float32 that is decoded when it is read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from loratools.errors import BadFile, UnsupportedAdapter, counted
from loratools.storage import codecs, dtypes
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.shard import Shard
from loratools.storage.codecs import schemes
from loratools.storage.codecs.state import HEADER, statement, with_plain
from loratools.storage.header import TensorSpec

if TYPE_CHECKING:
    from loratools.storage.codecs import Encoding
    from loratools.storage.codecs.schemes import Codes

_OF_CACHE = frozenset({"k_scale", "v_scale", "k_zero_point", "v_zero_point"})
"""Parts that belong to the cache of keys and values, which may be quantized beside plain weights."""


def logical(model: Checkpoint, only: Collection[str] | None = None) -> Checkpoint:
    """Return the model with the weights of its quantized modules in the place of their stored parts.

    Each is one tensor, `….weight` or the name of the stack, of the shape that its module has, and float32; what is
    stored is the view's `stored`. `only` shows those of these names, and leaves the others as they are stored. A module
    of a scheme that no codec reads stays as it is stored; a model without codes is returned as it is.

    What a calibration of activations left goes with the last of the codes.

    Raises `UnsupportedAdapter` where a codec knows the scheme, and the module is stored in a way that it does not read.
    """
    if model.stored is not None and model.origins:
        raise ValueError("a view of repeated layers is made of a logical one, not the other way round")
    stored = model.stored or model
    found = schemes.find(stored.specs, stored.config)
    if not found.modules:
        return model
    _refuse_damaged(stored.path, stored.config, found)
    shown: dict[str, TensorSpec] = {}  # stored name of the part at whose place the weight stands -> the weight
    weights: dict[str, str] = {}
    told = {shard.prefix + name: text for shard in stored.shards for name, text in shard.metadata.items()}
    gone: set[str] = set()
    computed: dict[str, str] = {}
    for path, names in found.parts.items():
        name = found.codecs[path]
        if name is None:
            continue
        specs = {part: stored.specs[tensor] for part, tensor in names.items()}
        component = path.partition(".")[0] if stored.configs else ""
        config = stored.configs.get(component, stored.config)
        if component not in computed:
            computed[component] = _dtype(stored, component)
        stated, kind = statement(config), str(config.get("model_type") or "")
        module = codecs.Module(path, found.modules[path], names, specs, stated, computed[component], kind, told)
        encoding = codecs.get(name).opened(module)
        if only is not None and encoding.name not in only:
            continue
        place = names.get("weight", next(iter(names.values())))
        shown[place], weights[place] = codecs.encoded(encoding), encoding.name
        gone |= {tensor for part, tensor in names.items() if only is None or part not in _OF_CACHE}
    if not shown:
        return stored
    if only is None and None not in found.codecs.values():
        gone |= found.calibration

    def view(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        kept = {name: spec for name, spec in tensors.items() if name not in gone or name in shown}
        return {weights.get(name, name): shown.get(name, spec) for name, spec in kept.items()}

    def shown_in(shard: Shard) -> Shard:
        metadata = with_plain(shard.metadata, [name.removeprefix(shard.prefix) for name in weights.values()])
        if gone.isdisjoint(shard.tensors) and metadata is shard.metadata:
            return shard
        return replace(shard, tensors=view(shard.tensors), metadata=metadata)

    shards = tuple(map(shown_in, stored.shards))
    return replace(stored, shards=shards, specs=view(stored.specs), stored=stored)


def _refuse_damaged(path: Path, config: Mapping[str, Any], found: Codes) -> None:
    """Raise `UnsupportedAdapter` where a module lacks parts, `BadFile` for a statement that is no object.

    A module lacks parts where others of the model have all of its own, are read, and have more.
    """
    if config.get(key := "quantization_config") and not isinstance(config[key], Mapping):
        raise BadFile(f"{path}: config.json's {key} is {str(config[key])[:80]!r}, and an object was expected")
    whole = {frozenset(found.parts[module]): module for module, codec in found.codecs.items() if codec}
    damaged = []
    for module in (module for module, codec in found.codecs.items() if codec is None):
        parts = found.parts[module].keys()
        if len(parts) > 1 and (like := next((each for each in whole if parts < each), None)):
            missing, named = ", ".join(sorted(like - parts)), ", ".join(sorted(parts))
            damaged.append(f"{module} ({found.modules[whole[like]]}): {missing} is missing beside {named}")
    if damaged:
        raise UnsupportedAdapter(
            f"{path}: tensors are missing in {counted(len(damaged), 'quantized module')}", sorted(damaged)[:20],
            hint="The model is not whole: fetch it again.",
        )  # fmt: skip


def encodings(model: Checkpoint) -> dict[str, Encoding]:
    """Return how the weights of a logical view are stored, by name; {} for any other model."""
    return {name: cast("Encoding", spec.encoding) for name, spec in model.specs.items() if spec.encoding is not None}


def stored_names(name: str, model: Checkpoint) -> list[str]:
    """Return the names under which a tensor of a view is stored: of codes those of all parts, the codes first."""
    encoding = model.specs[name].encoding
    if encoding is None:
        return [model.origin(name)]
    names = cast("Encoding", encoding).module.names
    codes = names.get("weight", next(iter(names.values())))
    return [model.origin(part) for part in dict.fromkeys([codes, *names.values()])]


def stored_parts(spec: TensorSpec) -> list[TensorSpec]:
    """Return what is stored of a tensor: of codes all parts, else itself."""
    return [spec] if spec.encoding is None else [*cast("Encoding", spec.encoding).module.specs.values()]


def restated(model: Checkpoint, changed: Mapping[str, Any], dropped: Collection[str]) -> Checkpoint:
    """Return a model whose files' headers say of its quantization what config.json does, where they say it at all.

    `changed` and `dropped` are the fields of config.json that change, and those that go.
    """
    if HEADER not in changed and HEADER not in dropped:
        return model

    def header(metadata: Mapping[str, str]) -> dict[str, str]:
        new = {HEADER: json.dumps(changed[HEADER])} if HEADER in changed and HEADER in metadata else {}
        return {**{key: value for key, value in metadata.items() if key != HEADER}, **new}

    return replace(model, shards=tuple(replace(shard, metadata=header(shard.metadata)) for shard in model.shards))


def _dtype(model: Checkpoint, component: str) -> str:
    """Return the 16-bit dtype that a model computes in: config.json's, else that of most of its plain numbers.

    Each component of a pipeline computes in its own; "" stands for any other model.
    """
    config = model.configs.get(component, model.config)
    inner = config.get("text_config")
    places: list[Mapping[str, Any]] = [config, *([inner] if isinstance(inner, Mapping) else [])]
    for place in places:
        for key in ("dtype", "torch_dtype"):
            if (named := dtypes.ALIASES.get(str(place.get(key)))) in ("BF16", "F16"):
                return named
    start = f"{component}." if component else ""
    own = [spec for name, spec in model.specs.items() if name.startswith(start)]
    sizes = {dtype: sum(spec.parameters for spec in own if spec.dtype == dtype) for dtype in ("BF16", "F16")}
    return "F16" if sizes["F16"] > sizes["BF16"] else "BF16"
