"""Which adapter, which base: digests of what is at hand, and the record that a merged model carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import loratools
from loratools.adapter.model import Adapter
from loratools.errors import OutputRefused
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.strict_json import read_json

TOOL = f"loratools {loratools.__version__}"


def merge_record(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], digests: Sequence[str]
) -> dict[str, Any]:
    """Return what is known of a merge before it runs; no host path and no time is in it."""
    bases = {adapter.base.id for adapter in adapters if adapter.base and adapter.base.id}
    return {
        "schema": 1,
        "operation": "merge",
        "tool": TOOL,
        "base": {"id": bases.pop() if len(bases) == 1 else None, "schema": base.schema()},
        "adapters": [
            {
                "digest": digests[i],
                "weight": weights[i],
                "dialect": adapter.dialect,
                "modules": len(adapter.updates),
                "kinds": ", ".join(sorted({update.kind for update in adapter.updates.values()})),
                "ranks": ", ".join(str(r) for r in sorted({update.rank for update in adapter.updates.values()})),
            }
            for i, adapter in enumerate(adapters)
        ],
    }


def refuse_second_merge(base: Checkpoint, digests: Sequence[str], record_name: str) -> None:
    """Raise `OutputRefused` if the base is itself a merge of one of these adapters: it would be applied twice."""
    path = base.root / record_name
    if not path.is_file():
        return
    record = read_json(path)
    known: Any = record.get("adapters") if record.get("operation") == "merge" else None
    merged = {entry.get("digest") for entry in known or () if isinstance(entry, Mapping)}
    if again := sorted(set(digests) & merged):
        raise OutputRefused(
            f"{base.path} already is a merge of this adapter ({again[0]}); merging again would apply it twice",
            hint=f"Merge into the base model instead, or remove {path.name} if you mean it.",
        )
