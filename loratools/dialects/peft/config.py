"""`adapter_config.json` as PEFT 0.21 reads it: each field is honoured, without effect, or refused with a reason."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from loratools.adapter.model import BaseIdentity
from loratools.dialects._frame.numbers import is_number
from loratools.dialects.peft.patterns import ConfigFile, NameList, PatternKeys
from loratools.dialects.peft.targets import Targets
from loratools.errors import BadFile, UnsupportedAdapter

DEFAULT_R = DEFAULT_ALPHA = 8
"""What PEFT takes where a config does not say."""

_LAYERS = 4096  # layers that a config may ask for; the largest models have some hundred

Test = Callable[[Any], bool]


def _list_of(kind: type) -> Test:
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


def _rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _one_or_list(kind: type) -> Test:
    return lambda value: type(value) is kind or _list_of(kind)(value)


def _map_to(test: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(test(item) for item in value.values())


def _indices(value: Any) -> bool:
    return _list_of(int)(value) and all(0 <= index < 2**31 for index in value)


def _ranges(value: Any) -> bool:
    pairs = isinstance(value, list) and all(_indices(pair) and len(pair) == 2 and pair[0] < pair[1] for pair in value)
    return pairs and sum(stop - start for start, stop in value) <= _LAYERS


def _is(kind: type | UnionType) -> Test:
    return lambda value: isinstance(value, kind)


def _set(value: Any) -> bool:
    return value is not False  # fields that are null are gone by now; an empty object switches a variant on


_NAMES = "a list of names or a regular expression"
# field -> (test of a value that is there, what was expected)
_TYPES: dict[str, tuple[Test, str]] = {
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
        lambda value: _indices(value) or _map_to(_indices)(value),
        "token indices, or names to token indices",
    ),
    "auto_mapping": (_is(dict), "an object"),
    "layer_replication": (_ranges, f"pairs [start, stop] of layers, {_LAYERS} at most in all"),
    "lora_dropout": (is_number, "a number"),
    **dict.fromkeys(("base_model_name_or_path", "revision", "task_type", "peft_type"), (_is(str), "a string")),
} | dict.fromkeys(
    ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), (_is(bool), "a switch")
)

_PATTERNS = ("rank_pattern", "alpha_pattern")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq")
_SUBTRACTED_INITS = ("pissa", "olora", "corda")
"""Those whose changed base is W − s·B₀·A₀, so that subtracting the initial adapter undoes the change."""
_INIT_REASON = (
    "PEFT changes the base model whenever this adapter is loaded, so W + s·B·A is not what was trained; "
    "save it with path_initial_model_for_weight_conversion, or combine it with --initial"
)

# field, whether a value is refused, why
_REFUSED: tuple[tuple[str, Test, str], ...] = (
    ("peft_type", lambda value: value != "LORA", "only LORA is read"),
    ("init_lora_weights", lambda value: str(value).lower().startswith(_BASE_CHANGING_INITS), _INIT_REASON),
    ("use_qalora", bool, "QA-LoRA pools the input in groups before A; it is no plain LoRA"),
    ("use_bdlora", _set, "BD-LoRA stores block-diagonal factors in a compact form; they are no plain factors"),
    ("alora_invocation_tokens", _set, "an activated LoRA acts only after its invocation tokens and cannot be merged"),
    ("arrow_config", _set, "an arrow router chooses among several adapters and is none itself"),
    ("kasa_config", _set, "KaSA also takes the smallest singular components out of the base model"),
    ("monteclora_config", _set, "MonteCLoRA samples its factors; there is no single B·A"),
    ("enable_lora", bool, "PEFT 0.2's fused attention (enable_lora) has grouped factors; save it again with PEFT"),
)  # fmt: skip

# Fields that say how it was trained, how it is computed, or whose tensors speak for themselves.
_SILENT = (
    "inference_mode", "peft_version", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "qalora_group_size", "megatron_config", "megatron_core", "runtime_config", "merge_weights",
)  # fmt: skip
_KNOWN = {*_TYPES, *_SILENT, *(field for field, _, _ in _REFUSED)}

# What a writer may want, kept in `Adapter.settings` where it says something.
_SETTINGS = (
    "task_type", "auto_mapping", "fan_in_fan_out", "bias", "lora_dropout", "use_rslora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices",
    "target_parameters", "ensure_weight_tying", "layer_replication",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A config without faults: types are right, expressions compile, no field is refused.

    `fields` are those that are not null, `notes` what a reader should know of them. `targets`, `rank_keys` and
    `alpha_keys` match modules by PEFT's rules.
    """

    fields: Mapping[str, Any]
    targets: Targets
    notes: tuple[str, ...]
    rank_keys: PatternKeys
    alpha_keys: PatternKeys

    @classmethod
    def parse(cls, document: Mapping[str, Any], path: Path, *, initial: bool = False) -> PeftConfig:
        """Check a config; raise `BadFile` with all fields of a wrong type, or `UnsupportedAdapter` with all reasons.

        `path` is its file, for messages. `initial` lets in an adapter of a changed base (PiSSA, OLoRA, CorDA), for a
        caller that subtracts the initial adapter from it.
        """
        fields = {name: value for name, value in document.items() if value is not None}
        faults = [
            f"{name}: expected {expected}, found {str(fields[name])[:80]!r}"
            for name, (test, expected) in _TYPES.items()
            if name in fields and not test(fields[name])
        ]
        _check(path, faults)
        file = ConfigFile(path)
        targets = Targets.of(fields, file)
        rank_keys, alpha_keys = (PatternKeys(fields.get(name, ()), name, file) for name in _PATTERNS)
        _check(path, file.problems)
        init = str(fields.get("init_lora_weights", True)).lower()
        subtracted = initial and init.startswith(_SUBTRACTED_INITS)
        refused = [
            f"{name} = {str(fields[name])[:80]}: {reason}"
            for name, refuses, reason in _REFUSED
            if name in fields and refuses(fields[name]) and not (subtracted and name == "init_lora_weights")
        ]
        if init not in ("true", "false", *_PLAIN_INITS) and not init.startswith(_BASE_CHANGING_INITS):
            refused.append(f"init_lora_weights = {init[:80]}: not known here; it may change the base model")
        if refused:
            raise UnsupportedAdapter(f"{path}: loratools does not read this adapter", refused)
        return cls(fields, targets, tuple(_notes(fields)), rank_keys, alpha_keys)

    def rank(self, module: str) -> int | None:
        """Return the rank that the config states for a module, by PEFT's first-match rule; None if it states none."""
        key = self.rank_keys.first(module)
        rank: int | None = self.fields.get("r") if key is None else self.fields["rank_pattern"][key]
        return rank

    def alpha(self, module: str) -> float:
        """Return the alpha of a module, by PEFT's first-match rule."""
        key, usual = self.alpha_keys.first(module), self.fields.get("lora_alpha", DEFAULT_ALPHA)
        alpha: float = usual if key is None else self.fields["alpha_pattern"][key]
        return alpha

    def scaling(self, module: str, rank: int) -> float:
        """Return s = α/r, or α/√r with rsLoRA."""
        return self.alpha(module) / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def applied_twice(self, module: str) -> int:
        """Return how often ΔW is added: 2 for the output projection of an `nn.MultiheadAttention`, else 1.

        PEFT up to 0.21 computes W + 2·s·B·A there, in training too (huggingface/peft#3774), so such an adapter was
        trained for it. A config without a version is from such a PEFT.
        """
        fixed = self.version is not None and self.version > (0, 21)
        return 2 if module.endswith(".base_layer.out_proj") and not fixed else 1

    @property
    def version(self) -> tuple[int, int] | None:
        """The version of PEFT that wrote it, by its first two numbers."""
        match = re.match(r"(\d+)\.(\d+)", str(self.fields.get("peft_version", "")))
        return (int(match[1]), int(match[2])) if match else None

    def token_rows(self, module: str) -> list[int] | None:
        """Return the token indices of an embedding's trained rows; a bare list is that of every such module."""
        indices = self.fields.get("trainable_token_indices")
        if isinstance(indices, Mapping):
            name = NameList(indices).first(module)
            indices = None if name is None else indices[name]
        return indices

    @property
    def base(self) -> BaseIdentity | None:
        """The base model's name and revision; None where neither is there, or both are empty."""
        name, revision = self.fields.get("base_model_name_or_path") or None, self.fields.get("revision") or None
        return BaseIdentity(name, revision) if name or revision else None

    @property
    def settings(self) -> dict[str, Any]:
        """What a writer may want."""
        stated = {name: self.fields[name] for name in _SETTINGS if name in self.fields}
        empty: tuple[Any, ...] = ("none", [], {}, "")
        settings = {name: value for name, value in stated.items() if value is not False and value not in empty}
        if self.targets.layers:
            settings["layers_to_transform"] = list(self.targets.layers)  # a lone 0 would look like nothing
        return settings


def _check(path: Path, faults: list[str]) -> None:
    """Raise `BadFile` with all fields of a config that PEFT would not accept, if there are any."""
    if faults:
        raise BadFile(f"{path}: {len(faults)} field(s) that PEFT would not accept", faults)


def _notes(fields: Mapping[str, Any]) -> list[str]:
    notes = [
        f"the config does not say {name}; {default} is what PEFT takes"
        for name, default in (("r", DEFAULT_R), ("lora_alpha", DEFAULT_ALPHA), ("peft_type", "LORA"))
        if name not in fields
    ]
    if fields.get("init_lora_weights") == "lora_ga":
        notes.append("LoRA-GA training started from a changed base model; PEFT applies it to the unchanged one")
    unknown = sorted(name for name, value in fields.items() if name not in _KNOWN and value)
    if unknown:
        notes.append(f"fields of the config that PEFT 0.21 does not know: {', '.join(unknown)[:500]}")
    return notes
