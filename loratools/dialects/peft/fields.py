"""The fields of `adapter_config.json`, PEFT 0.21's LoraConfig, and what each means for B·A and its scaling.

A field is implemented (`TYPES` has what it can be), refused (`REFUSED`) or harmless at a merge (`HARMLESS`), both with
a reason, or not known, which is said. `python -m tests.make.peft_fields` lists those of the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from loratools.adapter.model import MOST_LAYERS, BaseIdentity
from loratools.dialects._frame.numbers import is_number
from loratools.errors import BadFile, counted

DEFAULT_R = DEFAULT_ALPHA = 8
"""What PEFT takes where a config does not say."""

LATER = frozenset({
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "lora_ga_config", "use_bdlora",
    "monteclora_config", "velora_config", "kasa_config", "lora_B_layout", "unsloth_fused_expert_lora",
})  # fmt: skip
"""Fields that came with `peft_version` in PEFT 0.18, or later, and Unsloth's; PEFT writes its own also where null."""

Test = Callable[[Any], bool]


def _list_of(kind: type) -> Test:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


def _rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _one_or_list(kind: type) -> Test:
    return lambda value: type(value) is kind or _list_of(kind)(value)


def _map_to(test: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(test(item) for item in value.values())


def indices(value: Any) -> bool:
    """Tell whether a value is a list of token indices."""
    return _list_of(int)(value) and all(0 <= index < 2**31 for index in value)


def _ranges(value: Any) -> bool:
    pairs = isinstance(value, list) and all(indices(pair) and len(pair) == 2 and pair[0] < pair[1] for pair in value)
    return pairs and sum(stop - start for start, stop in value) <= MOST_LAYERS


def _is(kind: type | UnionType) -> Test:
    return lambda value: isinstance(value, kind)


def _set(value: Any) -> bool:
    return value is not False  # fields that are null are gone by now; an empty object switches a variant on


_NAMES = "a list of names or a regular expression"
TYPES: dict[str, tuple[Test, str]] = {
    "r": (_rank, "a rank above zero"),
    "lora_alpha": (is_number, "a number"),
    "rank_pattern": (_map_to(_rank), "names to ranks"),
    "alpha_pattern": (_map_to(is_number), "names to numbers"),
    "target_modules": (_one_or_list(str), _NAMES),
    "exclude_modules": (_one_or_list(str), _NAMES),
    **dict.fromkeys(("target_parameters", "modules_to_save"), (_list_of(str), "a list of names")),
    "layers_to_transform": (_one_or_list(int), "layer numbers"),
    "layers_pattern": (_one_or_list(str), "names"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (_is(bool | str), "true, false or a name"),
    "trainable_token_indices": (
        lambda value: indices(value) or _map_to(indices)(value),
        "token indices, or names to token indices",
    ),
    "auto_mapping": (_is(dict), "an object"),
    "layer_replication": (_ranges, f"pairs [start, stop] of layers, {MOST_LAYERS} at most in all"),
    "lora_dropout": (is_number, "a number"),
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "peft_type"), (_is(str), "a string")),
} | dict.fromkeys(
    ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), (_is(bool), "a switch")
)
"""Fields that are implemented: a test of a value that is there, and what was expected."""

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")
SUBTRACTED_INITS = ("pissa", "olora", "corda")
"""Those whose changed base is W − s·B₀·A₀, so that subtracting the initial adapter undoes the change."""
_INIT_REASON = (
    "PEFT changes the base model whenever this adapter is loaded, so W + s·B·A is not what was trained; "
    "save it with path_initial_model_for_weight_conversion, or combine it with --initial"
)
GROUPED = "grouped_by_expert"
"""Unsloth's word for a B of stacked experts whose columns lie expert after expert; PEFT's have the expert last."""

_OTHER_LAYOUT = f"only {GROUPED} is known for the columns of stacked experts, and PEFT's own order without the field"
_OTHER_SCALE = "a scaling that PEFT does not have; whether the tensors hold it already is not known here"


def _other_stacks(value: Any) -> bool:
    """Tell whether Unsloth's note on stacked experts says anything but expert after expert, in A and in B."""
    if not isinstance(value, Mapping) or not isinstance(marks := value.get("parameters", {}), Mapping):
        return says_something(value)
    layouts = [mark.get("lora_B_layout") if isinstance(mark, Mapping) else mark for mark in marks.values()]
    return any(layout != GROUPED for layout in (value.get("lora_A_layout", GROUPED), *layouts))


