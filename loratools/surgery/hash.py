"""Hash a checkpoint: the tiers of its base hash, at the speed of the disk, without torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from threading import Event
from typing import get_args

from loratools.adapter.identity import Tier
from loratools.adapter.model import BaseIdentity
from loratools.adapter.placement.codes import refuse_all_codes
from loratools.decisions import warned
from loratools.errors import LoraToolsError
from loratools.options import Options
from loratools.parallel import Progress, cores, no_progress, workers
from loratools.storage import digest
from loratools.storage.checkpoint import Checkpoint, values
from loratools.storage.checkpoint.logical import logical
from loratools.storage.digest import Algorithm
from loratools.storage.header import TensorSpec
from loratools.storage.sources import Location, local, session

TIERS: tuple[Tier, ...] = get_args(Tier)


@session()
def hash_checkpoint(
    checkpoint: Location | Checkpoint,
    tiers: Tier | Collection[Tier] = TIERS,
    algorithm: Algorithm = digest.DEFAULT,
    *,
    include: str | Iterable[str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BaseIdentity:
    """Return the base hash of a model: which model exactly is this? (spec/v1; construction in `storage/digest.py`)

    The hash does not depend on how the tensors are spread over files, on their order, or on threads. The logical hash
    of a quantized model is the root hash of the model that `dequantize` makes of it; of any other it is the root.

    Args:
        checkpoint: The model: a path, an `hf://` reference (of which `"schema"` alone fetches the headers only), or an
            open `Checkpoint`.
        tiers: Which parts of the hash, one or several: `"schema"` reads no tensor, `"tensors"` those that `include`
            names, `"root"` all, `"logical"` all of them as numbers in 16 bit. Default: all four.
        algorithm: `"blake3"` or `"sha256"`. Default: `"blake3"`.
        include: Patterns of tensor names for `"tensors"`, one or several, with `*` and `?` as in a shell. Default: all.
        threads: Threads that share the tensors, largest first. Default: one per core.
        progress: Called with the bytes read since the last call, from any thread. Default: nobody is told.

    Returns:
        An identity with the tiers that were asked for.

    Raises:
        InvalidOption: A tier, the algorithm or the number of threads cannot be.
        LoraToolsError: A pattern matches no tensor.
        BadFile: A file cannot be read.
        UnsupportedAdapter, IncompatibleAdapter: The logical hash alone was asked for, and the model is quantized in a
            way that is not read; with other tiers that is a warning, and it is left out.

    Example:
        >>> hash_checkpoint("base", "root").root
        'blake3:6e1f…'
    """
    tiers = tuple(tiers) if isinstance(tiers, Iterable) and not isinstance(tiers, str) else (tiers,)
    options = Options()
    for tier in tiers:
        options.word("tiers", tier, Tier)
    if include is not None:
        include = list(include) if isinstance(include, Iterable) and not isinstance(include, str) else [include]
        for pattern in include:
            options.text("include", pattern)
    options.word("algorithm", algorithm, Algorithm).threads(threads).done()
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(local(checkpoint, "header" if set(tiers) <= {"schema"} else "checkpoint"))
    checkpoint.tell_unread()
    selected = set(checkpoint.specs) if include is None else _select(checkpoint, include)
    view = _as_numbers(checkpoint, alone=tiers == ("logical",)) if "logical" in tiers else {}
    coded = {name: spec for name, spec in view.items() if spec.encoding}
    every = set(checkpoint.specs) if "root" in tiers else {name for name in view if name not in coded}
    read = (selected if "tensors" in tiers else set()) | every
    digests = hash_tensors({name: checkpoint.specs[name] for name in read}, algorithm, threads, progress)
    numbers = hash_tensors(coded, algorithm, threads, progress)
    as_numbers = {name: numbers[name] if name in coded else digests[name] for name in view}
    of_all = {name: digests[name] for name in checkpoint.specs} if "root" in tiers else {}
    return BaseIdentity(
        schema=checkpoint.schema(algorithm) if "schema" in tiers else None,
        tensors={name: digests[name] for name in sorted(selected)} if "tensors" in tiers else {},
        root=digest.root(of_all, algorithm) if "root" in tiers else None,
        logical=digest.root(as_numbers, algorithm) if view else None,
    )


def hash_tensors(
    specs: Mapping[str, TensorSpec], algorithm: str = digest.DEFAULT, threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:  # fmt: skip
    """Return the digest of each tensor; the parameters are those of `hash_checkpoint`.

    That of a weight which is stored as codes is that of its 16-bit numbers (`storage/checkpoint/values.py`).
    """
    from concurrent.futures import FIRST_EXCEPTION, wait

    stop = Event()
    progress = progress or no_progress

    def hash_one(spec: TensorSpec) -> str:
        hasher = values.start(spec, algorithm)
        try:
            for chunk in values.pieces(spec):  # reading and hashing a chunk both release the GIL
                if stop.is_set():
                    return ""  # nobody will see it: what stopped the work is raised instead
                hasher.update(values.plain(spec, chunk))
                progress(len(chunk))
        except BaseException:
            stop.set()  # here, for a thread begins its next tensor before the one that waits wakes up
            raise
        return digest.finish(hasher, algorithm)

    # Largest first, so that no thread is left alone with a big one at the end.
    order = sorted(specs, key=lambda name: (-specs[name].nbytes, name))
    with workers(threads or cores()) as pool:
        futures = {name: pool.submit(hash_one, specs[name]) for name in order}
        try:
            wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # after a failure or Ctrl-C: do not read on to the end of a tensor, or begin the next
        return {name: future.result() for name, future in futures.items()}


def _as_numbers(checkpoint: Checkpoint, *, alone: bool) -> Mapping[str, TensorSpec]:
    """Return the tensors of the dequantized model; {} and a warning where its codes are not read.

    With `alone` that raises `LoraToolsError`.
    """
    try:
        view = logical(checkpoint)
        refuse_all_codes(view)
    except LoraToolsError as error:
        if alone:
            raise
        warned("%s: its logical hash is left out: %s", checkpoint.path, error.message)
        return {}
    return view.specs


def _select(checkpoint: Checkpoint, include: str | Iterable[str]) -> set[str]:
    """Return the names that match the patterns; raise `LoraToolsError` with every pattern that matches none."""
    patterns = [include] if isinstance(include, str) else include
    matches = {pattern: {name for name in checkpoint.specs if fnmatchcase(name, pattern)} for pattern in patterns}
    if unmatched := ", ".join(repr(pattern) for pattern, names in matches.items() if not names):
        hint = "`loratools inspect --modules` lists the names."
        raise LoraToolsError(f"{checkpoint.path}: no tensor matches {unmatched}", hint=hint)
    return set().union(*matches.values())
