"""What transformers 5 makes of the tensors of a checkpoint as it loads them: `conversions.json` beside this file.

A model's modules have other names than its files, and other tensors: projections are fused or taken apart, experts
stacked, rows of q and k permuted. Adapters bear the names of modules. `tests/make/conversion_table.py` makes the table
of transformers' own rules; this finds those of one model and says which tensors of the files make one of the model's.
What the rules do with numbers is in `adapter/converted`. The table is read when a model is first asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

Operation = tuple[str, Mapping[str, Any]]
"""The name of an operation on tensors, and its settings."""

_ALONE = "thinker"
"""The part of Qwen-Omni's models that trainers load alone, whose adapters name modules from there on."""

_NUMBER = re.compile(r"(?<=\.)\d{2,}(?=\.)")


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """One rule of transformers: names that match one of `sources` get the name in `targets`.

    `kind` is `group` for renames that only apply where the first of them does, `offset` counts the number in a name
    up. `operations` say what becomes of the tensors; none for a rule that renames alone. `scopes` are the paths of the
    models that the rule is of, one of which a name begins with; none for those of the whole model.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    kind: str = ""
    offset: int = 0
    operations: tuple[Operation, ...] = ()
    scopes: tuple[str, ...] = ()

    def apply(self, name: str) -> tuple[str, int] | None:
        """Return the new name, and the number of the source that matched; None where none does."""
        prefix = ""
        if self.scopes:
            scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
            if scope is None:
                return None
            prefix, name = scope, name.removeprefix(scope)
        pattern = _compiled(self.sources)
        match = pattern.search(name)
        if match is None:
            return None
        group = next(key for key, value in match.groupdict().items() if value is not None)
        number = int(group[1:])
        replacement = self.targets[number] if self.kind == "group" else self.targets[0]
        if r"\1" in replacement:
            inner = match.group(pattern.groupindex[group] + 1)
            replacement = replacement.replace(r"\1", str(int(inner) + self.offset) if self.offset else inner)
        return prefix + name.replace(match.group(0), replacement, 1), number


@cache
def _compiled(sources: tuple[str, ...]) -> re.Pattern[str]:
    """Return what transformers compiles of a rule's sources: the longest first, each to the end of a word."""
    branches = []
    for number, source in sorted(enumerate(sources), key=lambda pair: -len(pair[1])):
        pattern = source.replace("*.", r".*\.")
        branches.append(f"(?P<g{number}>{pattern}" + (r"(?!\w))" if pattern[-1:].isalnum() else ")"))
    return re.compile("|".join(branches))


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """Tensors of a model that a rule makes: `sources` are the names that it takes, by source and in order.

    Each of these is a name after all renaming; `targets` are names of the model.
    """

    rule: Rule
    sources: tuple[tuple[str, ...], ...]
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Conversion:
    """The rules of one model, in order; `prefix` is the name under which its class holds its inner model, or "".

    `alone` is the path of a part that is trained as a model of its own, "" where there is none.
    """

    rules: tuple[Rule, ...]
    prefix: str
    alone: str = ""
    _renamings: tuple[Rule, ...] = field(init=False)
    _converters: tuple[Rule, ...] = field(init=False)

    def __post_init__(self) -> None:
        converters = tuple(rule for rule in self.rules if rule.operations and not _open(rule))
        object.__setattr__(self, "_renamings", tuple(rule for rule in self.rules if not rule.operations))
        object.__setattr__(self, "_converters", converters)

    def renamed(self, name: str, groups: frozenset[int] = frozenset()) -> str:
        """Return a tensor's name after all renaming. `groups` are those rules of renames that apply, by number."""
        for number, rule in enumerate(self._renamings):
            if rule.kind != "group" or number in groups:
                changed = rule.apply(name)
                name = name if changed is None else changed[0]
        return name

    def groups(self, names: Iterable[str]) -> frozenset[int]:
        """Return the groups of renames that apply beside files with these names.

        The first of the group does to one of them, or none does to any: the files have the names of modules then, and
        whoever has others has the older ones.
        """
        numbers = [number for number, rule in enumerate(self._renamings) if rule.kind == "group"]
        matched: dict[int, set[int]] = {number: set() for number in numbers}
        for name in names if numbers else ():
            for number in numbers:
                if (changed := self._renamings[number].apply(name)) is not None:
                    matched[number].add(changed[1])
        return frozenset(number for number, sources in matched.items() if not sources or 0 in sources)

    def converted(self, renamed: str) -> tuple[str, Rule, int] | None:
        """Return the tensor that a renamed one becomes part of, the rule, and which source it is; None where none."""
        for rule in self._converters:
            if (changed := rule.apply(renamed)) is not None:
                return changed[0], rule, changed[1]
        return None

    def makes(self, renamed: Iterable[str]) -> dict[str, Made]:
        """Return every tensor that operations make of renamed ones, by name."""
        collected: dict[tuple[str, int], tuple[Rule, dict[int, list[str]]]] = {}
        for name in sorted(renamed, key=natural):
            if (part := self.converted(name)) is not None:
                target, rule, source = part
                collected.setdefault((target, id(rule)), (rule, {}))[1].setdefault(source, []).append(name)
        made: dict[str, Made] = {}
        for (target, _), (rule, by_source) in collected.items():
            targets = tuple(target.replace(rule.targets[0], other, 1) for other in rule.targets)
            sources = tuple(tuple(by_source.get(number, ())) for number in range(len(rule.sources)))
            made |= dict.fromkeys(targets, Made(rule, sources, targets))
        return made


