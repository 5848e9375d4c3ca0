"""What config.json says of a quantization, and headers of files: where it stands, and both without it.

Older exports of NVIDIA's modelopt say it in `hf_quant_config.json` beside config.json; an opened model's `config` has
it as config.json would, and where the statement changes, that file does too.

ComfyUI's files say it in the metadata of their header, which stands in an opened model's `config` under its own name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

HEADER = "_quantization_metadata"
"""Where a ComfyUI file says how its layers are quantized: in its header, as JSON: {"layers": {path: {"format": …}}}."""

KEYS = ("quantization_config", "quantization", HEADER)
"""Fields of config.json that state a quantization."""

BESIDE = "hf_quant_config.json"
"""Where older exports of modelopt say how a model is quantized."""

_INNER = ("text_config", "llm_config", "language_config", "thinker_config")


def statement(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what config.json says of its quantization; {} where it says nothing.

    MLX's `quantization` goes before a `quantization_config`, which may be left of the model that mlx-lm converted.
    """
    stated = [place.get(key) for place in _places(config) for key in KEYS]
    known = [each for each in stated if isinstance(each, Mapping) and each]
    of_mlx = [each for each in known if each is config.get("quantization") and {"group_size", "bits"} <= each.keys()]
    return next(iter([*of_mlx, *known]), {})


def listed(statement: Mapping[str, Any], key: str, more: Iterable[str]) -> list[Any]:
    """Return a statement's list of modules with more of them; a new list where it has none."""
    before = statement.get(key)
    return [*(before if isinstance(before, list) else ()), *more]


def is_block(stated: Any) -> TypeGuard[Sequence[int]]:
    """Tell whether what a statement has of a block is its two sides."""
    return (
        isinstance(stated, list | tuple) and len(stated) == 2 and all(type(side) is int and side > 0 for side in stated)
    )


def by_module(statement: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return what a statement says of single modules under a key; {} where that is no object."""
    said = statement.get(key)
    return said if isinstance(said, Mapping) else {}


def with_statement(config: Mapping[str, Any], new: Mapping[str, Any] | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the fields of config.json that change, and those that go, for a new statement; None: for none at all."""
    changed: dict[str, Any] = {}
    dropped: list[str] = []
    for key in KEYS:
        if not isinstance(config.get(key), Mapping):
            continue
        if new is None:
            dropped.append(key)
        else:
            changed[key] = dict(new)
    for name in _INNER:
        if isinstance(inner := config.get(name), Mapping) and any(isinstance(inner.get(key), Mapping) for key in KEYS):
            kept = {key: value for key, value in inner.items() if key not in KEYS}
            stated = {} if new is None else {key: dict(new) for key in KEYS if isinstance(inner.get(key), Mapping)}
            changed[name] = {**kept, **stated}
    return changed, tuple(dropped)


def with_beside(config: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return config.json with what `hf_quant_config.json` says, where it says nothing of a quantization itself."""
    inner = document.get("quantization")
    if statement(config) or not isinstance(inner, Mapping) or not inner.get("quant_algo"):
        return config
    kept, excluded = (
        {key: value for key, value in inner.items() if key != "exclude_modules"},
        inner.get("exclude_modules"),
    )
    stated = {"quant_method": "modelopt", **kept, "ignore": excluded if isinstance(excluded, list) else []}
    return {**config, "quantization_config": stated}


def beside(document: Mapping[str, Any], config: Mapping[str, Any], dropped: Collection[str]) -> dict[str, Any] | None:
    """Return `hf_quant_config.json` as it should be beside a config.json of which these fields change and those go.

    None where it has to go as well.
    """
    inner, stated = document.get("quantization"), statement(config)
    if "quantization_config" in dropped or any(name in config and not stated for name in _INNER):
        return None
    if not isinstance(inner, Mapping) or not stated:
        return dict(document)
    lists = {"exclude_modules": stated.get("ignore") or stated.get("exclude_modules") or []}
    lists |= {key: stated[key] for key in ("quantized_layers",) if key in stated and key in inner}
    return {**document, "quantization": {**inner, **lists}}


def comfy_layers(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how a ComfyUI file is said to store its layers, by path; {} where its header says nothing."""
    stated = config.get(HEADER)
    layers = stated.get("layers") if isinstance(stated, Mapping) else None
    return layers if isinstance(layers, Mapping) else {}


def with_plain(metadata: Mapping[str, str], names: Iterable[str]) -> Mapping[str, str]:
    """Return the metadata of a header, which says of these tensors that they are plain; torchao alone has words there.

    What says nothing of them is returned as it is.
    """
    told = [name for name in names if '"_type"' in metadata.get(name, "")]
    return {**metadata, **dict.fromkeys(told, '{"_type": "Tensor"}')} if told else metadata


def _places(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config, *(inner for name in _INNER if isinstance(inner := config.get(name), Mapping))]
