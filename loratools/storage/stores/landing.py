"""An output goes to a store file by file, and is none before its last one.

    .loratools-upload.json   comes first: the fingerprint of what is made, and every file that is there with its digest
    weights                  each as soon as it is finished; then its bytes go from this disk
    everything beside them   config.json, the index and the record last
    .loratools-upload.json   goes: now it is an output, and loratools reads it

After a cut the same command finds that list: what is there with the digest that was taken down, and is still the very
object that was sent, is not sent again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loratools.decisions import decided, warned
from loratools.errors import BadFile, InvalidOption, OutputRefused, counted
from loratools.storage import digest
from loratools.storage.beside import along
from loratools.storage.resolvers import FAR
from loratools.storage.stores import address as addresses
from loratools.storage.stores.client import Entry, Store
from loratools.storage.stores.ranges import Ranges
from loratools.storage.stores.skeleton import UNFINISHED
from loratools.storage.strict_json import MAX_INDEX, parse_json_object

_LAST = ("adapter_config.json", "config.json", "model_index.json", "model.safetensors", "adapter_model.safetensors")
_RECORD = "loratools.json"


class Landing:
    """The folder, or the file, in a store that a reference names, and what is taken down of an upload to it."""

    def __init__(self, reference: str) -> None:
        self.address = addresses.parse(reference)
        if not self.address.lists or not self.address.key:
            raise InvalidOption(
                f"{self.address}: an output goes to a key of a store, such as s3://bucket/key",
                hint="A server of web pages is read only." if not self.address.lists else None,
            )
        self.store = Store(self.address)
        self._scratch = Path()
        self._key: str | None = None
        self._done: dict[str, Any] = {}
        self._begun = False
        self._there: dict[str, Entry] = {}

    @property
    def kept(self) -> Mapping[str, Any]:
        """What was taken down of the files that are there already, by their names."""
        return {name: entry["told"] for name, entry in self._done.items() if entry.get("told")}

    def check(self, *, force: bool) -> None:
        """Raise `OutputRefused` where something is there that is no unfinished upload, and `force` is not set."""
        if self._begun or force:
            return
        there = self._listed()
        if UNFINISHED not in there and (there or self.store.head(self.address.key)):
            hint = "Choose another output, or replace it with --force."
            raise OutputRefused(f"{self.address} exists already", hint=hint)

    def begin(self, scratch: Path, key: str | None, *, force: bool) -> None:
        """Begin an output that is made in `scratch`; see `atomic/afar.py`."""
        self._scratch, self._key, self._there = scratch, key, self._listed()
        noted = self._there.get(UNFINISHED)
        if noted is None:
            return
        note = _note(self.store, noted)
        if note.get("key") != key:
            warned("%s: an upload of something else was cut short there; it is written over", self.address)
            return
        for name, entry in note["files"].items():
            there = self._there.get(name)
            if there is not None and (there.size, there.state) == (entry["size"], entry["state"]):
                self._done[name] = entry
                if entry.get("told"):  # anything else is made again, and compared
                    self._behind(scratch / name, there)
        decided("%s: %s of an upload that was cut short are there", self.address, counted(len(self._done), "file"))

    def shard(self, path: Path, entry: Mapping[str, Any]) -> None:
        """Send a finished file, with what is taken down of it; its bytes are read from the store after that."""
        self._send(path.relative_to(self._scratch).as_posix(), path, entry)

    def finish(self, scratch: Path) -> None:
        """Send what was not sent, what makes it an output last; then it is one."""
        files = {path.relative_to(scratch).as_posix(): path for path in sorted(scratch.rglob("*")) if path.is_file()}
        for name in sorted(files, key=_order):
            if str(files[name]) not in FAR:
                self._send(name, files[name], None)
        self.store.remove(self._at(name) for name in self._there if name not in files and name != UNFINISHED)
        self.store.remove([self._at(UNFINISHED)])

    def abandon(self) -> None:
        """Remove what was sent: it is part of nothing that could be made."""
        if self._begun:
            self.store.remove([*map(self._at, self._done), self._at(UNFINISHED)])

    def tell_left(self) -> None:
        """Warn, as the upload is cut short, of what stays there for the next run."""
        if self._begun:
            files = counted(len(self._done), "file")
            warned("%s is not finished: %s there, and the same command goes on from them", self.address, files)

    def single(self, path: Path, beside: tuple[str, ...]) -> None:
        """Send an output that is one file, and before it what lies beside it; one that is not made any more goes."""
        parent = self.address.key.rpartition("/")[0]
        for name in beside:
            key, other = f"{parent}/{name}".lstrip("/"), path.with_name(name)
            if other.exists():
                self.store.put(key, other, other.stat().st_size)
            elif self.store.head(key):
                self.store.remove([key])
        self.store.put(self.address.key, path, path.stat().st_size)

    def _send(self, name: str, path: Path, told: Mapping[str, Any] | None) -> None:
        size, own = path.stat().st_size, _digest(path)
        known = self._done.get(name)
        if known is None or (known["digest"], known["size"]) != (own, size):
            self._open()
            sent = self.store.put(self._at(name), path, size)
            self._done[name] = {"digest": own, "size": size, "state": sent.state, "told": told}
            self._there[name] = sent
            self._take_down()
        else:
            self._done[name] = {**known, "told": told}
        self._behind(path, self._there[name])

    def _open(self) -> None:
        """Say that an output is being made there, and take from an old one what would make the two one model."""
        if self._begun:
            return
        self._begun = True
        self._take_down()
        old = [name for name in self._there if name not in self._done and name != UNFINISHED and _order(name)[0]]
        self.store.remove(map(self._at, old))
        self._there = {name: entry for name, entry in self._there.items() if name not in old}

    def _take_down(self) -> None:
        text = json.dumps({"key": self._key, "files": self._done}).encode()
        self.store.put(self._at(UNFINISHED), text, len(text))

    def _behind(self, path: Path, entry: Entry) -> None:
        """Leave of a file here only its size: who reads it reads the object."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(entry.size)
        told = f"{self.address.at(entry.key)} {entry.size} {entry.state}"
        FAR[str(path)] = Ranges(path, entry.size, 0, [0], partial(self.store.part, entry), told)

    def _listed(self) -> dict[str, Entry]:
        start = f"{self.address.key}/"
        return {entry.key.removeprefix(start): entry for entry in self.store.list(self.address.key)}

    def _at(self, name: str) -> str:
        return f"{self.address.key}/{name}"


def _order(name: str) -> tuple[int, str]:
    """Return when a file is sent: what makes loaders take a folder for a model comes last, the record after it."""
    last = name.rpartition("/")[2]
    return (name == _RECORD) * 3 or along.is_index(last) * 2 or int(last in _LAST), name


def _note(store: Store, entry: Entry) -> dict[str, Any]:
    """Return what an upload had taken down; nothing of what is damaged."""
    nothing: dict[str, Any] = {"key": None, "files": {}}
    if entry.size > MAX_INDEX:
        return nothing
    try:
        found = parse_json_object(bytes(store.part(entry, 0, entry.size)), Path(UNFINISHED))
    except BadFile:
        return nothing
    files = found.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(each, dict) and each.keys() >= {"digest", "size", "state"} and addresses.is_plain(name)
        for name, each in files.items()
    ):
        return nothing
    return {"key": found.get("key"), "files": files}


def _digest(path: Path) -> str:
    hasher = digest.new()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return digest.finish(hasher)
