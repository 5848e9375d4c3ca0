"""Hash a checkpoint: the three tiers of its base hash, at the speed of the disk, without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from threading import Event

from loratools.adapter.model import BaseIdentity
from loratools.errors import LoraToolsError
from loratools.parallel import Progress, cores, workers
from loratools.storage import digest, files
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec

TIERS = ("schema", "tensors", "root")


def hash_checkpoint(
    checkpoint: Checkpoint,
    tiers: Collection[str] = TIERS,
    algorithm: str = digest.DEFAULT,
    *,
    include: Iterable[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BaseIdentity:
    """Return the asked `tiers` of the base hash of a checkpoint (spec/v1; construction in `storage/digest.py`).

    `schema` reads no tensor; `tensors` reads those that match one of the patterns `include` (all by default; `*` and
    `?` as in a shell); `root` reads all. `threads` (one per core by default) share the tensors, largest first; the
    result does not depend on them. `progress` is called with the bytes read since the last call, from any thread.

    Raises `LoraToolsError` for a pattern that matches nothing, `BadFile` for a file that cannot be read.
    """
    wanted = _select(checkpoint, include) if include is not None else set(checkpoint.specs)
    read = (wanted if "tensors" in tiers else set()) | (set(checkpoint.specs) if "root" in tiers else set())
    digests = hash_tensors({name: checkpoint.specs[name] for name in read}, algorithm, threads, progress)
    return BaseIdentity(
        schema=checkpoint.schema(algorithm) if "schema" in tiers else None,
        tensors={name: digests[name] for name in sorted(wanted)} if "tensors" in tiers else {},
        root=digest.root(digests, algorithm) if "root" in tiers else None,
    )


def hash_tensors(
    specs: dict[str, TensorSpec],
    algorithm: str = digest.DEFAULT,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Return the digest of each tensor; see `hash_checkpoint`."""
    stop = Event()
    advance = progress or (lambda count: None)

    def one(spec: TensorSpec) -> str:
        hasher = digest.start_tensor(spec.dtype, spec.shape, algorithm)
        try:
            for chunk in files.chunks(spec):  # reading and hashing a chunk both release the GIL
                if stop.is_set():
                    return ""  # nobody will see it: what stopped the work is raised instead
                hasher.update(chunk)
                advance(len(chunk))
        except BaseException:
            stop.set()
            raise
        return digest.finish(hasher, algorithm)

    # Largest first, so that no thread is left alone with a big one at the end.
    order = sorted(specs, key=lambda name: (-specs[name].nbytes, name))
    with workers(threads or cores()) as pool:
        try:
            return dict(zip(order, pool.map(one, (specs[name] for name in order)), strict=True))
        except BaseException:
            stop.set()  # Ctrl-C: do not read on to the end of a tensor, or begin the next
            raise


def _select(checkpoint: Checkpoint, include: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for pattern in include:
        matches = {name for name in checkpoint.specs if fnmatchcase(name, pattern)}
        if not matches:
            hint = "`loratools inspect --modules` lists the names."
            raise LoraToolsError(f"{checkpoint.path}: no tensor matches {pattern!r}", hint=hint)
        found |= matches
    return found
