"""Fields of a configuration of mergekit: one value where one can be, and a problem with its line where it cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratools.recipe.text import Node, Scalar, Table


@dataclass(slots=True)
class Entry:
    """A model of the list: its base, its adapter, if it has one, and its own parameters."""

    base: str
    adapter: str | None
    parameters: Mapping[str, Node]


@dataclass(slots=True)
class Fields:
    """Reads values of a configuration at `path`; `problems` are what cannot be done, `notes` what is to be said."""

    path: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def number(self, entry: Entry | None, shared: Mapping[str, Node], key: str, default: float | None) -> float:
        """Return a parameter: that of the model, else that of all."""
        node = (entry.parameters.get(key) if entry else None) or shared.get(key)
        if node is None:
            if default is None:
                self.problems.append(f"parameters: {key}: every model needs one")
            return default or 0.0
        if isinstance(node, Table) and node.entries.keys() == {"value"}:
            node = node.entries["value"]
        if not isinstance(node, Scalar):
            what = "values for layers or for names of tensors"
            self.fault(node, f"parameters: {key}: {what} are not done; one number is")
            return 1.0
        try:
            value = float(node.text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            self.fault(node, f"parameters: {key}: {node.text!r:.60} is no number")
        return value

    def switch(self, shared: Mapping[str, Node], key: str, default: bool) -> bool:
        """Return a parameter that is true or false, or 0 or 1."""
        node = shared.get(key)
        if node is None:
            return default
        if not isinstance(node, Scalar) or node.kind not in ("bool", "number"):
            self.fault(node, f"parameters: {key}: expected true or false")
            return default
        return node.on if node.kind == "bool" else node.text not in ("0", "0.0")

    def table(self, node: Node | None, what: str) -> Mapping[str, Node]:
        """Return the entries of a mapping; {} where there is none."""
        if node is None or (isinstance(node, Scalar) and node.kind == "null"):
            return {}
        if not isinstance(node, Table):
            self.fault(node, f"{what}: expected a mapping")
            return {}
        return node.entries

    def text(self, node: Node, what: str) -> str:
        """Return a text."""
        if isinstance(node, Scalar) and node.kind != "null":
            return node.text
        self.fault(node, f"{what}: expected a text")
        return ""

    def fault(self, node: Node, problem: str) -> None:
        """Note a problem with its line."""
        self.problems.append(f"line {node.line}: {problem}")
