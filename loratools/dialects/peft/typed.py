"""An adapter of one of PEFT's types beside LORA: its config, the names of its tensors, and back into files.

What is special to a type stands in its file in `types/`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.decisions import warned
from loratools.dialects._frame.build import check_faults
from loratools.dialects._frame.numbers import tell_alpha
from loratools.dialects.peft import checks, types
from loratools.dialects.peft import fields as tables
from loratools.dialects.peft.names import Groups, unwrap
from loratools.dialects.peft.order import in_code
from loratools.dialects.peft.patterns import ConfigFile, Expression, PatternKeys
from loratools.dialects.peft.targets import Targets
from loratools.dialects.peft.typed_names import by_module
from loratools.dialects.peft.types import Field, ModuleTensors, Values
from loratools.dialects.peft.types._refused import REFUSED
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.format import keys
from loratools.storage.lazy import LazyTensor

if TYPE_CHECKING:
    from loratools.storage.checkpoint import Checkpoint

Parts = dict[str, LazyTensor]

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


def present(tensors: Mapping[str, LazyTensor], document: Mapping[str, Any]) -> Mapping[str, LazyTensor]:
    """Return the tensors without those that are empty because their config says that nothing is left of a module."""
    name = document.get(TYPE)
    gone = {f"{keys.PREFIX}{module}." for module in (_deleted(name, document) if name in types.names() else ())}
    if not gone:
        return tensors
    return {
        name: lazy
        for name, lazy in tensors.items()
        if 0 not in lazy.shape or not any(unwrap(name).startswith(prefix) for prefix in gone)
    }


def _deleted(name: str, document: Mapping[str, Any]) -> Collection[str]:
    """Return the modules of which a config says that nothing is left."""
    module = types.get(name)
    return module.deleted(document) if hasattr(module, "deleted") else ()


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
    groups, shared = by_module(tensors, parsed.module, biases=parsed.values.get("bias", "none") != "none")
    if getattr(parsed.module, "TIED", False):
        groups.modules = _without_tied(groups.modules, parsed)
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
    for field, value in parsed.values.taken.items():
        warned("%s: the config does not say %s; %s, PEFT's default, is taken", config, field, json.dumps(value))
    check_faults(path, faults)
    if not updates and not whole:
        raise BadFile(f"{path}: no tensors of a {parsed.type} adapter in it")
    for note in (
        *_notes(groups, parsed, [*groups.modules, *updates]),
        *checks.lacking({*groups.modules, *updates, *_deleted(parsed.type, parsed.fields)}, parsed.targets, base),
    ):
        warned("%s: %s", path, note)
    return Adapter(updates, whole, parsed.base, dialect="peft", settings=parsed.settings, copies=groups.copies)


@dataclass(frozen=True, slots=True)
class TypedConfig:
    """The config of a type: its `values` with PEFT's defaults, its type's `module`, and what it targets."""

    type: str
    module: Any
    values: Values
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
        off = {field: False for field, each in own.items() if each.default is True}  # what PEFT takes null for
        stated: dict[str, Any] = {
            field: off.get(field) if value is None else value for field, value in document.items()
        }
        fields = {field: value for field, value in stated.items() if value is not None}
        tests = {**_TYPES, **{field: (each.test, each.expected) for field, each in own.items()}}
        tables.check(path, tables.misfits(fields, tests))
        if alpha is not None:
            fields |= _with_alpha(path, alpha, own, fields)
        file = ConfigFile(path)
        targets = Targets.of(fields, file)
        patterns = {field: PatternKeys(fields.get(field, ()), field, file) for field in own if _is_pattern(field)}
        texts = {
            field: fields[field] for field in own if field.endswith("_modules") and isinstance(fields.get(field), str)
        }
        expressions = {field: Expression(text, field, file) for field, text in texts.items()}
        tables.check(path, file.problems)
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
        return cls(name, module, Values(fields, own), fields, targets, patterns, expressions)

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
        return tables.base_of(self.fields)

    @property
    def settings(self) -> dict[str, Any]:
        """What a writer may want."""
        own = {
            name: self.fields[name]
            for name in (*self.module.FIELDS, *self.module.HARMLESS, "init_weights")
            if name in self.fields
        }
        return {**tables.stated(self.fields, _SETTINGS, self.targets.layers), TYPE: self.type, FIELDS: own}


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


def _without_tied(modules: dict[str, Parts], config: TypedConfig) -> dict[str, Parts]:
    """Return the modules without those outside the layers that are no targets and have the very tensors of one.

    They are tied to it, and PEFT saves both.
    """
    targets = [parts for module, parts in modules.items() if config.targets.select(module)]

    def is_copy(parts: Parts) -> bool:
        return any(parts.keys() == of.keys() and all(_same(parts[part], of[part]) for part in parts) for of in targets)

    tied = {m for m in modules if not config.targets.select(m) and not checks.in_layer(m) and is_copy(modules[m])}
    return {module: parts for module, parts in modules.items() if module not in tied}


def _same(first: LazyTensor, other: LazyTensor) -> bool:
    if (first.dtype, first.shape) != (other.dtype, other.shape):
        return False
    return b"".join(map(bytes, first.chunks("first"))) == b"".join(map(bytes, other.chunks("other")))


def _nested(groups: Groups) -> Iterator[str]:
    for module in groups.modules:
        if "base_layer" in module.split("."):
            yield f"{module}: an adapter inside another one, whose name does not say which weight it is for"


def _notes(groups: Groups, config: TypedConfig, modules: Collection[str]) -> Iterator[str]:
    """Yield what a user must know of the tensors beside their config."""
    yield from groups.notes()
    if missing := config.targets.unused(modules):
        yield f"no tensors for these target_modules: {', '.join(missing[:20])}"
    if hasattr(config.module, "notes"):
        yield from config.module.notes(config.fields)
