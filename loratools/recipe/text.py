"""YAML of strangers, by pyyaml's safe loader: its nodes only, so that no value is guessed and no object is made.

What is refused: more than `MAX_BYTES`, more than `MAX_NODES` values once aliases stand for what they name, deeper than
`MAX_DEPTH`, tags, merge keys, a key twice, keys that are no text, several documents, bytes that are no UTF-8.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.errors import BadFile, MissingExtra, counted
from loratools.storage.sources import open_file

MAX_BYTES, MAX_NODES, MAX_DEPTH = 256_000, 20_000, 12
STDIN = Path("-")
"""Stands for what is piped in: its paths are from the folder that one is in."""

_CORE = "tag:yaml.org,2002:"
_KINDS = {"str": "text", "int": "number", "float": "number", "bool": "bool", "null": "null", "timestamp": "text",
          "value": "text"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value as it is written; `kind` is what YAML takes it for: text, number, bool or null."""

    text: str
    kind: str
    line: int

    @property
    def on(self) -> bool:
        """Whether a bool is true."""
        return self.text.lower() in ("true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    items: tuple[Node, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping, in the order of the file."""

    entries: Mapping[str, Node] = field(default_factory=dict)
    line: int = 1


Node = Scalar | Items | Table


def package() -> Any:
    """Return pyyaml's module; raise `MissingExtra` if it is not installed."""
    try:
        import yaml
    except ImportError:
        raise MissingExtra("recipes need the pyyaml package", hint="pip install 'loratools[run]'") from None
    return yaml


def read(path: Path) -> tuple[Table, str]:
    """Return the one mapping that a YAML file or stdin holds, and its text; raise `BadFile` for anything else."""
    yaml = package()
    if path.is_dir():
        raise BadFile(f"{path}: a folder; a recipe is a file of YAML")
    if path == STDIN:
        raw, path = sys.stdin.buffer.read(MAX_BYTES + 1), Path("stdin")
    else:
        with open_file(path) as file:
            raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise BadFile(f"{path}: larger than {MAX_BYTES} bytes; no recipe is")
    try:
        text = raw.decode("utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeError:
        raise BadFile(f"{path}: not UTF-8") from None
    except RecursionError:
        raise BadFile(f"{path}: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be read"
        raise BadFile(f"{path}: {where}not the YAML that was expected: {problem}") from None
    if root is None:
        raise BadFile(f"{path}: empty")
    reader = _Reader(path)
    node = reader.node(root, 0)
    if reader.problems:
        raise BadFile(f"{path}: {counted(len(reader.problems), 'problem')} in this YAML", reader.problems)
    if not isinstance(node, Table):
        raise BadFile(f"{path}: expected a mapping with inputs and steps")
    return node, text


class _Reader:
    """Makes our nodes of pyyaml's; `problems` are what is refused, with its line."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self.problems = path, 0, list[str]()

    def node(self, node: Any, depth: int) -> Node:
        """Return a node; raise `BadFile` where there are too many, or too deep."""
        self.count += 1
        line = node.start_mark.line + 1
        if self.count > MAX_NODES:  # an alias counts as what it names: nine lines can stand for a thousand million
            raise BadFile(f"{self.path}: line {line}: more than {MAX_NODES} values, aliases resolved; no recipe has")
        if depth > MAX_DEPTH:
            raise BadFile(f"{self.path}: line {line}: nested deeper than {MAX_DEPTH}; no recipe is")
        kind = node.tag.removeprefix(_CORE)
        if node.id == "mapping":
            if kind != "map":
                self._tag(node.tag, line)
            return self._table(node, depth, line)
        if node.id == "sequence":
            if kind != "seq":
                self._tag(node.tag, line)
            return Items(tuple(self.node(item, depth + 1) for item in node.value), line)
        if kind not in _KINDS:
            self._tag(node.tag, line)
        return Scalar(node.value, _KINDS.get(kind, "text"), line)

    def _table(self, node: Any, depth: int, line: int) -> Table:
        entries: dict[str, Node] = {}
        for key, value in node.value:
            at = key.start_mark.line + 1
            if key.id != "scalar" or key.tag == f"{_CORE}merge":
                what = "`<<` merges another mapping" if key.id == "scalar" else "a key is a list or a mapping"
                self.problems.append(f"line {at}: {what}, which a recipe does not need")
            elif key.value in entries:
                self.problems.append(f"line {at}: the key {key.value!r} a second time")
            else:
                entries[key.value] = self.node(value, depth + 1)
        return Table(entries, line)

    def _tag(self, tag: str, line: int) -> None:
        self.problems.append(f"line {line}: the tag {tag.replace(_CORE, '!!')}, and a recipe has none")


def node_of(value: Any) -> Node:
    """Return a value of Python as the node that its YAML would be."""
    if isinstance(value, Mapping):
        return Table({str(key): node_of(each) for key, each in value.items()})
    if isinstance(value, list | tuple):
        return Items(tuple(map(node_of, value)), 1)
    kind = "bool" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"
    return Scalar(str(value).lower() if isinstance(value, bool) else str(value), kind, 1)


def dump(document: Mapping[str, Any]) -> str:
    """Return a document as YAML that `read` takes: keys in their order, short lists in one line."""
    yaml = package()
    return str(yaml.safe_dump(document, sort_keys=False, default_flow_style=None, allow_unicode=True, width=116))
