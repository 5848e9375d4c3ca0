"""Judge what lies beside the tensors of a merged model: is it what base and adapters have, and what a merge changes?

A value that differs where both have one, code that is new, and a tokenizer or a template that is neither the base's nor
an adapter's decide: with them the model is another. What is only missing, or only added where other versions of a
library write their defaults, is told and decides nothing. config.json is held against the tensors themselves: the dtype
against theirs, and a tied head against the names that are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from loratools.adapter.placement.shared import EMBEDDINGS, main_tensor
from loratools.engine.plan import MergePlan
from loratools.errors import BadFile
from loratools.storage import dtypes
from loratools.storage.beside import along, templates
from loratools.storage.beside.links import refuse_outside, walk
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.codecs.state import BESIDE, KEYS
from loratools.storage.codecs.state import beside as beside_config
from loratools.storage.companions import RECORD, RESIDUAL, tokenizer_files
from loratools.storage.sources import open_file
from loratools.storage.strict_json import read_json

_CODE = frozenset({".py", ".pyi", ".pyc", ".so", ".pyd", ".dll", ".dylib", ".sh", ".c", ".cpp", ".cu", ".cuh", ".h"})
_UNNEEDED = along.SHOWN | {".md", ".rst", ".html", ".bib", ".cff", ".csv", ".tsv", ".ipynb"}
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Fields that say where a file comes from, and not what the model does.
_OF_ORIGIN = frozenset({
    "transformers_version", "_diffusers_version", "_name_or_path", "name_or_path", "_commit_hash", "tokenizer_file",
    "_from_model_config", "special_tokens_map_file", "peft_version",
})  # fmt: skip
# Fields that lead a loader elsewhere: to code, to other weights, to codes in place of numbers. These decide when added.
_LEADING = frozenset({"auto_map", "custom_pipelines", "transformers_weights", "quantization_config"})
_TIE = "tie_word_embeddings"
_SHOWN = 60  # characters of a value
_MOST = 50  # differences of one file


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing beside the tensors that is not as base and adapters have it.

    `file` is a path in the model's folder, `field` one of a JSON file. `decides` tells whether the model is another by
    it; what does not decide is told all the same.
    """

    file: str
    field: str | None
    what: str
    decides: bool

    def __str__(self) -> str:
        text = f"{self.file}: {f'{self.field} ' if self.field else ''}{self.what}"
        return text.replace("\n", "\\n")  # names and values of strangers: no line of its own


@dataclass(frozen=True, slots=True)
class Beside:
    """What was found beside the tensors: differences, the files that are as they should be, what was not looked at."""

    differences: tuple[Difference, ...] = ()
    agreeing: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()


def judge(model: Checkpoint, plan: MergePlan, adapters: Sequence[Path | None]) -> Beside:
    """Compare all files of a merged model that loaders read with those of the base of `plan` and of the `adapters`."""
    stored = plan.base.stored or plan.base
    bare = [side.path for side in (model, stored) if not _has_folder(side)]
    if bare:
        return Beside(unchecked=(f"what lies beside the tensors: {bare[0]} is a file, and no folder",))
    ours, of_base = _files(model), _files(stored)
    folders = [path for path in adapters if path is not None and path.is_dir()]
    of_adapters = [{path.name: path for path in tokenizer_files(folder)} for folder in folders]
    differences = [*_templates(model, stored, folders)]
    agreeing, unneeded = [], []
    for name in sorted(ours.keys() | of_base.keys()):
        path, own = ours.get(name), [files[name] for files in of_adapters if name in files]
        if path is None:
            goes = name == BESIDE and "quantization_config" in plan.dropped
            if not _is_unneeded(name) and not templates.is_template(name) and not goes:
                differences.append(Difference(name, None, "is missing; the base has it", False))
        elif name in _ADAPTER:
            differences.append(Difference(name, None, "is an adapter's: loaders would apply it once more", True))
        elif _is_unneeded(name):
            unneeded.append(name)
        elif not templates.is_template(name):
            found = [*_of_file(name, path, of_base.get(name), own, model, plan)]
            differences += found
            agreeing += [] if found else [name]
    return Beside(tuple(differences), tuple(agreeing), tuple(_unchecked(model, adapters, unneeded)))


