"""From the YAML of a recipe to its value: every problem at once, with its line and the nearest name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from loratools.errors import InvalidOption, counted
from loratools.recipe import mergekit, text
from loratools.recipe.catalog import Catalog, Command, Key, nearest
from loratools.recipe.text import Items, Node, Scalar, Table
from loratools.recipe.value import Recipe, Source, Step, Value

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TOP = ("inputs", "steps", "loratools")
_SOURCE = ("path", "digest", "schema", "content")
_STEP = ("name", "command", "output", "digest", "files")
_DIGEST = re.compile(r"(blake3|sha256):[0-9a-f]{64}")
VERSION = "1"
"""Of the YAML; `loratools: 1` at its top says it."""


def read(path: Path, catalog: Catalog, *, outside: bool = False) -> Recipe:
    """Return the recipe in a file of YAML, ours or mergekit's; raise `InvalidOption` with every problem.

    `outside` allows outputs beyond the folder that outputs go to. `BadFile` is raised where it is no YAML, and
    `UnsupportedAdapter` for what mergekit does and loratools does not.
    """
    table, _ = text.read(path)
    notes: tuple[str, ...] = ()
    if mergekit.is_mergekit(table):
        document, notes = mergekit.translated(table, path)
        node = text.node_of(document)
        assert isinstance(node, Table)
        table = node
    return replace(parse(table, path, catalog, outside=outside), notes=notes)


def parse(table: Table, path: Path, catalog: Catalog, *, outside: bool = False) -> Recipe:
    """Do what `read` says with a mapping that was read."""
    parser = _Parser(catalog, outside)
    recipe = parser.recipe(table, path)
    if parser.problems:
        raise InvalidOption(f"{path}: {counted(len(parser.problems), 'problem')} in this recipe", parser.problems)
    return recipe


class _Parser:
    """Notes the `problems` while it reads."""

    def __init__(self, catalog: Catalog, outside: bool) -> None:
        self.catalog, self.outside, self.problems = catalog, outside, list[str]()

    def recipe(self, table: Table, path: Path) -> Recipe:
        """Return the recipe as far as it is sound."""
        self._unknown(table, _TOP, "a recipe")
        version = table.entries.get("loratools")
        if version is not None and self._text(version, "loratools") != VERSION:
            self._fault(
                version, f"a recipe of version {self._text(version, 'loratools')}; this loratools reads {VERSION}"
            )
        sources = self._sources(table.entries.get("inputs", Table()))
        if "steps" not in table.entries:
            self._fault(table, "no steps; a recipe has inputs and steps")
        steps = self._steps(table.entries.get("steps", Table()), sources)
        self._order(steps, sources)
        self._outputs(steps)
        return Recipe(path, sources, tuple(steps))

    def _sources(self, node: Node) -> dict[str, Source]:
        sources: dict[str, Source] = {}
        if not isinstance(node, Table):
            self._fault(node, "inputs: expected a mapping of names to paths")
            return sources
        for name, value in node.entries.items():
            self._name(name, value)
            if isinstance(value, Scalar) and value.kind != "null":
                sources[name] = Source(name, value.text)
            elif isinstance(value, Table):
                self._unknown(value, _SOURCE, f"the input {name}")
                stated = {
                    key: self._text(each, f"{name}.{key}") for key, each in value.entries.items() if key in _SOURCE
                }
                for key in ("digest", "schema", "content"):
                    self._digest(value, f"{name}.{key}", stated.get(key))
                sources[name] = Source(
                    name, stated.get("path"), stated.get("digest"), stated.get("schema"), stated.get("content")
                )
            else:
                self._fault(value, f"the input {name}: expected a path, or a mapping with path and digest")
        return sources

    def _steps(self, node: Node, sources: Mapping[str, Source]) -> list[Step]:
        listed: list[tuple[str, Table]] = []
        if isinstance(node, Table):
            listed = [(name, self._table(value, f"step {name}")) for name, value in node.entries.items()]
        elif isinstance(node, Items):
            for number, item in enumerate(node.items, 1):
                table = self._table(item, f"step {number}")
                called = table.entries.get("name") or table.entries.get("command")
                listed.append((self._text(called, "name") if called else f"step-{number}", table))
        else:
            self._fault(node, "steps: expected a mapping of names to steps, or a list of steps")
        if not listed:
            self._fault(node, "no steps")
        steps: dict[str, Step] = {}
        for name, table in listed:
            self._name(name, table)
            if name in sources:
                self._fault(table, f"step {name}: an input has this name")
            if name in steps:
                self._fault(table, f"step {name}: a second step of this name")
            elif step := self._step(name, table):
                steps[name] = step
        return list(steps.values())

    def _step(self, name: str, table: Table) -> Step | None:
        which = f"step {name}"
        asked = table.entries.get("command")
        if asked is None:
            self._fault(table, f"{which}: no command")
            return None
        command = self._command(which, self._text(asked, f"{which}: command"), asked)
        if command is None:
            return None
        values: dict[str, Value] = {}
        for written, node in table.entries.items():
            key = written.replace("_", "-")
            if written in _STEP and key not in command.keys:
                continue
            if key in command.keys:
                value = self._value(f"{which}: {written}", command.keys[key], node)
                if key in values:
                    self._fault(node, f"{which}: {key} a second time")
                elif value is not None:
                    values[key] = value
            elif key in command.refused:
                self._fault(node, f"{which}: {written}: {command.refused[key]}")
            else:
                like = nearest(key, [*command.keys, *_STEP])
                self._fault(node, f"{which}: {command.name} has no option {written!r}{like}")
        needed = [each.name for each in command.keys.values() if each.required and each.name not in values]
        for key in needed:
            self._fault(table, f"{which}: {command.name} needs {key}")
        stated = {key: self._text(table.entries[key], f"{which}: {key}") for key in _STEP if key in table.entries}
        for key in ("digest", "files"):
            self._digest(table, f"{which}: {key}", stated.get(key))
        output = stated.get("output", name) if command.writes else None
        if not command.writes and "output" in stated:
            self._fault(table, f"{which}: {command.name} writes nothing, so it has no output")
        return Step(name, command, values, output, stated.get("digest"), stated.get("files"), table.line)

    def _command(self, which: str, name: str, node: Node) -> Command | None:
        name = name.replace("_", "-")
        if name in self.catalog.names():
            return self.catalog.get(name)
        why = self.catalog.why_not(name)
        known = ", ".join(self.catalog.names())
        like = nearest(name, self.catalog.names()) or f"; a recipe runs {known}"
        self._fault(node, f"{which}: {why}" if why else f"{which}: no command {name!r}{like}")
        return None

    def _value(self, what: str, key: Key, node: Node) -> Value | None:
        if key.takes != "value":
            if not isinstance(node, Scalar) or node.kind != "bool":
                self._fault(node, f"{what}: expected true or false")
                return None
            return node.on
        items = node.items if isinstance(node, Items) and key.many else (node,)
        texts = []
        for item in items:
            if isinstance(item, Scalar) and item.kind != "null":
                texts.append(item.text)
            else:
                wanted = "a value, or a list of them" if key.many else "one value"
                self._fault(item, f"{what}: expected {wanted}; leave the key out for its default")
        return tuple(texts)

    def _order(self, steps: list[Step], sources: Mapping[str, Source]) -> None:
        """Note a step that takes the output of one that does not come before it."""
        place = {step.name: i for i, step in enumerate(steps) if step.name not in sources}
        takes = {step.name: [text for _, text in step.inputs() if text in place] for step in steps}
        for i, step in enumerate(steps):
            for key, used in step.inputs():
                if used not in place:
                    continue
                if not steps[place[used]].output:
                    self.problems.append(f"step {step.name}: {key}: {used} writes nothing that it could take")
                elif place[used] >= i:
                    circle = _circle(step.name, takes)
                    why = f"a circle: {' takes '.join(circle)}" if circle else "which comes after it; put it before"
                    self.problems.append(f"step {step.name}: {key}: it takes the output of {used}, {why}")

    def _outputs(self, steps: list[Step]) -> None:
        """Note outputs that are no place below the folder of outputs, or that lie in each other."""
        kept: dict[PurePosixPath, str] = {}
        for step in steps:
            if step.output is None:
                continue
            path = PurePosixPath(step.output)
            if not self.outside and (why := _not_below(step.output)):
                self.problems.append(
                    f"step {step.name}: output {step.output!r} {why}; outputs stay in the folder of the recipe unless "
                    "--allow-outside is given"
                )
            for other, name in kept.items():
                if path == other or path in other.parents or other in path.parents:
                    self.problems.append(
                        f"step {step.name}: its output {step.output} is, holds or lies in that of {name}"
                    )
            kept[path] = step.name

    def _table(self, node: Node, what: str) -> Table:
        if isinstance(node, Table):
            return node
        self._fault(node, f"{what}: expected a mapping with command and its options")
        return Table({"command": Scalar("", "null", node.line)}, node.line)

    def _text(self, node: Node, what: str) -> str:
        if isinstance(node, Scalar) and node.kind != "null":
            return node.text
        if not (isinstance(node, Scalar) and not node.text):
            self._fault(node, f"{what}: expected a text")
        return ""

    def _name(self, name: str, node: Node) -> None:
        if not _NAME.fullmatch(name):
            self._fault(node, f"{name!r:.120} is no name: letters, digits, dots, hyphens and underscores are")

    def _digest(self, node: Node, what: str, value: str | None) -> None:
        if value is not None and not _DIGEST.fullmatch(value):
            self._fault(node, f"{what}: {value!r:.100} is no digest, such as blake3: and 64 hex digits")

    def _unknown(self, table: Table, known: tuple[str, ...], what: str) -> None:
        for key, node in table.entries.items():
            if key not in known:
                like = nearest(key, known) or f"; it has {', '.join(known)}"
                self._fault(node, f"{what} has no key {key!r}{like}")

    def _fault(self, node: Node, problem: str) -> None:
        self.problems.append(f"line {node.line}: {problem}")


def _circle(start: str, takes: Mapping[str, list[str]]) -> list[str]:
    """Return the names on a way from a step back to itself, both ends included; [] where there is none."""
    ways, seen = [[start]], set[str]()
    while ways:
        way = ways.pop(0)
        for used in takes[way[-1]]:
            if used == start:
                return [*way, start]
            if used not in seen:
                seen.add(used)
                ways.append([*way, used])
    return []


def _not_below(output: str) -> str | None:
    """Return why a path does not lie below a folder under every system's rules, None where it does."""
    windows, parts = PureWindowsPath(output), re.split(r"[/\\]", output)
    if windows.drive or windows.root or output.startswith("~"):
        return "is no relative path"
    if ".." in parts or "" in parts or "." in parts:
        return "leads elsewhere" if ".." in parts else "is no plain path"
    return "is hidden" if any(part.startswith(".") for part in parts) else None
