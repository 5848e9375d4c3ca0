"""The digest of an adapter: one name for what it holds, whatever dialect it came in."""

from __future__ import annotations

from loratools.adapter.model import Adapter
from loratools.errors import BadFile
from loratools.format import manifest
from loratools.storage import digest
from loratools.storage.lazy import chunks_of_all, in_order_of_files
from loratools.storage.sources import remember, remembered


def adapter_digest(adapter: Adapter, algorithm: str = digest.DEFAULT) -> str:
    """Return the digest of an adapter's own tensors: the `root` over them under PEFT's canonical names.

    A PEFT adapter and the same adapter sealed have one digest. Needs torch only for tensors that are not plain bytes
    of a file.
    """
    key = "digest", id(adapter), algorithm
    if (known := remembered().get(key)) is None:
        tensors = in_order_of_files(manifest.tensors_of(adapter))
        in_files = all(lazy.spec is not None and lazy.spec.encoding is None for lazy in tensors.values())
        known = adapter, digest.root_of_all(tensors, chunks_of_all, algorithm, threads=None if in_files else 1)
        remember(key, known)  # with the adapter, whose id is then nobody else's
    return str(known[1])


def tensor_digests(adapter: Adapter, algorithm: str = digest.DEFAULT) -> dict[str, str]:
    """Return the digest of each of an adapter's own tensors, by PEFT's canonical names."""
    tensors = manifest.tensors_of(adapter)
    return {
        name: digest.tensor(tensors[name].dtype, tensors[name].shape, chunks, algorithm)
        for name, chunks in chunks_of_all(in_order_of_files(tensors))
    }


def checked_digest(adapter: Adapter, name: str) -> str:
    """Return an adapter's digest; raise `BadFile` if its file records another, so that a damaged file is no input."""
    recorded = adapter.settings.get(manifest.ORIGIN, {}).get("digest")
    algorithm = digest.algorithm_of(recorded) if isinstance(recorded, str) else digest.DEFAULT
    computed = adapter_digest(adapter, algorithm)
    if recorded is not None and computed != recorded:
        raise BadFile(f"{name}: the tensors are not those that were sealed: digest {computed}, recorded {recorded}")
    return computed


def same_tensors(adapter: Adapter, other: Adapter) -> bool:
    """Tell whether two have the very same tensors under the same names: then they are not hashed again."""
    one, two = ({name: id(lazy) for name, lazy in manifest.tensors_of(each).items()} for each in (adapter, other))
    return one == two
