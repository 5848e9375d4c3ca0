"""Which modules a config targets, by the rule of PEFT 0.21 (`check_target_module_exists`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.adapter.naming.compact import suffixes
from loratools.dialects.peft.patterns import ConfigFile, Expression, NameList, SavedModules

ALL_LINEAR = "all-linear"

MAX_LISTS = 100
"""Names in `layers_pattern`; a model has one list of layers, or two."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Targets:
    """Which modules a config targets.

    `modules` and `exclude` are names or a regular expression; `modules` is None where the config leaves it open, as
    with "all-linear". `layers` are the only layer indices, () for all; `layer_lists` match a name up to such an index.
    `saved` modules are trained whole. `parameters` are the modules whose own parameters (experts) are targeted,
    `pathless` the names of parameters that are targeted in whatever module has them, as PEFT 0.19 and later write them.
    """

    modules: NameList | Expression | None
    exclude: NameList | Expression
    layers: Collection[int]
    layer_lists: tuple[Expression, ...]
    saved: SavedModules
    parameters: NameList
    pathless: frozenset[str]
    all_linear: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any], config: ConfigFile) -> Targets:
        """Read them from the fields of a config; what cannot be used becomes lines of the config's `problems`."""

        def rule(name: str) -> NameList | Expression:
            value = fields.get(name, ())
            return Expression(value, name, config) if isinstance(value, str) and value else NameList(value)

        modules, lists = fields.get("target_modules"), several(fields, "layers_pattern")
        parameters = several(fields, "target_parameters")
        if len(lists) > MAX_LISTS:
            config.problems.append(f"layers_pattern: {len(lists)} names; at most {MAX_LISTS} are read")
            lists = ()
        if isinstance(modules, str) and (lists or fields.get("layers_to_transform") is not None):
            allowed = "with which PEFT allows no layers_to_transform or layers_pattern"
            config.problems.append(f"target_modules is a regular expression, {allowed}")
        # Without a list's name, the first numbered segment is the layer; a later one is an expert's number.
        layers = [rf"(?:^|.*?\.){name}" for name in lists] or [r".*?\.[^.]*"]
        indices = dict.fromkeys(several(fields, "layers_to_transform"))
        all_linear = isinstance(modules, str) and modules.lower() == ALL_LINEAR
        return cls(
            None if modules is None or all_linear else rule("target_modules"),
            rule("exclude_modules"),
            indices,
            tuple(
                Expression(rf"{layer}\.(?P<idx>\d+)\.", "layers_pattern", config, whole=False)
                for layer in layers
                if indices
            ),
            SavedModules(several(fields, "modules_to_save"), config),
            NameList(place for parameter in parameters if (place := parameter.rpartition(".")[0])),
            frozenset(parameter for parameter in parameters if "." not in parameter),
            all_linear,
        )

    def select(self, module: str) -> bool:
        """Tell whether PEFT would give this module an adapter; always true where the config leaves it open."""
        if self.parameters.matches(module):
            return True
        if self.exclude.matches(module) or self.saved.matches(module):
            return False
        if self.modules is None:
            return self.all_linear or not (self.parameters.names or self.pathless)
        if isinstance(self.modules, Expression):
            return self.modules.matches(module)
        return module in self.modules.names or (self.modules.matches(module) and self._in_layers(module))

    def unused(self, modules: Collection[str]) -> list[str]:
        """Return the listed names that none of these modules answers to; [] for a regular expression."""
        names = self.modules.names if isinstance(self.modules, NameList) else {}
        answered = {suffix for module in modules for suffix in suffixes(module)} if names else set()
        return [name for name in names if name not in answered]

    def _in_layers(self, module: str) -> bool:
        if not self.layers:
            return True
        groups = next((groups for layers in self.layer_lists if (groups := layers.groups(module)) is not None), None)
        return groups is not None and int(groups["idx"]) in self.layers


def several(fields: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """Return the values of a field that is a list or a single value; () for a field that is missing or empty text."""
    value = fields.get(name, "")
    if isinstance(value, list | tuple):
        return tuple(value)
    return () if value == "" else (value,)
