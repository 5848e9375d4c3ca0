"""The model card of a merged model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.storage.companions import RECORD

_SECTION = re.compile(r"\n*<!-- loratools merge -->.*?<!-- /loratools merge -->\n*", re.DOTALL)


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
        front = f"base_model: {json.dumps(identity)}\nbase_model_relation: merge\n" if identity else ""
        body = f"---\n{front}library_name: transformers\ntags: [loratools, merge]\n---"
    return f"{body}\n\n{section}"


def without_section(text: str, record: Mapping[str, Any]) -> str:
    """Return a model card as it was before a merge: without its section; empty if the merge wrote all of it."""
    return "" if text == card("", record) else _SECTION.sub("\n", text).strip("\n") + "\n"
