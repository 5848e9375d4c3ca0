"""Make the JSON Schemas of the documents that commands print, from the types that they are made of.

`python -m tests.cli.schemas` writes loratools/cli/schemas/COMMAND.json; tests/cli/test_schemas.py says where one is not
what it would write, and holds real documents against them. A dataclass is an object of all its fields and no others; a
float may be null, for NaN and infinity are.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from loratools.cli._run import group
from loratools.cli._show import SCHEMA
from tests.make import REPOSITORY

FOLDER = REPOSITORY / "loratools" / "cli" / "schemas"
Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": ["number", "null"]}
COUNT: Schema = {"type": "integer"}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {}


def listed(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def mapped(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def record(properties: Mapping[str, Schema], optional: Iterable[str] = (), about: str = "") -> Schema:
    """Return an object with these properties and no others."""
    required = sorted(properties.keys() - set(optional))
    told = {"description": about} if about else {}
    return told | {
        "type": "object", "properties": dict(properties), "required": required, "additionalProperties": False,
    }  # fmt: skip


class Types:
    """Schemas of annotations; those of dataclasses and named tuples are definitions, one for each."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def of(self, annotation: Any) -> Schema:
        """Return the schema of the value that `plain` makes of a value of this type."""
        origin, arguments = get_origin(annotation), get_args(annotation)
        if annotation is None or annotation is type(None):
            return {"type": "null"}
        if origin in (Union, types.UnionType):
            return {"anyOf": [self.of(each) for each in arguments]}
        if origin is Literal:
            return {"enum": list(arguments)}
        if annotation is Any or annotation is object:
            return ANY
        if annotation in (bool, int, float, str):
            return {bool: FLAG, int: COUNT, float: NUMBER, str: TEXT}[annotation]
        if isinstance(annotation, type) and names_of(annotation):
            return self.record(annotation)
        kind = origin or annotation
        if isinstance(kind, type) and issubclass(kind, Mapping):
            return mapped(self.of(arguments[1]) if arguments else ANY)
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            items = [self.of(each) for each in arguments]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        if isinstance(kind, type) and not issubclass(kind, str) and issubclass(kind, Sequence | AbstractSet):
            return listed(self.of(arguments[0]) if arguments else ANY)
        return TEXT  # paths, dtypes and whatever else is printed as its text

    def fields(self, made: type) -> dict[str, Schema]:
        """Return the properties of a dataclass or a named tuple."""
        hints = hints_of(made)
        return {name: self.of(hints[name]) for name in names_of(made)}

    def record(self, made: type) -> Schema:
        """Return a reference to the definition of a dataclass or a named tuple."""
        name = made.__name__
        if name not in self.definitions:
            self.definitions[name] = {}  # for one that holds itself
            about = " ".join((inspect.getdoc(made) or "").partition("\n\n")[0].split())
            self.definitions[name] = record(self.fields(made), about=about)
        return {"$ref": f"#/$defs/{name}"}


def names_of(made: type) -> tuple[str, ...]:
    """Return the names of the fields of a dataclass or a named tuple; () for any other type."""
    if dataclasses.is_dataclass(made):
        return tuple(field.name for field in dataclasses.fields(made))
    return getattr(made, "_fields", ()) if issubclass(made, tuple) else ()


def hints_of(made: type) -> dict[str, Any]:
    """Return the types of the fields, also where a module imports a name for type checkers alone."""
    known: dict[str, Any] = {}
    for _ in range(50):
        try:
            return get_type_hints(made, localns=known)
        except NameError as error:
            known[error.name] = imported(made.__module__, error.name)
    raise AssertionError(made)


def imported(module: str, name: str) -> Any:
    """Return what a module imports under a name, for type checkers alone."""
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return getattr(import_module(node.module), alias.name)
    raise NameError(name)


def load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"loratools.{module}"), name)


DRY = {"dry_run": {"const": True}}


