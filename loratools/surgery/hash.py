"""Hash a model or an adapter: the tiers of its hash, at the speed of the disk, without torch.

Those of a model are over the tensors of its files. Those of an adapter are over its own tensors under PEFT's canonical
names, whatever dialect they came in: its root is the digest that a sealed adapter records of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from threading import Event
from typing import get_args

from loratools import dialects
from loratools.adapter.identity import Tier
from loratools.adapter.model import Adapter, BaseIdentity
from loratools.adapter.placement.codes import refuse_all_codes
from loratools.decisions import decided, detailed, warned
from loratools.errors import BadFile, InvalidOption, LoraToolsError
from loratools.format import manifest
from loratools.format.digest import tensor_digests
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
    checkpoint: Location | Checkpoint | Adapter | dialects.InMemory,
    tiers: Tier | Collection[Tier] = TIERS,
    algorithm: Algorithm = digest.DEFAULT,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BaseIdentity:
    """Return the hash of a model or an adapter: which one exactly is this? (spec/v1, and `storage/digest.py`)

    The hash of a model is the base hash that an adapter is sealed with. The root of an adapter is its digest: the one
    that it records of itself when it is sealed, and the same in every dialect that keeps its tensors as they are. What
    the tensors mean (alpha, scaling) is not in it. The hash does not depend on how the tensors are spread over files,
    on their order, or on threads. The logical hash of a quantized model is the root hash of the model that `dequantize`
    makes of it; of any other it is the root.

    Args:
        checkpoint: The model, or the adapter: a path, an `hf://` reference (of which `"schema"` alone fetches the
            headers only), an open `Checkpoint` or `Adapter`, or an adapter held in memory.
        tiers: Which parts of the hash, one or several: `"schema"` reads no tensor, `"tensors"` those that `include`
            names, `"root"` all, `"logical"` all of them as numbers in 16 bit. Default: all four.
        algorithm: `"blake3"` or `"sha256"`. Default: `"blake3"`.
        include: Patterns of tensor names for `"tensors"`, one or several: a name (`q_proj`), a glob, or `re:` and a
            regular expression, as everywhere. Default: all.
        exclude: Patterns of those that are left out of `"tensors"`. Default: none.
        dialect: The dialect to read an adapter as, one of `list_dialects()`. Default: what is found in the file.
        alpha: The alpha of training, for an adapter without one; it is not in the hash. Default: the file's.
        threads: Threads that share the tensors, largest first. Default: one per core.
        progress: Called with the bytes read since the last call, from any thread. Default: nobody is told.

    Returns:
        The tiers that were asked for; an adapter has no logical hash.

    Raises:
        InvalidOption: A tier, the algorithm or the number of threads cannot be; the logical hash of an adapter.
        LoraToolsError: A pattern matches no tensor.
        BadFile: A file cannot be read, or a sealed adapter's tensors are not those that were sealed.
        UnknownKind, UnsupportedAdapter: The adapter cannot be read.
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
    patterns: dict[str, list[str] | None] = {}
    for option, given in (("include", include), ("exclude", exclude)):
        listed = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given or ""]
        patterns[option] = None if given is None else listed
        for pattern in listed if given is not None else ():
            options.text(option, pattern)
    options.word("algorithm", algorithm, Algorithm).threads(threads).done()
    if dialect is not None:
        dialects.get(dialect)
    dialects.check_alpha(alpha)
    if not isinstance(checkpoint, Checkpoint):
        opened = open_hashed(checkpoint, headers=set(tiers) <= {"schema"}, dialect=dialect, alpha=alpha)
        if isinstance(opened, Adapter):
            return _of_adapter(opened, tiers, algorithm, **patterns)
        checkpoint = opened
    checkpoint.tell_unread()
    decided("%s: a model of %d tensors; its %s", checkpoint.path, len(checkpoint.specs), ", ".join(tiers))
    selected = _select(str(checkpoint.path), set(checkpoint.specs), **patterns)
    view = _as_numbers(checkpoint, alone=tiers == ("logical",)) if "logical" in tiers else {}
    coded = {name: spec for name, spec in view.items() if spec.encoding}
    every = set(checkpoint.specs) if "root" in tiers else {name for name in view if name not in coded}
    read = (selected if "tensors" in tiers else set()) | every
    stored = {name: checkpoint.specs[name] for name in read}
    of_codes = {f"{name}, as numbers": spec for name, spec in coded.items()}
    work = partial(hash_tensors, algorithm=algorithm, threads=threads, progress=progress)
    from loratools.parallel.shared import shared

    digests = shared(work, {**stored, **of_codes}, lambda spec: spec.nbytes)
    as_numbers = {name: digests[f"{name}, as numbers" if name in coded else name] for name in view}
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
        digests = {name: future.result() for name, future in futures.items()}
    for name, found in digests.items():
        detailed("%s: %s", name, found)
    return digests


