"""Make the table of what transformers does to weights as it loads them: `loratools/adapter/naming/conversions.json`.

    python -m tests.make.conversion_table

transformers 5 renames, fuses, splits, stacks and permutes the tensors of a checkpoint on their way into a model, by
rules for a class or a model type (`transformers.conversion_mapping`); a model made of others takes the rules of each of
them, below its path. The table has the rules as data, and what each class is made of; classes are built without memory
(on the `meta` device) to see it.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.make import small, tie_table

TABLE = Path(__file__).parents[2] / "loratools" / "adapter" / "naming" / "conversions.json"

RENAMES = {
    "WeightRenaming": "rename", "GroupWeightRename": "group", "PrefixChange": "rename",
    "Inkling2IndexOffsetWeightRename": "offset",
}  # fmt: skip
"""Classes of transformers that only rename -> their name in the table."""

OPERATIONS = {
    "Chunk": "chunk", "Concatenate": "concatenate", "Split": "split", "MergeModulelist": "stack",
    "Interleave": "interleave", "Transpose": "transpose", "PermuteForRope": "permute_for_rope",
    "ErnieFuseAndSplitTextVisionExperts": "fuse_and_split_experts",
}  # fmt: skip
"""Operations of transformers -> their name in the table, beside their settings."""


def rules() -> dict[str, list[dict[str, Any]]]:
    """Return the rules of every class and model type that has some, and of `legacy`, which every model has."""
    from transformers import conversion_mapping

    made = conversion_mapping._build_checkpoint_conversion_mapping()
    return {key: [_rule(transform) for transform in transforms] for key, transforms in sorted(made.items())}


def _rule(transform: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"from": list(transform.source_patterns), "to": list(transform.target_patterns)}
    kind = RENAMES.get(type(transform).__name__)
    if kind is None:
        return told | {"operations": [_operation(each) for each in transform.operations]}
    if kind == "offset":
        told["offset"] = transform.offset
    return told | ({} if kind == "rename" else {"kind": kind})


def _operation(operation: Any) -> list[Any]:
    """Return [name, settings]; one that no table has keeps its class's name, which the refusal then says."""
    settings = {key: value for key, value in sorted(vars(operation).items()) if value not in (None, False)}
    return [OPERATIONS.get(type(operation).__name__, type(operation).__name__), settings]


def parts(model: Any) -> list[list[Any]]:
    """Return the models right inside a model: path, where its config lies, class, whether its model type chooses it.

    The place of the config is a path in the config of the model, null where it is not in it.
    """
    from transformers import PreTrainedModel

    inner: list[list[Any]] = []
    for path, module in model.named_modules():
        within = any(path == seen or path.startswith(f"{seen}.") for seen, *_ in inner)
        if not path or within or not isinstance(module, PreTrainedModel):
            continue
        place = next((key for key, config in _configs(model.config) if config is module.config), None)
        if place is None:  # it was copied
            alike = [key for key, config in _configs(model.config) if type(config) is type(module.config)]
            place = alike[0] if alike else None
        chosen = _automatic().get(module.config.model_type) == type(module).__name__ and bool(place)
        inner.append([path, place, type(module).__name__, chosen])
    return inner


def _configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a config and those inside it, by path."""
    from transformers import PretrainedConfig

    yield path, config
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _configs(value, f"{path}.{key}".removeprefix("."))


def _automatic() -> dict[str, str]:
    """Return the class that `AutoModel` makes of each model type."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return {key: value if isinstance(value, str) else value[0] for key, value in MODEL_MAPPING_NAMES.items()}


def table() -> dict[str, Any]:
    """Return the whole table: rules once, those of each key by number, and the classes."""
    import transformers

    unique: list[str] = []
    mappings: dict[str, list[int]] = {}
    for key, told in rules().items():
        mappings[key] = []
        for rule in told:
            text = json.dumps(rule, sort_keys=True)
            if text not in unique:
                unique.append(text)
            mappings[key].append(unique.index(text))
    return {
        "transformers": transformers.__version__,
        "rules": [json.loads(text) for text in unique],
        "mappings": mappings,
        "automatic": dict(sorted(_automatic().items())),
        "classes": described(),
    }


def described() -> dict[str, Any]:
    """Return every class that is made of others: its model type, its prefix and its parts; others by those two."""
    told: dict[str, Any] = {}
    for cls in tie_table.classes():
        for build in (built, small.built):
            try:
                _describe(build(cls), told)
                break
            except Exception as error:
                print(f"{cls.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
    for cls in tie_table.classes():
        told.setdefault(cls.__name__, assumed(cls))
    return dict(sorted(told.items()))


def assumed(cls: Any) -> list[Any]:
    """Return what a class that cannot be built here (for want of another library) says of itself: its inner model."""
    model_type, prefix = cls.config_class.model_type, cls.base_model_prefix
    inner = _automatic().get(model_type)
    within = [[prefix, "", inner, False]] if inner not in (None, cls.__name__) and prefix else []
    return [model_type, prefix, within]


def _describe(model: Any, told: dict[str, Any]) -> None:
    told[type(model).__name__] = [model.config.model_type, model.base_model_prefix, parts(model)]
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module).__name__ not in told:
            _describe(module, told)


def built(cls: Any) -> Any:
    """Return a model of a class and its default config, on the meta device."""
    return tie_table._built(cls, cls.config_class(), {})[0]


def main() -> None:
    """Write the table."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_OFFLINE": "1"}
    warnings.filterwarnings("ignore")
    tie_table._lenient()
    lines = json.dumps(table(), sort_keys=True, separators=(",", ":"))
    TABLE.write_text(re.sub(r'(?<=[,{\]])("\w+":\[|\{"from")', r"\n\1", lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
