"""What is written beside an output of a recipe: of what and by what it was made, and what it was when it was done.

`FOLDER/.loratools/NAME.json` beside `FOLDER/NAME`, digests only. A step is up to date if all of it still holds.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loratools.errors import BadFile
from loratools.format.record import TOOL
from loratools.storage.companions import json_text
from loratools.storage.strict_json import read_json

_SCHEMA = 1
_FOLDER = ".loratools"


def decides() -> dict[str, str]:
    """Return what bytes depend on besides a step and its inputs: versions, and how numbers are computed here."""
    from loratools.linalg import native

    return {
        "tool": TOOL, "torch": _version("torch"), "numpy": _version("numpy"), "machine": platform.machine(),
        "arithmetic": "native" if native.available() else "torch",
    }  # fmt: skip


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def place(output: Path) -> Path:
    """Return where the account of an output lies."""
    return output.parent / _FOLDER / f"{output.name}.json"


def read(output: Path) -> dict[str, Any] | None:
    """Return what was written beside an output; None where there is nothing, or nothing that can be read."""
    path = place(output)
    if not path.is_file():
        return None
    try:
        document = read_json(path)
    except BadFile:
        return None
    return document if document.get("schema") == _SCHEMA else None


def write(output: Path, document: Mapping[str, Any]) -> None:
    """Write what an output was made of beside it, in the place of what was there."""
    path = place(output)
    path.parent.mkdir(exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json_text({"schema": _SCHEMA, **document}), encoding="utf-8", newline="\n")
    fresh.replace(path)


def differs(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """Return why an output is to be made again, by what was written beside it; None where nothing changed."""
    if before is None:
        return "nothing says how it was made"
    if before.get("command") != now["command"]:
        return f"it was made by {before.get('command')}"
    old, new = _mapping(before.get("options")), now["options"]
    if changed := sorted(name for name in {**old, **new} if old.get(name) != new.get(name)):
        return f"{', '.join(changed)} changed"
    old, new = _mapping(before.get("inputs")), now["inputs"]
    if changed := sorted(name for name in {**old, **new} if old.get(name) != new.get(name)):
        return f"{', '.join(_which(name, old.get(name), new.get(name)) for name in changed)} changed"
    old, new = _mapping(before.get("by")), now["by"]
    if changed := sorted(name for name in {**old, **new} if old.get(name) != new.get(name)):
        was = ", ".join(f"{name} was {json.dumps(old.get(name))}" for name in changed)
        return f"made by something else: {was}"
    return None


def _which(name: str, old: Any, new: Any) -> str:
    """Return the name of an input, and of several which ones are others: by their numbers, from 1.

    >>> _which("adapters", ["a", "b", "c"], ["a", "x", "y"]), _which("adapters", ["a"], ["a", "b"])
    ('numbers 2 and 3 of adapters', 'adapters')
    """
    if not (isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 1):
        return name
    numbers = [str(i) for i, (was, now) in enumerate(zip(old, new, strict=True), 1) if was != now]
    which = f"numbers {', '.join(numbers[:-1])} and" if len(numbers) > 1 else "number"
    return f"{which} {numbers[-1]} of {name}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
