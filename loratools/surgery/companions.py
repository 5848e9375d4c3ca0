"""The files beside the weights: tokenizer, config, card, index. They come along with a merged model."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.errors import IncompatibleAdapter
from loratools.storage.checkpoint import Checkpoint, is_weights, read_json
from loratools.storage.writer import index_json
from loratools.surgery.plan import MergePlan

RECORD = "loratools.json"
"""What was done, beside the shards of a model that loratools wrote."""

RESIDUAL = "unmerge.residual"
"""What rounding destroyed; not a name that a loader would take for weights."""

# An adapter that was trained with its own tokenizer or chat template brings them; they win over the base's.
TOKENIZER_FILES = frozenset({
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "spiece.model",
    "sentencepiece.bpe.model",
})  # fmt: skip

_SECTION = re.compile(r"\n*<!-- loratools merge -->.*?<!-- /loratools merge -->\n*", re.DOTALL)


def companions(base: Checkpoint, adapter_folders: Iterable[Path | None]) -> dict[str, Path]:
    """Return relative path -> source of every file that comes along: no weights, no hidden files, no cache.

    Raises `IncompatibleAdapter` when two adapters bring different tokenizer files.
    """
    found: dict[str, Path] = {}
    if base.path.is_dir() or base.indexes:
        for folder, subfolders, names in os.walk(base.root):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder) / name
                if (
                    not name.startswith(".")
                    and name not in (RECORD, RESIDUAL)
                    and path.is_file()
                    and not is_weights(path)
                ):
                    found[str(path.relative_to(base.root))] = path
    own: dict[str, Path] = {}
    problems = []
    for folder_of_adapter in adapter_folders:
        if folder_of_adapter is None or not folder_of_adapter.is_dir():
            continue
        for path in sorted(folder_of_adapter.iterdir()):
            if path.name not in TOKENIZER_FILES or not path.is_file():
                continue
            if path.name in own and own[path.name].read_bytes() != path.read_bytes():
                problems.append(f"{path.name}: {own[path.name]} and {path} differ")
            own[path.name] = path
    if problems:
        raise IncompatibleAdapter("the adapters bring different tokenizers; merge them one at a time", problems)
    return found | own


def own_config(folder: Path | None) -> dict[str, Any] | None:
    """Return the config.json that an adapter's folder brings, if it brings one."""
    path = folder / "config.json" if folder is not None and folder.is_dir() else None
    return read_json(path) if path is not None and path.is_file() else None


def write_companions(plan: MergePlan, sources: Mapping[str, Path], record: Mapping[str, Any], folder: Path) -> None:
    """Write everything beside the weights into `folder`; the index comes last."""
    for name, source in sources.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json" and plan.config:
            config = {**read_json(source), **plan.config}
            target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif name == "README.md":
            target.write_text(card(source.read_text(encoding="utf-8", errors="replace"), record), encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    if "README.md" not in sources and sources:
        (folder / "README.md").write_text(card("", record), encoding="utf-8")
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_indexes(plan, folder)


def write_indexes(plan: MergePlan, folder: Path) -> None:
    """Write the index of every sharded part; a model in one file has none."""
    if plan.laid_out:
        for path, index in plan.base.indexes.items():
            parent = path.relative_to(plan.base.root).parent
            part = [file for file in plan.files if Path(file.name).parent == parent]
            prefix = next((s.prefix for s in plan.base.shards if s.path.parent == path.parent), "")
            found = index_json(part, index.get("metadata") if isinstance(index.get("metadata"), dict) else None)
            weight_map = {slot.name.removeprefix(prefix): Path(file.name).name for file in part for slot in file.slots}
            _dump(folder / parent / path.name, {**found, "weight_map": dict(sorted(weight_map.items()))})
    elif len(plan.files) > 1:
        _dump(folder / "model.safetensors.index.json", index_json(plan.files))


def _dump(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def card(text: str, record: Mapping[str, Any]) -> str:
    """Return a model card with a section on this merge; a person's own text stays as it is."""
    adapters: Sequence[Mapping[str, Any]] = record["adapters"]
    rows = "\n".join(
        f"| {adapter.get('id') or 'adapter'} | {adapter['kinds']} | {adapter['ranks']} | {adapter['weight']:g} "
        f"| `{adapter['digest']}` |"
        for adapter in adapters
    )
    base = record["base"]
    section = (
        "<!-- loratools merge -->\n## How this model was made\n\n"
        f"Merged with {record['tool']} from the base model {base.get('id') or 'named below by its hash'} "
        f"(schema hash `{base['schema']}`):\n\n"
        "| adapter | kind | rank | weight | digest |\n|---|---|---|---|---|\n"
        f"{rows}\n\nW' = W + Σ weight·scaling·B·A in float32, rounded once. The whole record: `{RECORD}`.\n"
        "<!-- /loratools merge -->\n"
    )
    body = _SECTION.sub("\n", text).rstrip("\n")
    if not body:
        identity = base.get("id")
        named = f"base_model: {json.dumps(identity)}\nbase_model_relation: merge\n" if identity else ""
        body = f"---\n{named}library_name: transformers\ntags: [loratools, merge]\n---"
    return f"{body}\n\n{section}"


def without_section(text: str, record: Mapping[str, Any]) -> str:
    """Return a model card as it was before a merge: without its section; empty if the merge wrote all of it."""
    return "" if text == card("", record) else _SECTION.sub("\n", text).strip("\n") + "\n"
