"""The digest of an adapter: one name for what it holds, whatever dialect it came in."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.adapter.model import Adapter
from loratools.errors import BadFile
from loratools.format import manifest
from loratools.storage import digest
from loratools.storage.lazy import LazyTensor, chunks_of_all, in_order_of_files
from loratools.storage.sources import remember, remembered, stamps


def adapter_digest(adapter: Adapter, algorithm: str = digest.DEFAULT) -> str:
    """Return the digest of an adapter's own tensors: the `root` over them under PEFT's canonical names.

    A PEFT adapter and the same adapter sealed have one digest. Needs torch only for tensors that are not plain bytes
    of a file.
    """
    key = "digest", id(adapter), algorithm
    if (known := remembered().get(key)) is None:
        tensors = in_order_of_files(manifest.tensors_of(adapter))
        known = adapter, _root(tensors, algorithm)
        remember(key, known)  # with the adapter, whose id is then nobody else's
    return str(known[1])


def _root(tensors: Mapping[str, LazyTensor], algorithm: str) -> str:
    """Return the root over tensors; of those that lie in the same files this task hashes them once."""
    stored = {name: lazy.spec for name, lazy in tensors.items() if lazy.spec and lazy.spec.encoding is None}
    if len(stored) < len(tensors):
        return digest.root_of_all(tensors, chunks_of_all, algorithm, threads=1)
    files = {spec.file for spec in stored.values()}
    key = (
        "root",
        algorithm,
        frozenset(stored.items()),
        tuple(stamps(file.parent, [file.name]) for file in sorted(files)),
    )
    if (known := remembered().get(key)) is None:
        known = digest.root_of_all(tensors, chunks_of_all, algorithm)
        remember(key, known)
    return str(known)


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