@contextmanager
def hashing(specs: Mapping[str, TensorSpec], *, beside: bool) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash tensors beside other work: give what waits for the digests of `hash_tensors`; the block ends the work.

    One thread does it; unless `beside` is set, nothing is hashed before the digests are asked for.
    """
    if not beside:
        yield lambda: hash_tensors(specs, threads=1)
        return
    stop = Event()

    def go_on(count: int) -> None:
        if stop.is_set():
            raise InterruptedError

    with workers(1) as pool:
        future = pool.submit(hash_tensors, specs, digest.DEFAULT, 1, go_on)
        try:
            yield future.result
        finally:
            stop.set()


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


def _select(
    place: str, names: Collection[str], include: Iterable[str] | None, exclude: Iterable[str] | None
) -> set[str]:
    """Return the names that the patterns choose; raise `LoraToolsError` with every pattern that matches none."""
    if include is None and exclude is None:
        return set(names)
    from loratools.adapter.naming.selection import matches

    chosen, left = (
        {pattern: {name for name in names if matches(pattern, name)} for pattern in patterns or ()}
        for patterns in (include, exclude)
    )
    if unmatched := ", ".join(repr(pattern) for pattern, of in (chosen | left).items() if not of):
        hint = "`loratools inspect --modules` lists the names."
        raise LoraToolsError(f"{place}: no tensor matches {unmatched}", hint=hint)
    every = set(names) if include is None else set().union(*chosen.values())
    return every.difference(*left.values())


def open_hashed(
    source: Location | Adapter | dialects.InMemory,
    *,
    headers: bool = False,
    dialect: str | None = None,
    alpha: float | None = None,
) -> Checkpoint | Adapter:
    """Return the adapter or the model that a value is, open.

    Args:
        source: A path, an `hf://` reference, an adapter held in memory.
        dialect: The dialect to read an adapter as. Default: what is found in the file.
        alpha: The alpha of training. Default: the file's.
        headers: Whether to fetch no more of a reference than the headers of its files. Default: all that is read.

    Raises:
        BadFile, UnknownKind, UnsupportedAdapter: It cannot be read.
    """
    if not isinstance(source, str | PathLike):
        return dialects.open_adapter(source, dialect=dialect, alpha=alpha)
    # What it is can be told from headers alone, before anything else of a reference is fetched.
    try:
        is_adapter = dialect is not None or dialects.is_adapter(dialects.Listing.of(source, need="header"))
    except BadFile as unreadable:  # a file beside a model, perhaps, which is none of its weights
        try:
            return Checkpoint.open(local(source, "header" if headers else "checkpoint"))
        except BadFile:
            raise unreadable from None
    if is_adapter:
        return dialects.open_adapter(local(source, "header" if headers else "adapter"), dialect=dialect, alpha=alpha)
    return Checkpoint.open(local(source, "header" if headers else "checkpoint"))


def _of_adapter(
    adapter: Adapter,
    tiers: Collection[Tier],
    algorithm: Algorithm,
    include: Iterable[str] | None,
    exclude: Iterable[str] | None,
) -> BaseIdentity:
    """Return the tiers of an adapter's tensors; raise `BadFile` where it records another digest of itself."""
    if set(tiers) == {"logical"}:
        raise InvalidOption("tiers: the logical hash is that of a quantized model, and this is an adapter")
    tensors = manifest.tensors_of(adapter)
    place = next((str(lazy.file) for lazy in tensors.values() if lazy.file), "the adapter")
    selected = _select(place, set(tensors), include, exclude)
    schema = {name: (lazy.dtype, lazy.shape) for name, lazy in tensors.items()}
    digests = tensor_digests(adapter, algorithm) if {"tensors", "root"} & set(tiers) else {}
    root = digest.root(digests, algorithm) if "root" in tiers else None
    recorded = adapter.settings.get(manifest.ORIGIN, {}).get("digest")
    if root and recorded and digest.algorithm_of(recorded) == algorithm and root != recorded:
        raise BadFile(f"{place}: the tensors are not those that were sealed: digest {root}, recorded {recorded}")
    return BaseIdentity(
        schema=digest.schema(schema, algorithm) if "schema" in tiers else None,
        tensors={name: digests[name] for name in sorted(selected)} if "tensors" in tiers else {},
        root=root,
    )
