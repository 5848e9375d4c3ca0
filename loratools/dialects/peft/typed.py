"""An adapter of one of PEFT's types beside LORA: its config, the names of its tensors, and back into files.

What is special to a type stands in its file in `types/`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.decisions import warned
from loratools.dialects._frame.build import check_faults, some
from loratools.dialects._frame.numbers import tell_alpha
from loratools.dialects.peft import fields as tables
from loratools.dialects.peft import types
from loratools.dialects.peft.names import Groups, unwrap, whole_name
from loratools.dialects.peft.order import in_code
from loratools.dialects.peft.patterns import ConfigFile, Expression, PatternKeys
from loratools.dialects.peft.targets import Targets
from loratools.dialects.peft.types import Field, ModuleTensors
from loratools.dialects.peft.types._refused import REFUSED
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.format import keys
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.lazy import LazyTensor

TYPE, FIELDS = "peft_type", "peft_fields"
"""Settings of an adapter that was read here: the type, and the fields that a file needs to be of that type again."""

_COMMON = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "auto_mapping",
    "base_model_name_or_path", "revision", "task_type", "peft_type", "fan_in_fan_out",
)  # fmt: skip
_TYPES = {name: tables.TYPES[name] for name in _COMMON} | {
    "bias": (lambda value: value in ("none", "all") or str(value).endswith("_only"), "none, all or …_only")
}
_HARMLESS = {
    "inference_mode": "whether it is to be trained on",
    "peft_version": "which PEFT wrote it",
    "init_weights": "how training was initialized",
}
_SETTINGS = (
    "task_type", "auto_mapping", "fan_in_fan_out", "bias", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save",
)  # fmt: skip


def is_typed(document: Mapping[str, Any]) -> bool:
    """Tell whether a config is that of a type beside LORA; what is no word is for the config of LORA to refuse."""
    return isinstance(document.get(TYPE), str) and document[TYPE] != "LORA"


def assemble(
    path: Path, tensors: Mapping[str, LazyTensor], document: Mapping[str, Any], config: Path,
    alpha: float | None = None, base: Checkpoint | None = None,
) -> Adapter:  # fmt: skip
    """Return the adapter that tensors are with the document of a config of another type than LORA.

    `path` and `config` are what messages call the two. `alpha` is the user's, for every module; default: the file's.
    `base` tells the order of modules, for types that draw something for one after the other.
    Raises `UnsupportedAdapter` for types that are not read, with what they are, and `BadFile` with all contradictions.
    """
    parsed = TypedConfig.parse(document, config, alpha)
    groups, shared = _sorted(tensors, parsed.module, biases=parsed.values.get("bias", "none") != "none")
    updates: dict[str, Update] = {}
    whole = dict(groups.whole)
    faults = [
        *groups.faults, *_nested(groups), *parsed.untargeted(groups.modules),
        *parsed.strangers(groups.whole),
    ]  # fmt: skip
    place = getattr(parsed.module, "PLACE", "{module}")
    order = cache(partial(in_code, path, base, parsed.targets))
    common = (shared, tuple(groups.modules), parsed.values, parsed.pattern, order, parsed.named)
    if not groups.modules and shared and hasattr(parsed.module, "updates"):
        updates |= parsed.module.updates(ModuleTensors("", {}, *common))
    for module, parts in groups.modules.items():
        one = ModuleTensors(module, parts, *common)
        try:
            if hasattr(parsed.module, "whole"):
                whole |= {f"{module}.{name}": lazy for name, lazy in parsed.module.whole(one).items()}
            else:
                updates[place.format(module=module)] = parsed.module.update(one)
        except ValueError as error:
            faults.append(f"{module}: {error}")
    check_faults(path, faults)
    if not updates and not whole:
        raise BadFile(f"{path}: no tensors of a {parsed.type} adapter in it")
    for note in _notes(groups, parsed, [*groups.modules, *updates]):
        warned("%s: %s", path, note)
    return Adapter(updates, whole, parsed.base, dialect="peft", settings=parsed.settings, copies=groups.copies)


@dataclass(frozen=True, slots=True)
class TypedConfig:
    """The config of a type: its `values` with PEFT's defaults, its type's `module`, and what it targets."""

    type: str
    module: Any
    values: Mapping[str, Any]
    fields: Mapping[str, Any]
    targets: Targets
    keys: Mapping[str, PatternKeys]
    expressions: Mapping[str, Expression]

    @classmethod
    def parse(cls, document: Mapping[str, Any], path: Path, alpha: float | None = None) -> TypedConfig:
        """Check a config; raise `BadFile` with all fields of a wrong type, `UnsupportedAdapter` with all reasons."""
        name = str(document[TYPE])
        if name in REFUSED:
            raise UnsupportedAdapter(f"{path}: peft_type {name} cannot be merged: {REFUSED[name]}")
        if name not in types.names():
            known = ", ".join(["LORA", *types.names()])
            raise UnsupportedAdapter(f"{path}: peft_type {name[:80]!r} is not known; known are {known}")
        module = types.get(name)
        own: Mapping[str, Field] = module.FIELDS
        fields = {field: value for field, value in document.items() if value is not None}
        tests = {**_TYPES, **{field: (each.test, each.expected) for field, each in own.items()}}
        faults = [
            f"{field}: expected {expected}, found {str(fields[field])[:80]!r}"
            for field, (test, expected) in tests.items()
            if field in fields and not test(fields[field])
        ]
        check_faults(path, faults)
        if alpha is not None:
            fields |= _with_alpha(path, alpha, own, fields)
        file = ConfigFile(path)
        targets = Targets.of(fields, file)
        patterns = {field: PatternKeys(fields.get(field, ()), field, file) for field in own if _is_pattern(field)}
        texts = {
            field: fields[field] for field in own if field.endswith("_modules") and isinstance(fields.get(field), str)
        }
        expressions = {field: Expression(text, field, file) for field, text in texts.items()}
        check_faults(path, file.problems)
        refused = [
            f"{field} = {str(fields[field])[:80]}: {reason}"
            for field, (refuses, reason) in getattr(module, "REFUSED", {}).items()
            if field in fields and refuses(fields[field])
        ]
        if refused:
            raise UnsupportedAdapter(f"{path}: loratools does not read this adapter", refused)
        if unknown := tables.unknown(fields, tests, _HARMLESS, module.HARMLESS, getattr(module, "REFUSED", {})):
            shown = ", ".join(unknown)[:500]
            warned("%s: fields that are not known here, and have no effect: %s", path, shown)
        values = {field: each.default for field, each in own.items()} | fields
        return cls(name, module, values, fields, targets, patterns, expressions)

    def pattern(self, field: str, module: str) -> Any:
        """Return the value that a pattern has for a module, by PEFT's first-match rule; None where it has none."""
        key = self.keys[field].first(module)
        return None if key is None else self.values[field][key]

    def named(self, field: str, module: str) -> bool:
        """Tell whether PEFT takes the end of a module's name, or with an expression all of it, for one in a field."""
        expression = self.expressions.get(field)
        return module.endswith(tuple(self.values[field])) if expression is None else expression.matches(module)

    def untargeted(self, modules: Collection[str]) -> Iterator[str]:
        """Yield a line for each module with tensors that the config does not target."""
        for module in modules:
            if not self.targets.select(module):
                yield f"{module}: has tensors, but the config does not target it, so PEFT would ignore them"

    def strangers(self, whole: Collection[str]) -> Iterator[str]:
        """Yield a line for each tensor that is neither of this type, nor a bias that was trained, nor saved whole."""
        biases = self.values.get("bias", "none") != "none"
        for path in whole:
            if not self.targets.saved.matches(path) and not (biases and path.endswith("bias")):
                yield f"{path}: no tensor of a {self.type} adapter, and not in modules_to_save"

    @property
    def base(self) -> BaseIdentity | None:
        """The base model's name and revision; None where neither is there, or both are empty."""
        name, revision = self.fields.get("base_model_name_or_path") or None, self.fields.get("revision") or None
        return BaseIdentity(name, revision) if name or revision else None

    @property
    def settings(self) -> dict[str, Any]:
        """What a writer may want."""
        empty: tuple[Any, ...] = ("none", [], {}, "")
        stated = {name: self.fields[name] for name in _SETTINGS if name in self.fields}
        settings = {name: value for name, value in stated.items() if value is not False and value not in empty}
        own = {name: self.fields[name] for name in self.module.FIELDS if name in self.fields}
        return {**settings, TYPE: self.type, FIELDS: own}


