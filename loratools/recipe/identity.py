"""What an input or an output is: the digest of its tensors, whatever the dialect, and the digest of all its files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path, PurePath
from threading import Event
from typing import TYPE_CHECKING

from loratools import dialects
from loratools.decisions import warnings_to
from loratools.errors import LoraToolsError
from loratools.format.digest import adapter_digest
from loratools.format.manifest import ORIGIN
from loratools.parallel import Progress, cores, each, no_progress, workers
from loratools.parallel.memory import lent
from loratools.storage import digest
from loratools.storage.beside import along
from loratools.storage.beside.links import walk
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.checkpoint.shard import Shard
from loratools.storage.companions import RESIDUAL
from loratools.storage.sources import absent, open_file
from loratools.surgery.hash import hash_tensors

if TYPE_CHECKING:
    from loratools.recipe.catalog import Role

_CHUNK = 1 << 20


def tensors_of(path: Path, role: Role | None = None, *, dialect: str | None = None) -> str | None:
    """Return the digest of an adapter's tensors, or the root hash of a model, as `loratools hash` prints them.

    Without a `role` it is that of whatever is there; None for a file that is neither.
    """
    if role != "model" and (found := adapter_of(path, dialect)):
        return found
    try:
        model = Checkpoint.open(path)
    except LoraToolsError:
        if role == "model":
            raise
        return None
    return digest.root(hash_tensors(dict(model.specs), digest.DEFAULT))


def adapter_of(path: Path, dialect: str | None = None) -> str | None:
    """Return the digest of an adapter, the one that it is sealed with if it is; None for what is none."""
    with warnings_to(lambda text: None):  # the command that reads it has said them, or will
        try:
            adapter = dialects.open_adapter(path, dialect=dialect, initial=True)
        except LoraToolsError:
            return None
    sealed = adapter.settings.get(ORIGIN, {}).get("digest")
    return sealed if isinstance(sealed, str) else adapter_digest(adapter)


def schema_of(path: Path) -> str:
    """Return the digest of a model's names, dtypes and shapes; raise `BadFile` where no model lies."""
    return Checkpoint.open(path).schema()


def content_of(path: Path, role: Role, progress: Progress = no_progress) -> str:
    """Return the digest of all that a command reads of an input, but a model's numbers.

    That is an adapter's files of tensors, a model's headers, and what lies beside them; cards and pictures of an
    adapter are read by nobody. `progress` takes the bytes read since its last call. Raises `BadFile` where there is
    nothing.
    """
    if role == "adapter":
        listing = dialects.located(dialects.Listing.of(path))
        names = [name for name in listing.weights if not along.is_of_training(name)]
        names += [name for name in listing.files if along.may_come(name) and not _shown(name)] * (not listing.single)
        return _over({name if len(names) > 1 else "": listing.folder / name for name in names}, progress=progress)
    model = Checkpoint.open(path)
    beside: dict[str, Path] = {}
    if model.path.is_dir() or model.indexes:
        shards = {shard.path for shard in model.shards}
        every = {path.relative_to(model.root).as_posix(): path for path in walk(model.root) if path not in shards}
        beside = {
            name: path
            for name, path in every.items()
            if along.may_come(name) or along.is_index(name) or name == RESIDUAL
        }
    headers = {f"header {i}": _begin(shard) for i, shard in enumerate(model.shards)}
    return _over(beside, headers)


@contextmanager
def contents_of(adapters: Iterable[Path]) -> Iterator[Callable[[Path], str]]:
    """Hash adapters beside other work: give what waits for the `content_of` one of them; the block ends the work."""
    stop = Event()

    def go_on(count: int) -> None:
        if stop.is_set():
            raise InterruptedError

    with workers(1) as pool:
        work = {path: partial(copy_context().run, content_of, path, "adapter", go_on) for path in adapters}
        contents = {path: pool.submit(hash_one) for path, hash_one in work.items()}
        try:
            yield lambda path: contents[path].result() if path in contents else content_of(path, "adapter")
        finally:
            stop.set()


def _shown(name: str) -> bool:
    return name.endswith(".md") or PurePath(name).suffix.lower() in along.SHOWN


def _begin(shard: Shard) -> str:
    """Return the digest of what comes before the tensors in a file, which says their dtypes and names."""
    hasher = digest.new()
    with open_file(shard.path) as file:
        hasher.update(file.read(min((spec.start for spec in shard.tensors.values()), default=0)))
    return digest.finish(hasher)


def files_of(path: Path) -> str:
    """Return the digest of a file, or of the names and bytes of all files in a folder but hidden ones.

    Raises `BadFile` where there is nothing.
    """
    if path.is_file():
        return _over({"": path})
    if path.is_dir():
        return _over({each.relative_to(path).as_posix(): each for each in walk(path)})
    raise absent(path)


def _over(files: Mapping[str, Path], more: Mapping[str, str] | None = None, progress: Progress = no_progress) -> str:
    """Return the digest of files by name; that of one without a name is that of its bytes."""
    order = dict(sorted(files.items(), key=lambda item: (-item[1].stat().st_size, item[0])))
    digests = each(lambda _, file: _of_file(file, progress), order, cores()) | dict(more or {})
    if digests.keys() == {""}:
        return digests[""]
    hasher = digest.new()
    hasher.update(b"loratools.files.v1\0")
    for name in sorted(digests, key=str.encode):
        hasher.update(name.encode() + b"\0" + bytes.fromhex(digests[name].partition(":")[2]))
    return digest.finish(hasher)


def _of_file(path: Path, progress: Progress = no_progress) -> str:
    hasher = digest.new()
    with open_file(path) as file, lent() as room:
        buffer = room.of(_CHUNK, 0)
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            hasher.update(buffer[:count])
            progress(count)
    return digest.finish(hasher)
