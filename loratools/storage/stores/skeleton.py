"""A reference to a store becomes a folder here: small files whole, weights as headers whose tensors are read by ranges.

Everything that opens a model finds the files that the store has, with their sizes. What a file holds beyond what was
fetched comes when it is asked for (`ranges.py`), and never lies on this disk.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

from loratools.errors import BadFile, NoSpace
from loratools.parallel import Progress, each
from loratools.storage.atomic.hidden import FULL
from loratools.storage.beside import along
from loratools.storage.header import MAX_HEADER, parse_header
from loratools.storage.resolvers import FAR, SHOWN
from loratools.storage.sources import Need, Watch
from loratools.storage.stores import address as addresses
from loratools.storage.stores import probed
from loratools.storage.stores.address import Address
from loratools.storage.stores.client import Entry, Store
from loratools.storage.stores.ranges import SEGMENT, Ranges

FIRST = 1 << 16
"""Bytes of the first request for a header; a longer header takes a second one for exactly the rest."""

WHOLE = 2 << 30
"""Bytes of an adapter that is fetched whole, for it is read more than once; a larger one is read by ranges."""

UNFINISHED = ".loratools-upload.json"
"""An object that says that an output is not finished: put before its first file, and removed after its last."""

_SMALL = 1 << 20  # bytes of a JSON file that is fetched where headers alone are wanted
_MOST = 64 << 20  # bytes of any other file that comes along
_AT_ONCE = 16
_TENSORS = (".safetensors", ".sft")
_MAPPED = (".gguf",)  # read by a library that maps the whole file
_WEIGHTS = (*_TENSORS, *_MAPPED, ".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack", ".onnx")


def resolve(reference: str, need: Need, watch: Watch, folder: Callable[[], Path]) -> Path:
    """Return a local path of what a reference to a store names; `loratools.storage.sources` calls this.

    Args:
        reference: `s3://bucket/key`, `gs://…`, `az://…` or `https://…`, of a file or a folder.
        need: `header` fetches headers and small JSON files; `checkpoint` tokenizers and texts too, `adapter` all of
            an adapter of up to `WHOLE` bytes.
        watch: Shows the progress of what is fetched now.
        folder: Makes a folder for it, which goes away when the task ends.

    Raises:
        StoreError: The store said no, or could not be reached.
        BadFile: There is nothing, or it is an output that was not finished.
        MissingExtra: obstore is not installed.
    """
    address = addresses.parse(reference)
    store = Store(address)
    root, single, entries = _listed(store, address)
    if UNFINISHED in entries:
        hint = "Run the command that writes it again, and it goes on from there."
        raise BadFile(f"{root}: an output that is not finished: its upload was cut short", hint=hint)
    place = folder() / (root.name or "unnamed")
    place.mkdir()
    wanted = {name: entry for name, entry in entries.items() if not _hidden(name)}
    fill = _Filling(store, place, need, sum(entry.size for name, entry in wanted.items() if name.endswith(_WEIGHTS)))
    with watch(sum(entry.size for name, entry in wanted.items() if fill.whole(name, entry))) as advance:
        each(partial(fill.fill, advance), wanted, _AT_ONCE)
    SHOWN[str(place)] = str(root)
    return place / single if single else place


def _listed(store: Store, address: Address) -> tuple[Address, str | None, dict[str, Entry]]:
    """Return the folder that is shown, the file in it that was asked for, and its files by their names there."""
    parent = address.at(address.key.rpartition("/")[0])
    name = address.key.rpartition("/")[2]
    if PurePosixPath(name).suffix in _WEIGHTS or along.is_index(name):
        if entry := store.head(address.key):
            return parent, name, {name: entry} | probed.beside(store, parent, name)
    elif not address.lists:
        if entries := probed.folder(store, address):
            return address, None, entries
    elif listed := store.list(address.key):
        start = f"{address.key}/" if address.key else ""
        entries = {entry.key.removeprefix(start): entry for entry in listed if not entry.key.endswith("/")}
        if odd := [name for name in entries if not addresses.is_plain(name)]:
            raise BadFile(f"{address}: an object with a name that no file can have: {odd[0]!r}")
        return address, None, entries
    if not address.lists:
        hint = "A server of web pages lists nothing: give the address of a file, or of a folder with the usual names."
        raise BadFile(f"{address}: no file, and no folder of an adapter or a model with the usual names", hint=hint)
    if name and not PurePosixPath(name).suffix and (store.head(address.key)):
        raise BadFile(f"{address}: an object whose name does not say what it is")
    raise BadFile(f"{address}: no such object, and none under it", hint="Check the key: letters count, and slashes.")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


class _Filling:
    """Makes the files of one folder: whole, or with what is needed to read them by ranges."""

    def __init__(self, store: Store, place: Path, need: Need, weights: int = 0) -> None:
        self.store, self.place, self.need = store, place, need
        self.small = need == "adapter" and weights <= WHOLE

    def whole(self, name: str, entry: Entry) -> bool:
        """Tell whether a file is fetched whole now."""
        if name.endswith(_WEIGHTS):
            mapped = self.need != "header" and name.endswith(_MAPPED)
            fetched = self.small or mapped or entry.size <= FIRST
            return fetched and not along.is_of_training(PurePosixPath(name).name)
        if self.need == "header":
            return name.endswith(".json") and entry.size <= _SMALL and not _of_text(PurePosixPath(name).name)
        return along.is_index(PurePosixPath(name).name) or (entry.size <= _MOST and along.may_come(name))

    def fill(self, progress: Progress, name: str, entry: Entry) -> None:
        """Make one file; raise `BadFile` for one that no folder here can hold."""
        try:
            self._fill(progress, name, entry)
        except OSError as error:
            if error.errno in FULL - {errno.EFBIG}:
                hint = "Give another temporary folder, with more space: TMPDIR."
                raise NoSpace(f"{self._place(entry)}: no space for it in {self.place.parent}", hint=hint) from None
            what = f"{entry.size} bytes under this name cannot be a file here: {(error.strerror or str(error)).lower()}"
            raise BadFile(f"{self._place(entry)}: {what}") from None

    def _place(self, entry: Entry) -> Address:
        return self.store.address.at(entry.key)

    def _fill(self, progress: Progress, name: str, entry: Entry) -> None:
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        here, cuts = 0, [0]
        with path.open("wb") as file:
            if self.whole(name, entry):
                for start in range(0, entry.size, SEGMENT):
                    piece = self.store.part(entry, start, min(start + SEGMENT, entry.size))
                    file.write(piece)
                    progress(len(piece))
                return
            if name.endswith(_TENSORS):
                here = self._header(entry, file.write)
            elif name.endswith(_MAPPED):
                here = file.write(self.store.part(entry, 0, min(_MOST, entry.size)))
            file.truncate(entry.size)
        if name.endswith(_TENSORS):
            cuts = _cuts(path, here, entry.size)
        told = f"{self._place(entry)} {entry.size} {entry.state}"
        FAR[str(path)] = Ranges(path, entry.size, here, cuts, partial(self.store.part, entry), told)

    def _header(self, entry: Entry, write: Callable[[memoryview], int]) -> int:
        """Fetch the beginning of a safetensors file, all of its header and perhaps more; return how many bytes."""
        begin = self.store.part(entry, 0, min(FIRST, entry.size))
        stop = min(8 + int.from_bytes(begin[:8], "little"), entry.size, 8 + MAX_HEADER)
        write(begin)
        if len(begin) < stop:
            write(self.store.part(entry, len(begin), stop))
        return max(len(begin), stop)


def _cuts(path: Path, here: int, size: int) -> list[int]:
    """Return where the tensors of a file begin, as far as its header is sound; who reads it says what is not."""
    with path.open("rb") as file:
        raw = file.read(max(0, min(here - 8, int.from_bytes(file.read(8), "little"))))
    try:
        return [0, *(spec.start for spec in parse_header(raw, size, path).tensors.values())]
    except BadFile:
        return [0]


_TEXTS = ("tokenizer", "vocab", "special_tokens_map", "added_tokens", "trainer_state")


def _of_text(name: str) -> bool:
    return name.startswith(_TEXTS)
