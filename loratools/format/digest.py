"""The digest of an adapter: one name for what it holds, whatever dialect it came in."""

from __future__ import annotations

from typing import Any

from loratools.adapter.model import Adapter
from loratools.errors import BadFile
from loratools.format import keys, manifest
from loratools.storage import digest, files
from loratools.storage.lazy import LazyTensor


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