def variants(command: str, types_of: Types) -> list[dict[str, Schema]]:
    """Return the properties of each document that a command can print when all is well."""
    fields = lambda place: types_of.fields(load(place))  # noqa: E731
    of = lambda place: types_of.of(load(place))  # noqa: E731
    planned = fields("surgery.inputs.planning:Planned") | DRY
    match command:
        case "combine" | "resize":
            return [fields("surgery.combine:Combination"), planned]
        case "compare":
            comparison = fields("surgery.compare:Comparison")
            module = load("surgery.compare:ModuleComparison")
            overlaps = {"input_overlap": NUMBER, "output_overlap": NUMBER}
            pairs = fields("surgery.find:Pairs")
            return [comparison | {"modules": listed(record(types_of.fields(module) | overlaps))}, pairs]
        case "completion":
            return [{"shell": TEXT, "script": TEXT}]
        case "convert":
            return [fields("surgery.convert:Conversion"), planned]
        case "demo":
            stop = {"type": "object", "properties": {"title": TEXT}, "required": ["title"]}
            return [{"seconds": NUMBER, "stops": listed(stop)}]
        case "dequantize":
            return [fields("surgery.dequantize:DequantizeReport"), fields("surgery.merge.parts:PartReport"), planned]
        case "dialects":
            return [{"dialects": listed(of("dialects:DialectSummary"))}]
        case "edit":
            return [fields("surgery.edit:Edit")]
        case "estimate":
            return [fields("live.cost:Estimate")]
        case "extract-svd":
            made = fields("surgery.extract:Extraction")
            del made["outcomes"]
            tensor = {
                "name": TEXT, "base": nullable(TEXT), "path": TEXT, "class": TEXT, "why": TEXT, "kind": TEXT,
                "dtype": TEXT, "shape": listed(COUNT), "change_norm": NUMBER, "changed_rows": nullable(COUNT),
            }  # fmt: skip
            layer = types_of.fields(load("surgery.extract.layers:Layer")) | {"change": NUMBER}
            pair = of("surgery.extract.pairs:Pair")
            dry = {"base": TEXT, "tuned": TEXT, "missing": listed(TEXT), "notes": listed(TEXT), "tensors": listed(pair)}
            part = fields("surgery.sharing.parts:Written")
            return [made | {"tensors": listed(record(tensor)), "layers": listed(record(layer))}, part, DRY | dry]
        case "find":
            return [fields("surgery.find:Findings")]
        case "hash":
            tiers = {"schema": TEXT, "root": nullable(TEXT), "logical": nullable(TEXT), "tensors": mapped(TEXT)}
            found = {"path": TEXT, "type": {"enum": ["adapter", "checkpoint"]}, "algorithm": TEXT}
            return [found | {"hash": record(tiers, optional=tiers)}]
        case "help":
            return [{"topics": mapped(TEXT)}, {"topic": TEXT, "text": TEXT}]
        case "inspect":
            adapter = fields("surgery.inspect:AdapterSummary")
            adapter |= {"metadata": adapter.pop("entries")}
            measured = {"spectrum": of("surgery.spectrum:AdapterSpectrum")}
            model = fields("surgery.inspect:CheckpointSummary")
            short = {name: value for name, value in adapter.items() if name != "metadata"}
            model |= {"schema_hash": model.pop("schema"), "metadata": model.pop("entries")}
            bare = {name: value for name, value in model.items() if name != "metadata"}
            return [short, adapter, short | measured, bare, model]
        case "gather":
            others = [variants(name, types_of)[0] for name in ("extract-svd", "dequantize")]
            return [fields("surgery.merge.run:MergeReport"), *others]
        case "merge":
            merged, pushed = fields("surgery.merge.run:MergeReport"), {"pushed": of("hub.upload:Committed")}
            proof = {"verification": of("surgery.verify:Verification")}
            sent = merged | pushed | {"output": nullable(TEXT)}
            part = fields("surgery.merge.parts:PartReport")
            return [
                merged,
                merged | proof,
                sent,
                sent | proof,
                part,
                planned_merge(of("surgery.merge.prepare:Account")),
            ]
        case "pull":
            asked = {
                "repo": TEXT, "revision": nullable(TEXT), "commit": TEXT, "type": TEXT, "files": mapped(COUNT),
                "bytes": COUNT,
            }  # fmt: skip
            done = fields("hub.pull:Pulled") | {"dry_run": {"const": False}}
            return [DRY | asked, done | asked]
        case "push":
            asked = {
                "path": TEXT, "type": TEXT, "repo": TEXT, "revision": nullable(TEXT), "creates_repo": FLAG,
                "parent": nullable(TEXT), "send": mapped(COUNT), "bytes": COUNT, "already_there": listed(TEXT),
                "remove": listed(TEXT),
            }  # fmt: skip
            return [DRY | asked, asked | fields("hub.upload:Committed") | {"dry_run": {"const": False}}]
        case "recipe":
            return [{"output": TEXT, "command": TEXT, "tool": TEXT, "recipe": {"type": "object"}}]
        case "run":
            report, step = fields("recipe.run:RecipeReport"), fields("recipe.run:StepReport")
            del step["lines"]
            error = record({"type": TEXT, "message": TEXT, "problems": listed(TEXT), "hint": nullable(TEXT)})
            result = nullable({"type": "object", "description": "The document of the command, as its own schema says."})
            types_of.definitions.pop("StepReport", None)
            return [report | {"steps": listed(record(step | {"result": result, "error": nullable(error)}))}]
        case "report":
            return [fields("reports:ReportPage")]
        case "switch":
            return [fields("surgery.switch:SwitchReport"), planned]
        case "unmerge":
            return [fields("surgery.unmerge:UnmergeReport"), planned]
        case "validate":
            base = record({"path": TEXT, "differences": nullable(listed(TEXT))})
            problem = of("format.validate:Problem")
            return [
                {"path": TEXT, "valid": FLAG, "sealed": FLAG, "format_version": nullable(TEXT),
                 "problems": listed(problem),
                 "clauses": listed(TEXT), "base": nullable(base)}
            ]  # fmt: skip
        case "verify":
            return [fields("surgery.verify:Verification"), fields("surgery.extract.certify:Certification")]
        case _:
            raise AssertionError(f"tests/cli/schemas.py does not know what `loratools {command} --json` prints")


