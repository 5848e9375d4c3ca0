"""The files beside a model's weights: which of them come along, and what we put there ourselves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratools.errors import IncompatibleAdapter
from loratools.storage.checkpoint import Checkpoint, is_weights
from loratools.storage.strict_json import read_json

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


def companions(base: Checkpoint, adapter_paths: Iterable[Path | None]) -> dict[str, Path]:
    """Return relative path -> source of every file that comes along: no weights, no hidden files, no cache.

    Raises `IncompatibleAdapter` when two adapters bring different tokenizer files.
    """
    of_base: dict[str, Path] = {}
    if base.path.is_dir() or base.indexes:
        for folder, subfolders, names in os.walk(base.root):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder) / name
                ours = name.startswith(".") or name in (RECORD, RESIDUAL)
                if not ours and path.is_file() and not is_weights(path):
                    of_base[str(path.relative_to(base.root))] = path
    of_adapters: dict[str, Path] = {}
    problems = []
    for adapter in adapter_paths:
        for path in sorted(adapter.iterdir()) if adapter is not None and adapter.is_dir() else ():
            if path.name in TOKENIZER_FILES and path.is_file():
                other = of_adapters.get(path.name, path)
                if other != path and other.read_bytes() != path.read_bytes():
                    problems.append(f"{path.name}: {other} and {path} differ")
                of_adapters[path.name] = path
    if problems:
        raise IncompatibleAdapter("the adapters bring different tokenizers; merge them one at a time", problems)
    return of_base | of_adapters


def own_config(adapter: Path | None) -> dict[str, Any] | None:
    """Return the config.json that an adapter's folder brings, if it brings one."""
    path = adapter and adapter / "config.json"
    return read_json(path) if path and path.is_file() else None


def copy_companions(sources: Mapping[str, Path], folder: Path, texts: Mapping[str, str | None]) -> None:
    """Copy files into `folder` under their relative paths; one with a text in `texts` gets that, or None: is left out.

    A name that is in `texts` alone is written too.
    """
    for name in dict.fromkeys([*sources, *texts]):
        target, text = folder / name, texts.get(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            target.write_text(text, encoding="utf-8")
        elif name not in texts:
            shutil.copyfile(sources[name], target)


def json_text(document: Mapping[str, Any]) -> str:
    """Return a JSON document as the files beside a model have it: indented, readable, with a final newline."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