def _open(rule: Rule) -> bool:
    """Tell whether only shapes say if a rule does anything: the tensor keeps its name, and is looked at as it is."""
    return rule.sources == rule.targets and all(settings.get("check_dims") for _, settings in rule.operations)


def natural(name: str) -> list[tuple[int, int | str]]:
    """Return a key that sorts names by their numbers, as transformers takes the tensors of a list.

    >>> sorted(["experts.10.w1", "experts.9.w1"], key=natural)
    ['experts.9.w1', 'experts.10.w1']
    """
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


@cache
def table() -> dict[str, Any]:
    """Return the table: `rules`, their numbers by class and model type in `mappings`, `classes`, and `automatic`."""
    read: dict[str, Any] = json.loads(Path(__file__).with_name("conversions.json").read_text(encoding="utf-8"))
    return read


def conversion(config: Mapping[str, Any]) -> Conversion | None:
    """Return the rules of the model that a config.json describes; None where transformers does not know it."""
    name, model_type = _class(config), _type_of(config)
    if name is None and model_type not in table()["mappings"]:
        return None
    taken: dict[str, list[str]] = {}
    rules: list[Rule] = []
    alone = ""
    base_prefix = table()["classes"][name][1] if name in table()["classes"] else ""
    for path, inner, its_type in _models(name, str(model_type or ""), config):
        alone = _ALONE if path == _ALONE else alone
        if (numbers := _numbers(path, inner, its_type, taken)) is not None:
            rules += (_rule(number, path, base_prefix) for number in numbers)
    rules += (_rule(number, "", base_prefix) for number in table()["mappings"]["legacy"])
    return Conversion(tuple(rules), base_prefix, alone)


def _numbers(path: str, name: str | None, model_type: str, taken: dict[str, list[str]]) -> list[int] | None:
    """Return the rules of a model inside another, unless one around it has them already; note in `taken` that it has.

    This is the order of `get_model_conversion_mapping` in transformers.
    """

    def has(key: str) -> bool:
        return any(not seen or path.startswith(f"{seen}.") for seen in taken.get(key, ()))

    mappings: dict[str, list[int]] = table()["mappings"]
    if name is not None and has(name):
        return None
    by_class = name in mappings
    if not by_class and (has(model_type) or model_type not in mappings):
        return None
    for key in (name,) if by_class else (name, model_type):
        if key is not None:
            taken.setdefault(key, []).append(path)
    return mappings[str(name) if by_class else model_type]


def _models(name: str | None, model_type: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str]]:
    """Yield path, class and model type of a model and of all inside it, in order."""
    yield "", name, model_type
    for path, place, default, chosen in table()["classes"].get(name, ("", "", ()))[2]:
        inner = config
        for key in (place or "").split(".") if place else ():
            inner = value if isinstance(value := inner.get(key), Mapping) else {}
        its_type, its_class = _type_of(inner), default
        if place == "":
            its_type = model_type
        elif place and its_type is not None and (chosen or its_type != table()["classes"].get(default, ("",))[0]):
            its_class = table()["automatic"].get(its_type, default)
        if its_type is None:
            its_type = table()["classes"].get(default, ("",))[0]
        for deeper, deeper_class, deeper_type in _models(its_class, its_type, inner):
            yield f"{path}.{deeper}".removesuffix("."), deeper_class, deeper_type


def _type_of(config: Mapping[str, Any]) -> str | None:
    """Return the model type that a config.json names; None where it is no text."""
    return model_type if isinstance(model_type := config.get("model_type"), str) else None


def _class(config: Mapping[str, Any]) -> str | None:
    """Return the class that config.json names, else the one that its model type stands for, where one is known."""
    classes: dict[str, Any] = table()["classes"]
    names = config.get("architectures")
    named = [str(name) for name in names] if isinstance(names, list) else []
    model_type = _type_of(config)
    with_type = [name for name, told in classes.items() if told[0] == model_type and told[2]]
    automatic = table()["automatic"].get(model_type)
    return next((name for name in (*named, *with_type, automatic) if name in classes), None)


def _rule(number: int, path: str, base_prefix: str) -> Rule:
    told = table()["rules"][number]
    scopes: tuple[str, ...] = ()
    if path:
        scope = path.removeprefix(base_prefix).removeprefix(".")
        scope = f"{scope}." if scope else ""
        scopes = (f"{base_prefix}.{scope}" if base_prefix else scope, scope)
    return Rule(
        tuple(told["from"]), tuple(told["to"]), told.get("kind", ""), told.get("offset", 0),
        tuple((name, settings) for name, settings in told.get("operations", ())), scopes,
    )  # fmt: skip


def templated(convert: Callable[[str], str]) -> Callable[[str], str]:
    """Return a function on names that is asked once for all names that differ in numbers of two digits and more.

    Rules tell numbers of one digit apart (`proj.0`), no others; a mixture has a hundred thousand names.
    """
    known: dict[str, str] = {}

    def converted(name: str) -> str:
        numbers = _NUMBER.findall(name)
        hidden = iter(range(1000, 1000 + len(numbers)))
        template = _NUMBER.sub(lambda match: str(next(hidden)), name)
        if template not in known:
            known[template] = convert(template)
        return _NUMBER.sub(lambda match: numbers[int(match[0]) - 1000], known[template])

    return converted
