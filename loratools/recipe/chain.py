"""From the account of an output to the recipe that makes it again, with the steps that made its inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.errors import LoraToolsError
from loratools.format import record
from loratools.recipe import account, identity, mergekit, text
from loratools.recipe.catalog import Catalog
from loratools.storage import digest
from loratools.storage.beside.making import FIELD
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.hash import hash_tensors

MOST_STEPS = 500
"""Steps of the recipe of one output; a record of a stranger could name more than anyone would read."""


@dataclass(frozen=True, slots=True)
class RecipeOf:
    """The recipe of an output: as data, and as the YAML that `loratools run` reads. `command` made the output itself.

    `unknown` are options of the record that this loratools has not, so that they are left out; `notes` are comments.
    """

    output: str
    command: str
    tool: str
    recipe: Mapping[str, Any]
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def yaml(self) -> str:
        """The recipe as YAML."""
        return "".join(f"# {note}\n" for note in self.notes) + text.dump(self.recipe)


def recipe_of(output: Path, catalog: Catalog, *, last: bool = False) -> RecipeOf:
    """Return the recipe that the record of an output tells, with all steps before it, or the `last` step alone.

    Raises `LoraToolsError` where the output has no record of how it was made.
    """
    if output.suffix in (".yaml", ".yml"):
        return _of_mergekit(output)
    made = account.of(output)
    if made is None:
        output_there = output.exists()
        raise LoraToolsError(
            f"{output}: {'no record in it says how it was made' if output_there else 'no such file or folder'}",
            hint="Outputs of merge, combine, convert, resize, extract-svd, switch and dequantize have one.",
        )
    chain = _Chain(catalog, last)
    name = chain.step(made, {"output": output.name}, _base_of(output, made))
    own = chain.steps[name]
    if own_digest := identity.tensors_of(output):
        own["digest"] = own_digest
    own["files"] = identity.files_of(output)
    document = {"loratools": 1, "inputs": chain.inputs, "steps": chain.steps}
    return RecipeOf(str(output), str(made["command"]), str(made.get("tool")), document, tuple(chain.unknown))


def _of_mergekit(path: Path) -> RecipeOf:
    """Return the recipe that a configuration of mergekit is."""
    table, _ = text.read(path)
    if not mergekit.is_mergekit(table):
        raise LoraToolsError(f"{path}: it is a recipe already, and no output", hint="`loratools run` runs it.")
    document, notes = mergekit.translated(table, path)
    return RecipeOf(str(path), "combine", record.TOOL, {"loratools": 1, **document}, notes=notes)


def _base_of(output: Path, made: Mapping[str, Any]) -> str | None:
    """Return the root hash of the base of a merge: its record has the tensors that changed, the output all others.

    None where the output has the tensors of the base under other names, shapes or dtypes, or is no merge.
    """
    base = made["inputs"].get("base")
    if made["command"] != "merge" or not isinstance(base, dict) or "schema" not in base:
        return None
    model = Checkpoint.open(output)
    stated = record.base_of(record.read(model))
    if stated.root:
        return stated.root
    if model.schema() != base["schema"] or not stated.tensors.keys() <= model.specs.keys():
        return None
    rest = {name: spec for name, spec in model.specs.items() if name not in stated.tensors}
    try:
        return digest.root({**stated.tensors, **hash_tensors(rest, digest.DEFAULT)})
    except LoraToolsError:  # a person may have edited the record
        return None


@dataclass(slots=True)
class _Chain:
    """Collects inputs and steps; what is the same by its account is there once."""

    catalog: Catalog
    last: bool
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)

    def step(self, made: Mapping[str, Any], stated: Mapping[str, Any], base: str | None = None) -> str:
        """Add the step of an account, after those of its inputs; return its name.

        `stated` is what else the step says; `base` is the root hash of its base, where that is known.
        """
        if len(self.steps) >= MOST_STEPS:
            raise LoraToolsError(f"the record tells of more than {MOST_STEPS} steps; --last prints the last alone")
        command = str(made["command"])
        keys = self.catalog.get(command).keys if command in self.catalog.names() else {}
        values: dict[str, Any] = {"command": command}
        for name, entries in made["inputs"].items():
            listed = entries if isinstance(entries, list) else [entries]
            names = [self._input(name, entry, base if name == "base" else None) for entry in listed]
            values[name] = names if isinstance(entries, list) else names[0]
        for name, value in made["options"].items():
            if keys and name not in keys:
                self.unknown.append(f"{command}: {name}")
            else:
                values[name] = value
        chosen = self._free(command)
        form = {"output": f"{chosen}{made['suffix']}"} if "suffix" in made else {}
        self.steps[chosen] = {**values, **form, **stated}
        return chosen

    def _input(self, role: str, entry: Mapping[str, Any], root: str | None) -> str:
        """Return the name of an input, or of the step that makes it."""
        before = entry.get(FIELD)
        as_step = before is not None and not self.last
        identity_of = {key: entry[key] for key in ("digest", "schema", "content", "hub", "commit") if key in entry}
        key = json.dumps([identity_of, before if as_step else None], sort_keys=True)
        if key not in self.known:
            if as_step and before is not None:
                stated = {"digest": entry["digest"]} if "digest" in entry else {}
                self.known[key] = self.step(before, stated)
            else:
                self.known[key] = self._free(role.removesuffix("s"))
                self.inputs[self.known[key]] = _source(entry, root)
        return self.known[key]

    def _free(self, wanted: str) -> str:
        """Return a name that neither an input nor a step has."""
        taken = {*self.inputs, *self.steps}
        numbers = iter(range(2, MOST_STEPS * 100))
        name = wanted
        while name in taken:
            name = f"{wanted}-{next(numbers)}"
        return name


def _source(entry: Mapping[str, Any], root: str | None) -> dict[str, Any]:
    """Return what a recipe says of an input: where on the Hub it lies, and by which digest it is known."""
    source: dict[str, Any] = {}
    if "hub" in entry:
        source["path"] = f"hf://{entry['hub']}" + (f"@{entry['commit']}" if "commit" in entry else "")
    if root or "digest" in entry:
        source["digest"] = root or entry["digest"]
    elif "schema" in entry:
        source["schema"] = entry["schema"]
    if "content" in entry:
        source["content"] = entry["content"]
    return source