def _is_pattern(field: str) -> bool:
    return field.endswith("_pattern")


def _with_alpha(path: Path, alpha: float, own: Mapping[str, Field], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that take the user's alpha; warn where a type has none."""
    names = [name for name in types.ALPHAS if name in own]
    if not names:
        warned("%s: alpha %g has no effect: a %s adapter has no alpha", path, alpha, fields[TYPE])
    tell_alpha(path, alpha, [fields.get(name) for name in names])
    cleared: dict[str, Any] = {"alpha_pattern": {}} if "alpha_pattern" in own else {}
    return {**dict.fromkeys(names, alpha), **cleared}


def _sorted(tensors: Mapping[str, LazyTensor], module: Any, *, biases: bool) -> tuple[Groups, dict[str, LazyTensor]]:
    """Sort tensors by module; return them with those that all modules share."""
    groups, shared = Groups(), dict[str, LazyTensor]()
    own, common = _pattern(module.__name__, "PARTS"), _pattern(module.__name__, "SHARED")
    strangers = []
    for name, lazy in tensors.items():
        path = unwrap(name)
        if match := common.fullmatch(path):
            shared[match["first"] + match["rest"]] = lazy
            continue
        if not path.startswith(keys.PREFIX):
            strangers.append(name)
            continue
        path = path.removeprefix(keys.PREFIX)
        if match := own.fullmatch(path):
            place, part, adapter = match["module"], match["first"] + match["rest"], match["adapter"]
            home = groups.modules.setdefault(place, {})
        else:
            place, adapter, role = whole_name(path, biases)
            if role == "original":
                groups.originals.append(place)
                continue
            part, home = place, groups.copies if role == "copy" else groups.whole
        if adapter:
            groups.adapters.add(adapter)
        if part in home:
            groups.faults.append(f"{name}: a second tensor for {place}")
        home[part] = lazy
    if len(groups.adapters) > 1:
        several = ", ".join(sorted(groups.adapters))
        groups.faults.append(f"several adapters in one file: {several}; save them one by one")
    if strangers:
        begin = f"names do not begin with {keys.PREFIX}: {', '.join(strangers[:5])}"
        groups.faults.append(f"{len(strangers)} tensor(s) whose {begin}")
    return groups, shared


@cache
def _pattern(module: str, table: str) -> re.Pattern[str]:
    """Return what matches a module's part, or the name of a shared tensor, with an adapter's name in it or without.

    The name stands behind the first segment, where PEFT puts it into raw state dicts.
    """
    parts = getattr(types.get(module.rpartition(".")[2].upper()), table, {})
    firsts: set[str] = set()
    rests: dict[str, list[str]] = {}
    for part in sorted(parts, key=len, reverse=True):
        first, dot, rest = part.partition(".")
        firsts.add(first)
        rests.setdefault(first, []).append(
            (re.escape(dot + rest)).replace(r"\{n\}", r"\d+").replace(r"\{word\}", r"[^.]+")
        )
    if not firsts:
        return re.compile(r"(?!)")
    each = "|".join(
        rf"{re.escape(first)}(?=(?:\.[^.]+)?(?:{'|'.join(rests[first])})$)" for first in sorted(firsts, reverse=True)
    )
    ends = "|".join(sorted({rest for group in rests.values() for rest in group}, key=len, reverse=True))
    begin = r"base_model\.(?:model\.)?" if table == "SHARED" else r"(?P<module>.+)\."
    return re.compile(rf"{begin}(?P<first>{each})(?:\.(?P<adapter>(?!\d+$)[^.]+))??(?P<rest>{ends})")


def _nested(groups: Groups) -> Iterator[str]:
    for module in groups.modules:
        if "base_layer" in module.split("."):
            yield f"{module}: an adapter inside another one, whose name does not say which weight it is for"


def _notes(groups: Groups, config: TypedConfig, modules: Collection[str]) -> Iterator[str]:
    """Yield what a user must know of the tensors beside their config."""
    if groups.originals:
        yield f"{some(groups.originals)}: copies of the base model's, which PEFT does not load"
    for name in sorted(groups.adapters):
        yield f"the adapter's name {name!r} was left in the names of the tensors"
    if missing := config.targets.unused(modules):
        yield f"no tensors for these target_modules: {', '.join(missing[:20])}"