REFUSED: tuple[tuple[str, Test, str], ...] = (
    ("peft_type", lambda value: value != "LORA", "only LORA is read"),
    ("init_lora_weights", lambda value: str(value).lower().startswith(BASE_CHANGING_INITS), _INIT_REASON),
    ("use_qalora", bool, "QA-LoRA pools the input in groups before A; it is no plain LoRA"),
    ("use_bdlora", _set, "BD-LoRA stores block-diagonal factors in a compact form; they are no plain factors"),
    ("alora_invocation_tokens", _set, "an activated LoRA acts only after its invocation tokens and cannot be merged"),
    ("arrow_config", _set, "an arrow router chooses among several adapters and is none itself"),
    ("kasa_config", _set, "KaSA also takes the smallest singular components out of the base model"),
    ("monteclora_config", _set, "MonteCLoRA samples its factors; there is no single B·A"),
    ("enable_lora", bool, "PEFT 0.2's fused attention (enable_lora) has grouped factors; save it again with PEFT"),
    ("lora_B_layout", lambda value: says_something(value) and value != GROUPED, _OTHER_LAYOUT),
    ("unsloth_fused_expert_lora", _other_stacks, _OTHER_LAYOUT),
    *((name, lambda value: says_something(value) and value != 1, _OTHER_SCALE)
      for name in ("scale", "scaling", "lora_scale", "lora_scaling", "scaling_factor")),
)  # fmt: skip
"""Field, whether a value of it is refused, why. Those of the last line are of trainers that are not PEFT."""

HARMLESS = {
    "inference_mode": "whether it is to be trained on",
    "peft_version": "decides what older versions computed otherwise; nothing by itself",
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), "how training was initialized"),
    "velora_config": "how the backward pass stores its inputs",
    "qalora_group_size": "counts only with use_qalora, which is refused",
    **dict.fromkeys(("megatron_config", "megatron_core"), "which class computes a layer; the factors are the same"),
    "runtime_config": "where it is computed",
    "merge_weights": "PEFT 0.2: whether eval() merged it into the live model",
}
"""Fields without effect on what a merge computes, and why."""


def says_something(value: Any) -> bool:
    """Tell whether a field's value is anything but null, false or empty; zero is a number, and says something."""
    return value is not None and value is not False and value not in ("", [], {})


def unknown(fields: Mapping[str, Any], *known: Collection[str]) -> list[str]:
    """Return the names of fields that say something and are in none of the collections, sorted.

    >>> unknown({"r": 8, "use_hyper": True, "use_super": False, "gate": 0}, {"r", "lora_alpha"})
    ['gate', 'use_hyper']
    """
    return sorted(n for n, value in fields.items() if says_something(value) and not any(n in each for each in known))


def unknown_to_peft(fields: Mapping[str, Any]) -> list[str]:
    """Return the names of fields that say something, and of which nothing stands in this file."""
    return unknown(fields, TYPES, HARMLESS, {name for name, _, _ in REFUSED})


def misfits(fields: Mapping[str, Any], tests: Mapping[str, tuple[Test, str]]) -> list[str]:
    """List the fields whose value is not what their test wants, with what was expected and found."""
    return [
        f"{name}: expected {expected}, found {str(fields[name])[:80]!r}"
        for name, (test, expected) in tests.items()
        if name in fields and not test(fields[name])
    ]


def check(path: Path, faults: Sequence[str]) -> None:
    """Raise `BadFile` with all fields of a config that cannot be used, if there are any."""
    if faults:
        raise BadFile(f"{path}: {counted(len(faults), 'field')} that cannot be used", faults)


def base_of(fields: Mapping[str, Any]) -> BaseIdentity | None:
    """Return the base model's name and revision; None where neither is there, or both are empty."""
    name, revision = fields.get("base_model_name_or_path") or None, fields.get("revision") or None
    return BaseIdentity(name, revision) if name or revision else None


def stated(fields: Mapping[str, Any], names: Iterable[str], layers: Collection[int]) -> dict[str, Any]:
    """Return those of the named fields that say something, and `layers`, the layers that the config targets."""
    settings = {name: fields[name] for name in names if says_something(fields.get(name)) and fields[name] != "none"}
    if layers:
        settings["layers_to_transform"] = list(layers)  # a lone 0 would look like nothing
    return settings


def is_typed(document: Mapping[str, Any]) -> bool:
    """Tell whether a config is that of a type beside LORA; what is no word is for the config of LORA to refuse."""
    return isinstance(document.get("peft_type"), str) and document["peft_type"] != "LORA"
