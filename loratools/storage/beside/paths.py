"""Local paths in texts: they mean nothing elsewhere, and tell who worked where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_END = r"\s\"'<>|`;,)(\]\[}{*?"
_PATH = (
    rf"(?:file:/*)?(?<![\w/\\.~%-])(?:~(?:/[^/{_END}:]+)+|\.{{1,2}}(?:/[^/{_END}:]+)+|(?:/[^/{_END}:]+){{2,}})/?"
    rf"|(?<![A-Za-z0-9])[A-Za-z]:[\\/][^{_END}:]*|\\\\[\w.$-]+\\[^{_END}:]*"
)
_WHOLE = r"(?:file:|~?/|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)[^\n]*"

_HOME = r"(?:file:/*)?(?:/home/|/Users/|/root/|[A-Za-z]:[\\/]Users[\\/])"


def paths_in(text: str) -> list[str]:
    """Return the local paths in a text; a data URI has none.

    >>> paths_in("trained on /home/ann/photos, see https://hub.org/a/b/c")
    ['/home/ann/photos']
    """
    if text.startswith("data:"):
        return []
    if len(text) > 1 and " /" not in text and re.fullmatch(_WHOLE, text):
        return [text]
    return [match[0] for match in re.finditer(_PATH, text)]


def last_part(path: str) -> str:
    """Return the name that a path ends with.

    >>> last_part("/home/ann/models/sd.safetensors"), last_part("C:\\\\models\\\\x\\\\")
    ('sd.safetensors', 'x')
    """
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1].removeprefix("file:").lstrip("~.")


def without_paths(text: str) -> str:
    """Return a text in which each local path is the name that it ends with.

    >>> without_paths("/home/ann/models/sd.safetensors"), without_paths("and/or https://hub.org/a/b/c")
    ('sd.safetensors', 'and/or https://hub.org/a/b/c')
    """
    if text.startswith("data:"):
        return text
    if len(text) > 1 and " /" not in text and re.fullmatch(_WHOLE, text):
        return last_part(text)
    return re.sub(_PATH, lambda match: last_part(match[0]), text)


def without_homes(text: str) -> str:
    """Return a text in which each path below somebody's home folder is the name that it ends with; others may be code.

    >>> without_homes("cd /usr/bin; see /home/ann/x/notes.txt")
    'cd /usr/bin; see notes.txt'
    """
    return re.sub(_PATH, lambda match: last_part(match[0]) if re.match(_HOME, match[0]) else match[0], text)


def public_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries of a header without local paths."""
    return {name: without_paths(value) if isinstance(value, str) else value for name, value in entries.items()}
