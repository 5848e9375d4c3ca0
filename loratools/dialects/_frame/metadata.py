"""The header entries of a file, which stay with an adapter from reading to writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loratools.adapter.model import Adapter

_KEY = "metadata"


def settings_with(metadata: Mapping[str, str], keep: Callable[[str], bool]) -> dict[str, Any]:
    """Return the settings of an adapter that hold the entries to `keep`; {} where there are none."""
    entries = {name: value for name, value in metadata.items() if keep(name)}
    return {_KEY: entries} if entries else {}


def metadata_of(adapter: Adapter) -> dict[str, str]:
    """Return the header entries of the file that an adapter was read from; {} where no dialect kept them."""
    entries = adapter.settings.get(_KEY)
    return {str(name): str(value) for name, value in entries.items()} if isinstance(entries, Mapping) else {}
