"""Make the table of what transformers' classes tie: `loratools/adapter/placement/ties.json`.

Each major version of transformers tells of its own classes, in an environment of its own, which need not have
loratools; the two are then put together:

    PYTHON_WITH_TRANSFORMERS_4 tests/make/tie_table.py classes four.json
    PYTHON_WITH_TRANSFORMERS_5 tests/make/tie_table.py classes five.json
    python tests/make/tie_table.py table four.json five.json

A class is built without memory (on the `meta` device) for every way in which config.json can say, at its top level
and inside, whether embeddings are tied; the parameters that are one object then are the tie.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[2] / "loratools" / "adapter" / "placement" / "ties.json"

SAID = (None, False, True)
"""What a config.json says of the tie at one level: nothing, false, true. States are numbered in this order, the top
level first: `3·top + inner`, or `top` alone for a class whose text model has no config of its own."""

# Counts that do not change what is tied; one layer of each builds faster.
_COUNTS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers",
    "num_encoder_layers", "depth", "num_attention_layers", "encoder_num_hidden_layers",
)  # fmt: skip

# Fields that some configs leave open, with a value that lets their classes be built.
_OPEN: Mapping[str, Any] = {"vocab_size": 64, "head_dim": 16, "num_key_value_heads": 1, "prediction_length": 2}
# What a class asks for that the first attempts do not build.
_ASKED: Mapping[str, Any] = {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}, "is_decoder": True}
_SCALE = re.compile(r"if self\.config\.(tie_word_embeddings|scale_decoder_outputs):\s+(#.*\s+)*\w+ = \w+ \* \(")


def described(cls: Any) -> dict[str, Any]:
    """Return what one class ties: names of head and embedding, and the groups of one weight in every state.

    Raises what transformers raises for a class that its default config does not build.
    """
    plain = cls.config_class()
    inner = _inner(plain)
    model, groups = _built(cls, plain, {})
    told: dict[str, Any] = {
        "type": plain.model_type,
        "inner": inner,
        "prefix": cls.base_model_prefix if hasattr(model, cls.base_model_prefix or " ") else "",
        "embedding": _name(model, "get_input_embeddings"),
        "head": _name(model, "get_output_embeddings"),
        "scaled": bool(_SCALE.search(inspect.getsource(cls.forward))),
    }
    states: list[Any] = []
    for top, below in itertools.product(SAID, SAID if inner else (None,)):
        said: dict[str, Any] = {} if top is None else {"tie_word_embeddings": top}
        if below is not None:
            said[str(inner)] = {"model_type": getattr(plain, str(inner)).model_type, "tie_word_embeddings": below}
        try:
            states.append(_built(cls, plain, said)[1] if said else groups)
        except (ValueError, AttributeError):  # some classes refuse to be tied
            states.append(None)
    return told | {"states": states}


def _inner(config: Any) -> str | None:
    """Return the field of the config that holds the text model's own, None where it is the config itself."""
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:
        return None
    return next((key for key, value in vars(config).items() if value is text), None) if text is not config else None


def _built(cls: Any, plain: Any, said: dict[str, Any]) -> tuple[Any, list[list[str]]]:
    """Build a class whose config.json says this; return the model and its groups of names of one tensor."""
    import torch

    errors: list[Exception] = []
    attempts: tuple[tuple[str, bool, Mapping[str, Any]], ...]
    attempts = (("meta", True, {}), ("meta", False, {}), ("meta", True, _ASKED), ("cpu", True, {}))
    for device, one_layer, asked in attempts:
        if device == "cpu" and not isinstance(errors[0], NotImplementedError):  # it copies numbers while it is built
            raise errors[0]
        config = type(plain).from_dict(said)
        _fill(config, one_layer, asked)
        try:
            with torch.device(device):
                model = cls(config)
            break
        except Exception as error:
            errors.append(error)
    else:
        raise errors[0]
    names: dict[int, list[str]] = {}
    tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in itertools.chain(*tensors):
        names.setdefault(id(tensor), []).append(name)
    # What is repeated by layers is tied by other rules, and no embedding.
    groups = [sorted(group) for group in names.values() if len(group) > 1 and not _numbered(group)]
    return model, sorted(groups)


def _numbered(group: list[str]) -> bool:
    return any(re.search(r"\.\d+\.", name) for name in group)


