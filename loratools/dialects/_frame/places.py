"""Where a fact stands in the files of an adapter: one table for each dialect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Fact = Literal["trigger", "title", "tags", "base", "description", "author", "license", "thumbnail"]
"""What people write into an adapter's files about it."""

Where = Literal["header", "config", "card", "manifest"]
"""A kind of place: an entry of the safetensors header, a field of adapter_config.json, of README.md's front matter, or
of the base model in the manifest of a sealed adapter."""


class Place(NamedTuple):
    """Where a fact stands: the `key` of an entry or a field, and the field `inner` where the entry holds JSON."""

    where: Where
    key: str
    inner: str | None = None


Table = Mapping[Fact, tuple[Place, ...]]
"""For each fact the places that it is written into: headers always, other files where they are there."""


def _header(key: str) -> tuple[Place, ...]:
    return (Place("header", key),)


MODELSPEC: Table = {
    "trigger": (*_header("modelspec.trigger_phrase"), Place("card", "instance_prompt")),
    "title": _header("modelspec.title"),
    "tags": (*_header("modelspec.tags"), Place("card", "tags")),
    "description": _header("modelspec.description"),
    "author": _header("modelspec.author"),
    "license": (*_header("modelspec.license"), Place("card", "license")),
    "thumbnail": _header("modelspec.thumbnail"),
}
"""The entries of Stability's standard (sai_model_spec), which sd-scripts writes and SwarmUI, A1111 and ComfyUI show; it
has none for the base model."""

_CARD = Place("card", "base_model")
_CONFIG = Place("config", "base_model_name_or_path")

TABLES: Mapping[str, Table] = {
    "comfy": {**MODELSPEC, "base": (*_header("ss_base_model"), _CARD)},
    "diffusers": {**MODELSPEC, "base": (Place("header", "lora_adapter_metadata", "base_model_name_or_path"), _CARD)},
    "kohya": {**MODELSPEC, "base": (*_header("ss_sd_model_name"), _CARD)},
    "loratools": {**MODELSPEC, "base": (Place("manifest", "id"), _CONFIG, _CARD)},
    "mlx": {**MODELSPEC, "base": (Place("config", "model"), _CARD)},
    "peft": {**MODELSPEC, "base": (_CONFIG, _CARD)},
    "tinker": {**MODELSPEC, "base": (_CONFIG, _CARD)},
    "torchtune": {**MODELSPEC, "base": (_CONFIG, _CARD)},
}
"""Dialect -> its table; of one that is not here it is `MODELSPEC`."""

ALSO: Mapping[Fact, tuple[str, ...]] = {
    "trigger": (
        "modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "trigger_word", "trigger_phrase",
        "activation text", "instance_prompt",
    ),
    "title": ("modelspec.title",),
    "tags": ("modelspec.tags", "tags"),
    "description": ("modelspec.description", "description"),
    "author": ("modelspec.author", "author"),
    "license": ("modelspec.license", "license"),
    "thumbnail": ("modelspec.thumbnail",),
}  # fmt: skip
"""Header entries that trainers and tools keep a fact in, the standard's first: one of them that a file has is kept in
agreement."""


def table_of(dialect: str) -> Table:
    """Return the places of a dialect's files."""
    return TABLES.get(dialect, MODELSPEC)