def planned_merge(account: Schema) -> dict[str, Schema]:
    """Return the properties of the plan of a merge."""
    file = record({"name": TEXT, "bytes": COUNT, "tensors": COUNT})
    change = {"adapter": COUNT, "module": TEXT, "kind": TEXT, "rank": nullable(COUNT), "scaling": NUMBER}
    return DRY | {
        "base": TEXT, "output": TEXT, "files": listed(file), "config": mapped(ANY), "dropped": listed(TEXT),
        "tensors": record({"total": COUNT, "changed": COUNT, "cast": COUNT}),
        "bytes": record({"written": COUNT, "changed": COUNT, "copied": COUNT}), "peak_memory": COUNT,
        "verified_tensors": COUNT, "changed": mapped(listed(record(change | {"weight": NUMBER}))),
        "notes": listed(TEXT), "other_files": COUNT, "left_behind": listed(TEXT), "free_disk": COUNT,
        "threads": COUNT, "consumed": listed(account),
    }  # fmt: skip


def takes_several(command: str) -> bool:
    """Tell whether a command takes several paths: its documents name theirs then."""
    found = group().get_command(click.Context(group()), command)
    return found is not None and found.each is not None


def takes_one_kind(command: str) -> bool:
    """Tell whether a command takes adapters alone, or models alone: it passes over the others in a folder."""
    found = group().get_command(click.Context(group()), command)
    return found is not None and found.each in ("adapter", "model")


def schema(command: str) -> Schema:
    """Return the JSON Schema of the documents of a command: its results, and an error."""
    made = Types()
    common = {"schema": {"const": SCHEMA}, "warnings": listed(TEXT)}
    several: dict[str, Schema] = {"path": TEXT} if takes_several(command) else {}
    results = [
        record(several | properties | common, optional=several.keys() - properties.keys())
        for properties in variants(command, made)
    ]
    error = record({"type": TEXT, "message": TEXT, "problems": listed(TEXT), "hint": nullable(TEXT)})
    about = "What failed; the exit code is not 0."
    failed = record(common | {"path": TEXT, "error": error}, optional=["path"], about=about)
    kinds = {"enum": ["adapter", "model"]}
    passed = record(common | {"path": TEXT, "passed_over": kinds}, about="What --each found, and is not of the kind.")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"loratools {command} --json",
        "anyOf": [*results, *([passed] if takes_one_kind(command) else []), failed],
        "$defs": dict(sorted(made.definitions.items())),
    }


def text(command: str) -> str:
    """Return the file of a command."""
    return json.dumps(schema(command), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write the file of every command, and remove those of commands that are gone."""
    FOLDER.mkdir(exist_ok=True)
    names = group().list_commands(click.Context(group()))
    for name in names:
        (FOLDER / f"{name}.json").write_text(text(name), encoding="utf-8")
    for path in FOLDER.iterdir():
        if path.stem not in names:
            Path.unlink(path)


if __name__ == "__main__":
    main()
