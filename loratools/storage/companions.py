"""The files beside a model's weights: which of them come along, and what we put there ourselves."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