def _fill(config: Any, one_layer: bool, asked: Mapping[str, Any]) -> None:
    """Set fields that are open, those asked for, and every number of layers to one."""
    import transformers

    for key, value in list(vars(config).items()):
        if one_layer and key in _COUNTS and isinstance(value, int):
            setattr(config, key, 1)
        elif key in asked or (value is None and key in _OPEN):
            setattr(config, key, {**_OPEN, **asked}[key])
        elif isinstance(value, transformers.PretrainedConfig):
            _fill(value, one_layer, asked)
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and "vocab_size" in vars(config) and padding >= config.vocab_size:
        config.vocab_size = padding + 1


def _lenient() -> None:
    """Let the towers for images that need a further library be empty: no embedding of words is in them."""
    import torch
    import transformers

    build: Any = transformers.AutoModel.from_config

    def or_empty(*arguments: Any, **options: Any) -> Any:
        try:
            return build(*arguments, **options)
        except ImportError:
            return torch.nn.Identity()

    transformers.AutoModel.from_config = or_empty  # type: ignore[method-assign]


def _name(model: Any, getter: str) -> str | None:
    """Return the name of the weight of the input or output embedding."""
    try:
        module = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
    weight = getattr(module, "weight", None)
    named = {id(tensor): name for name, tensor in model.named_parameters(remove_duplicate=False)}
    paths = [name for name, each in model.named_modules(remove_duplicate=False) if each is module]
    if weight is None or id(weight) not in named or not paths:
        return None
    return f"{min(paths, key=len)}.weight"


def names_of_classes() -> list[str]:
    """Return the names that transformers' automatic classes know, sorted, of which no module is loaded for this."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for attribute in vars(modeling_auto):
        if attribute.endswith("_MAPPING_NAMES"):
            for value in getattr(modeling_auto, attribute).values():
                names |= {value} if isinstance(value, str) else set(value)
    return sorted(filter(None, names))


def classes(names: Iterable[str] | None = None) -> Iterator[Any]:
    """Yield the model classes of these names, without what is none. Default: of all that are known."""
    import transformers

    for name in names_of_classes() if names is None else names:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.config_class is not None:
            yield cls


def table(told: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Put together what major versions tell of their classes: those with a head, or with anything tied.

    Partitions, the groups of names of one weight, are listed once; a class has the number of one for each state, None
    where it refuses to be built so, by major version.
    """
    partitions: list[Any] = []
    entries: dict[str, Any] = {}
    for major, classes_of in told.items():
        for name, one in sorted(classes_of["classes"].items()):
            if "error" in one or not (one["head"] or any(one["states"])):
                continue
            states = []
            for groups in one["states"]:
                if groups is not None and groups not in partitions:
                    partitions.append(groups)
                states.append(None if groups is None else partitions.index(groups))
            entries.setdefault(name, {})[major] = {
                key: value for key, value in one.items() if value and key != "states"
            } | {"states": states}
    shared = {name: _common(each) for name, each in sorted(entries.items())}
    versions = [each["transformers"] for each in told.values()]
    return {"transformers": versions, "partitions": partitions, "classes": shared}


def _common(majors: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the versions agree on once, the rest under each version."""
    values = list(majors.values())
    same = {key: value for key, value in values[0].items() if all(each.get(key) == value for each in values)}
    return same | {major: {k: v for k, v in each.items() if k not in same} for major, each in majors.items()}


def main(arguments: list[str]) -> None:
    """Tell of the installed classes, or put what two versions tell together."""
    if arguments[0] == "classes":
        os.environ |= {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_OFFLINE": "1"}
        warnings.filterwarnings("ignore")
        _lenient()
        told: dict[str, Any] = {}
        chosen = set(arguments[2:])
        for cls in classes():
            if chosen and cls.__name__ not in chosen:
                continue
            try:
                told[cls.__name__] = described(cls)
            except Exception as error:
                told[cls.__name__] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
        import transformers

        text = json.dumps({"transformers": transformers.__version__, "classes": told}, indent=0, sort_keys=True)
        Path(arguments[1]).write_text(text + "\n", encoding="utf-8")
    else:
        four, five = (json.loads(Path(path).read_text(encoding="utf-8")) for path in arguments[1:])
        lines = json.dumps(table({"4": four, "5": five}), sort_keys=True, separators=(",", ":"))
        TABLE.write_text(re.sub(r'("[A-Z]\w+":\{|"partitions")', r"\n\1", lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