def _has_folder(model: Checkpoint) -> bool:
    return model.path.is_dir() or bool(model.indexes)


def _files(model: Checkpoint) -> dict[str, Path]:
    """Return what lies beside the weights, by relative path: not what may be weights, nor a record of ours.

    Raises `BadFile` for links that lead out of the model's folder.
    """
    read = {shard.path for shard in model.shards} | set(model.indexes)
    files = {path.relative_to(model.root).as_posix(): path for path in walk(model.root) if path not in read}
    kept = {
        name: path
        for name, path in files.items()
        if name not in (RECORD, RESIDUAL) and (along.may_come(name) or name in _ADAPTER or _is_code(name))
    }
    refuse_outside(kept.values(), model.root)
    return kept


def _is_code(name: str) -> bool:
    return PurePath(name).suffix.lower() in _CODE


def _is_unneeded(name: str) -> bool:
    """Tell whether no loader reads a file: model cards, licences, pictures."""
    path = PurePath(name)
    return path.suffix.lower() in _UNNEEDED or along.is_legal(path.name) or path.name.lower().startswith("readme")


def _unchecked(model: Checkpoint, adapters: Sequence[Path | None], unneeded: Sequence[str]) -> Iterator[str]:
    if unread := model.unread():
        yield f"files that may be weights: {_listed(unread)}"
    own = [name for name in (RECORD, RESIDUAL) if (model.root / name).exists()]
    yield f"what the model says of its own making: {_listed(['metadata in the headers of its weights', *own])}"
    if unneeded:
        yield f"files that no loader needs: {_listed(unneeded)}"
    if None in adapters:
        yield "tokenizers and templates of adapters that came without their folder"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _templates(model: Checkpoint, base: Checkpoint, adapters: Sequence[Path]) -> Iterator[Difference]:
    """Compare chat templates as tokenizers read them, in whichever form: an adapter's wins over the base's."""
    found, of_base = templates.read(model.root), templates.read(base.root)
    wanted = next((own for folder in adapters if (own := templates.read(folder))), of_base)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) == wanted.get(name):
            continue
        what = f"({name}) is neither the base's nor an adapter's"
        if name not in found:
            what = f"({name}) is missing"
        elif found[name] == of_base.get(name):
            what = f"({name}) is the base's; the adapter brings its own"
        yield Difference("chat template", None, what, "neither" in what)


def _of_file(
    name: str, path: Path, of_base: Path | None, of_adapters: Sequence[Path], model: Checkpoint, plan: MergePlan
) -> Iterator[Difference]:
    """Compare one file with the base's and the adapters' of the same name."""
    if name == "config.json" and of_base is not None:
        yield from _config(model, plan)
        return
    if name == BESIDE and of_base is not None and (document := _json(of_base)) is not None:
        expected = beside_config(document, plan.config, plan.dropped)
        yield from _fields(name, _json(path) or {}, expected or {}, ())
        return
    wanted = [*of_adapters, *([of_base] if of_base else [])]
    if not wanted:
        what = "is code that the base has not" if _is_code(name) else "is in neither the base nor an adapter"
        yield Difference(name, None, what, _is_code(name))
    elif _same(path, wanted[0]):
        return
    elif any(_same(path, other) for other in wanted):
        yield Difference(name, None, "is the base's; the adapter brings its own", False)
    else:
        pairs = [(_json(path), _json(other)) for other in wanted] if name.endswith(".json") else []
        skipped = ("chat_template", *(KEYS if name.removesuffix("/config.json") in model.components else ()))
        fields = [
            _fields(name, found, other, skipped) for found, other in pairs if found is not None and other is not None
        ]
        if not fields:
            whose = "neither the base's nor an adapter's" if of_adapters else "not the base's"
            yield Difference(name, None, f"is {whose}", True)
        else:
            yield from min((list(each) for each in fields), key=len)


