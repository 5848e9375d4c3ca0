"""One store, asked by `obstore`: every answer is checked, every refusal is a sentence.

Credentials are obstore's own chain (AWS_…, GOOGLE_…, AZURE_…, what a machine of the cloud is given); they are neither
read nor kept here.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from loratools.decisions import detailed
from loratools.errors import BadFile, MissingExtra, StoreError
from loratools.storage.stores import faults
from loratools.storage.stores.address import Address

T = TypeVar("T")

TRIES = 4
"""Times that a range is asked for whose bytes were cut, or not all that were asked for."""

MOST = 10_000
"""Objects of one folder that are listed; a model has some hundred."""

PART = 8 << 20
"""Bytes of one part of an upload, at least; a store takes ten thousand of an object."""

_RETRIES = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=120),
    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=4), "base": 2},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """An object as a store lists it: its key, bytes, and what tells one state of it from another."""

    key: str
    size: int
    e_tag: str | None
    modified: str

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Entry:
        """Take down what obstore says of an object, its mark as HTTP writes it: Azure lists it without quotes."""
        mark = meta["e_tag"]
        if mark and not mark.startswith(('"', "W/")):
            mark = f'"{mark}"'
        return cls(meta["path"], meta["size"], mark, str(meta["last_modified"]))

    @property
    def state(self) -> str:
        """The mark that the store gives to these very bytes; where it gives none, the time of their last change."""
        return self.e_tag or self.modified


class Store:
    """A bucket, a container or a server, as an address says; the parts of an `Entry` are fetched, files are sent."""

    def __init__(self, address: Address) -> None:
        self.address = address
        module = _obstore("obstore.store")
        opened = module.from_url if address.lists else module.HTTPStore.from_url
        # Options given here would take the place of all that the environment says.
        given = {"client_options": {"allow_http": True}} if address.scheme == "http" else {}
        self._store: Any = self._asked(lambda: opened(address.root, retry_config=_RETRIES, **given))

    def list(self, key: str, *, below: bool = True) -> list[Entry]:
        """Return the objects under a key, those in folders `below` it too; raise `BadFile` where there are too many."""
        if not self.address.lists:
            return []
        prefix = key or None

        def listed() -> list[Entry]:
            if not below:
                return [Entry.of(meta) for meta in self._store.list_with_delimiter(prefix)["objects"]]
            found: list[Entry] = []
            for some in self._store.list(prefix, chunk_size=1000):
                found += map(Entry.of, some)
                if len(found) > MOST:
                    hint = "Give the folder of one adapter or model."
                    raise BadFile(f"{self.address.at(key)}: more than {MOST} objects under it", hint=hint)
            return found

        return self._asked(listed, key)

    def head(self, key: str) -> Entry | None:
        """Return what a store says of one object; None where there is none."""

        def asked() -> Entry | None:
            try:
                return Entry.of(self._store.head(key))
            except FileNotFoundError:
                return None

        return self._asked(asked, key)

    def part(self, entry: Entry, start: int, stop: int) -> memoryview:
        """Return the bytes [`start`, `stop`) of an object, all of them and of that very state.

        A range that was cut, or is shorter than it was asked for, is asked for again. Raises `StoreError`.
        """
        if start == stop:
            return memoryview(b"")

        def fetched() -> memoryview:
            options: dict[str, Any] = {"range": (start, stop)}
            if entry.e_tag and not entry.e_tag.startswith("W/"):  # a weak mark never matches, by the rules of HTTP
                options["if_match"] = entry.e_tag
            answer = self._store.get(entry.key, options=options)
            now = Entry.of(answer.meta)
            if (now.size, now.state) != (entry.size, entry.state):
                raise faults.changed(str(self.address.at(entry.key)))
            data = memoryview(answer.bytes()).cast("B")
            if tuple(answer.range) != (start, stop) or len(data) != stop - start:
                raise faults.Short(f"{len(data)} of {stop - start} bytes arrived")
            return data

        return self._asked(lambda: _again(fetched), entry.key)

    def put(self, key: str, content: Path | bytes, size: int) -> Entry:
        """Send a finished file of `size` bytes as one object, in parts where it is large; it appears whole."""
        chunk = max(PART, -(-size // 9000))
        self._asked(lambda: self._store.put(key, content, chunk_size=chunk, max_concurrency=8), key)
        sent = self.head(key)
        if sent is None or sent.size != size:
            has = "nothing" if sent is None else f"{sent.size} bytes"
            raise StoreError(f"{self.address.at(key)}: {size} bytes were sent, and the store has {has}")
        return sent

    def remove(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is not there is none."""
        if listed := list(keys):
            self._asked(lambda: self._store.delete(listed))

    def _asked(self, call: Callable[[], T], key: str | None = None) -> T:
        try:
            return call()
        except Exception as error:
            place = self.address if key is None else self.address.at(key)
            said = faults.in_words(error, str(place), self.address.scheme)
            if said is error:
                raise
            raise said from None


def _again(fetched: Callable[[], memoryview]) -> memoryview:
    for attempt in range(TRIES - 1):
        try:
            return fetched()
        except Exception as error:
            if not faults.passes(error):
                raise
            detailed("asked for a range again: %s", type(error).__name__)
            time.sleep(random.uniform(0, 0.2 * 2**attempt))
    return fetched()


def _obstore(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise MissingExtra(
            "object stores and https:// are read and written by obstore, which is not installed",
            hint="Install it: pip install 'loratools[cloud]'",
        ) from None
