"""Which adapter, which base: digests of what is at hand, and the record that a merged model carries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import loratools
from loratools.adapter.model import Adapter
from loratools.errors import BadFile, OutputRefused
from loratools.format import keys, manifest
from loratools.storage import digest, files
from loratools.storage.checkpoint import Checkpoint, read_json
from loratools.storage.lazy import LazyTensor

TOOL = f"loratools {loratools.__version__}"


def adapter_digest(adapter: Adapter, algorithm: str = digest.DEFAULT) -> str:
    """Return the digest of an adapter's own tensors: the `root` over them under PEFT's canonical names.

    A PEFT adapter and the same adapter sealed have one digest. Needs torch only for tensors that are not plain bytes
    of a file.
    """
    named = {
        keys.join(module, part): lazy
        for module, update in adapter.updates.items()
        for part, lazy in update.parts.items()
    }
    names = manifest.names_of({"modules": adapter.updates, "replacements": adapter.replacements})
    named |= {name: adapter.replacements[path] for path, name in names.items()}
    return digest.root({name: _digest(lazy, algorithm) for name, lazy in named.items()}, algorithm)


def _digest(lazy: LazyTensor, algorithm: str) -> str:
    if lazy.spec is not None:
        return digest.tensor(lazy.dtype, lazy.shape, files.chunks(lazy.spec), algorithm)
    import torch

    raw: Any = lazy.load().contiguous().flatten().view(torch.uint8).numpy()
    return digest.tensor(lazy.dtype, lazy.shape, [memoryview(raw)], algorithm)


def checked_digest(adapter: Adapter, name: str) -> str:
    """Return an adapter's digest; raise `BadFile` if its file records another, so that a damaged file is no input."""
    recorded = adapter.settings.get(manifest.ORIGIN, {}).get("digest")
    algorithm = digest.algorithm_of(recorded) if isinstance(recorded, str) else digest.DEFAULT
    found = adapter_digest(adapter, algorithm)
    if recorded is not None and found != recorded:
        raise BadFile(f"{name}: the tensors are not those that were sealed: digest {found}, recorded {recorded}")
    return found


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
