"""Chat templates, in every form in which tokenizers keep them, read as transformers reads them.

In the order in which they win: `chat_template.jinja` with the named ones in `additional_chat_templates/`; then those in
tokenizer_config.json, one or a list; then `chat_template.json`, which processors read and tokenizers do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from loratools.errors import BadFile
from loratools.storage.beside.links import refuse_outside
from loratools.storage.strict_json import read_json

FILE, OF_PROCESSORS, CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
_FOLDERS = ("additional_chat_templates", "chat_templates")
MAX_TEMPLATE = 1_000_000
"""Bytes of a chat template; the longest have some ten thousand."""

_NAME = re.compile(r"[\w.-]{1,100}")


def is_template(path: str) -> bool:
    """Tell whether a file, by its path relative to a model's folder, is a chat template and nothing else."""
    parts = PurePath(path).parts
    return path in (FILE, OF_PROCESSORS) or (len(parts) == 2 and parts[0] in _FOLDERS and path.endswith(".jinja"))


def read(folder: Path) -> dict[str, str]:
    """Return name -> template of a tokenizer's folder; {} where it has none. The main one is called `default`.

    Raises `BadFile` for a template that is no text, a name that is no file name, and links that lead elsewhere.
    """
    files = {"default": folder / FILE} if (folder / FILE).is_file() else {}
    for path in sorted(path for name in _FOLDERS for path in (folder / name).glob("*.jinja")):
        files.setdefault(path.name.removesuffix(".jinja"), path)
    refuse_outside(files.values(), folder)
    templates = {name: _text(path) for name, path in files.items()}
    return templates or inline(folder / CONFIG) or inline(folder / OF_PROCESSORS)


def inline(path: Path) -> dict[str, str]:
    """Return the templates inside a JSON file: one text, or a list of them with names; {} where there is none."""
    if not path.is_file():
        return {}
    refuse_outside([path], path.parent)
    stored: Any = read_json(path).get("chat_template")
    if isinstance(stored, str):
        return {"default": stored}
    entries = stored if isinstance(stored, list) else []
    return {
        each["name"]: each["template"]
        for each in entries
        if isinstance(each, Mapping) and isinstance(each.get("name"), str) and isinstance(each.get("template"), str)
    }


def files_of(templates: Mapping[str, str]) -> dict[str, str]:
    """Return the files that hold these templates where both tokenizers and processors find them: path -> text."""
    if bad := [name for name in templates if not _NAME.fullmatch(name) or name.startswith(".")]:
        raise BadFile(f"{', '.join(map(repr, bad))}: no name that a chat template can have")
    return {FILE if name == "default" else f"{_FOLDERS[0]}/{name}.jinja": text for name, text in templates.items()}


def _text(path: Path) -> str:
    if (size := path.stat().st_size) > MAX_TEMPLATE:
        raise BadFile(f"{path}: {size} bytes; a chat template of at most {MAX_TEMPLATE} is read")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise BadFile(f"{path}: a chat template that is no UTF-8 text") from None