def _same(first: Path, second: Path) -> bool:
    """Tell whether two files have the same bytes, however long they are."""
    if first.stat().st_size != second.stat().st_size:
        return False
    with open_file(first) as one, open_file(second) as other:
        while block := one.read(1 << 20):
            if block != other.read(1 << 20):
                return False
    return True


def _json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object; None for what is none, which is then compared as it is."""
    try:
        return read_json(path)
    except BadFile:
        return None


def _fields(
    name: str, found: Mapping[str, Any], wanted: Mapping[str, Any], skipped: Collection[str] = ("chat_template",)
) -> Iterator[Difference]:
    """Yield the fields that differ between two JSON objects, as far as `skipped` does not name them."""
    keys = [key for key in sorted(found.keys() | wanted.keys()) if key not in skipped]
    differing = [key for key in keys if key not in found or key not in wanted or found[key] != wanted[key]]
    differing.sort(key=lambda key: not (key in found and key in wanted))
    for key in differing[:_MOST]:
        segments = set(key.split("."))
        if key not in found:
            yield Difference(name, key, f"is missing, should be {_shown(wanted[key])}", False)
        elif key not in wanted:
            yield Difference(name, key, f"is {_shown(found[key])}, and is new", bool(segments & _LEADING))
        else:
            what = f"is {_shown(found[key])}, should be {_shown(wanted[key])}"
            yield Difference(name, key, what, not segments & _OF_ORIGIN)
    if len(differing) > _MOST:
        yield Difference(name, None, f"differs in {len(differing) - _MOST} more fields", False)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _config(model: Checkpoint, plan: MergePlan) -> Iterator[Difference]:
    """Compare config.json with the base's, as the merge should have changed it."""
    base = plan.base.stored or plan.base
    expected = {key: value for key, value in {**base.config, **plan.config}.items() if key not in plan.dropped}
    found, wanted = _flat(model.config), _flat(expected)
    dtype = _dtype(model, plan)
    for key in [key for key in wanted if key.rpartition(".")[2] == "dtype"]:
        if dtype and (key == "dtype" or found.get(key) == dtype):
            wanted[key] = dtype
    yield from _fields("config.json", found, wanted, ())
    for key in found.keys() - wanted.keys():
        if key.rpartition(".")[2] == _TIE and found[key] is False and _is_headless(model):
            yield Difference("config.json", key, "is new and false, and no head is among the tensors", True)


def _is_headless(model: Checkpoint) -> bool:
    """Tell whether no other tensor could be the head of the embedding, whatever its name: none has its shape."""
    shapes = {name: shape for name, shape in model.shapes.items() if not re.search(r"\.\d+\.", name)}
    embedding = main_tensor(shapes, EMBEDDINGS)
    return embedding is not None and list(shapes.values()).count(shapes[embedding]) == 1


def _dtype(model: Checkpoint, plan: MergePlan) -> str | None:
    """Return how config.json spells the dtype of most numbers, where the tensors have other dtypes than the base's."""
    specs = {name: spec for name, spec in model.specs.items() if spec.dtype in dtypes.FLOATS}
    if all(
        name not in plan.base.specs or plan.base.specs[name].plain_dtype == spec.plain_dtype
        for name, spec in specs.items()
    ):
        return None
    sizes: dict[str, int] = {}
    for spec in specs.values():
        sizes[spec.plain_dtype] = sizes.get(spec.plain_dtype, 0) + spec.parameters
    return dtypes.CONFIG_NAMES[max(sizes, key=lambda dtype: sizes[dtype])]


def _flat(document: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return path.to.field -> value of nested objects; `torch_dtype` is the older name of `dtype`."""
    fields: dict[str, Any] = {}
    for key, value in document.items():
        path = above + ("dtype" if key == "torch_dtype" else key)
        if isinstance(value, Mapping) and value:
            fields |= _flat(value, f"{path}.")
        else:
            fields.setdefault(path, value)
    return fields
