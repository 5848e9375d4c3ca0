"""What an interrupted merge has finished: which files are complete, and that they still are, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratools.decisions import warned
from loratools.engine.plan import MergePlan
from loratools.engine.run import Settings
from loratools.engine.task import TensorResult
from loratools.errors import BadFile, counted
from loratools.storage import atomic, digest
from loratools.storage.atomic.sync import sync, sync_names
from loratools.storage.resolvers import FAR, SHOWN, is_far
from loratools.storage.strict_json import MAX_INDEX, read_json

_NAME = ".merge.json"


def fingerprint(plan: MergePlan, settings: Settings) -> str:
    """Return a digest of everything that the bytes of a merge's output depend on.

    The base is told by the size and the time of its files: reading it all would take as long as merging it.
    """
    # The number of threads does not change the bytes.
    chosen = {key: value for key, value in asdict(settings).items() if key != "threads"}
    files = [file.name for file in plan.files]
    sources = {change.source.file for change in plan.changes.values()}
    paths = sorted({path.resolve() for path in [*sources, *(shard.path for shard in plan.base.shards)]})
    shards = [
        FAR[str(path)].told if is_far(path) else (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in paths
    ]
    adapters = [(each.digest, each.weight) for each in plan.inputs]
    document = {"plan": plan.to_json(1), "files": files, "base": shards, "settings": chosen, "adapters": adapters}
    text = json.dumps(document, sort_keys=True, default=str)
    for place, reference in SHOWN.items():  # where a reference lies here is another place in each run
        text = text.replace(place, reference)
    hasher = digest.new()
    hasher.update(text.encode())
    for file in plan.files:
        hasher.update(file.header)
    return hasher.hexdigest()


def tell_others(output: Path, key: str) -> None:
    """Warn of what merges with other inputs or options left beside an output: this one cannot go on from it."""
    if atomic.afar.is_afar(output):
        return
    mine = f".{output.name}.resume-"
    names = [path.name for path in output.absolute().parent.iterdir() if path.name.startswith(mine)]
    if others := sorted(name for name in names if not key.startswith(name.removeprefix(mine))):
        text = "%s: an interrupted merge with other inputs or options left it, so it is not gone on from but removed"
        warned(text, ", ".join(others))


class Journal:
    """The list of complete files in the folder of a merge that may be interrupted, written anew after each of them.

    `done` has the digest of each file, and what was measured while it was written; `kept` are those of an earlier run,
    and `damaged` those that are no longer what they were. With `durable` what is complete outlasts a power cut; with
    `passing`, for files that go to the output at once, no digests are taken, which takes as long as a second read.
    """

    def __init__(
        self, folder: Path, key: str, *, durable: bool = True, passing: bool = False,
        elsewhere: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Find what an earlier run with the same `key` (a `fingerprint`) completed, and delete everything else.

        `elsewhere` is what was taken down of files that lie in a store already.
        """
        self._folder, self._key, self._durable, self._passing = folder, key, durable, passing
        document: dict[str, Any] = {}
        with suppress(BadFile):  # as if there were none
            document = read_json(folder / _NAME, most=MAX_INDEX)
        listed = document["files"] if document.get("key") == key else {}
        self.done: dict[str, Any] = {
            name: entry
            for name, entry in listed.items()
            if (folder / name).is_file() and _digest(folder / name) == entry["digest"]
        }
        self.done |= elsewhere or {}
        self.kept = tuple(self.done)
        self.damaged = tuple(name for name in listed if name not in self.done)
        for path in folder.rglob("*"):
            if not path.is_dir() and path.relative_to(folder).as_posix() not in self.done:
                path.unlink()

    def adopt(self, folders: Sequence[Path], names: Set[str]) -> None:
        """Take over the complete files that others wrote in folders of their own, with journals of the same key.

        `names` are those of all files. Each must have the digest, if any, that was taken down when it was written.
        Raises `BadFile` for one that has not, and for a journal of another merge.
        """
        moves: dict[Path, Path] = {}
        for folder in folders:
            document = read_json(folder / _NAME, most=MAX_INDEX)
            if document.get("key") != self._key:
                raise BadFile(f"{folder}: a part of another merge: its inputs or options differ")
            for name in names & document["files"].keys():
                if (folder / name).is_file():
                    moves[folder / name] = self._folder / name
                    self.done[name] = document["files"][name]
        known = {path: digest for path, target in moves.items() if (digest := self._of(target)["digest"])}
        damaged = [str(path) for path, digest in known.items() if _digest(path) != digest]
        if damaged:
            raise BadFile(f"{', '.join(damaged)}: not what it was when it was written; make its part again")
        self._write()  # first: a run that is killed here finds every file in one place or the other
        for path, target in moves.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        self.kept = tuple(self.done)

    def _of(self, path: Path) -> dict[str, Any]:
        entry: dict[str, Any] = self.done[path.relative_to(self._folder).as_posix()]
        return entry

    def tell(self, total: int) -> list[str]:
        """Return what is kept of an earlier run, of `total` files, and how that is known; warn of damage."""
        if self.damaged:
            warned("resumed: %s changed since it was written, and is written anew", ", ".join(self.damaged))
        if not self.kept:
            return []
        proof = f"each has the {digest.DEFAULT} digest that was taken down when it was written"
        known = "the base is told by the sizes and times of its files, adapters by their digests"
        return [f"resumed: {len(self.kept)} of {counted(total, 'file')} of tensors kept: {proof}; {known}"]

    def tell_left(self, total: int) -> None:
        """Warn, as the merge is interrupted, of what stays for the next run."""
        warned(
            "%d of %s of tensors complete, kept in %s: the same call with resume (--resume) goes on from there, "
            "any other on this output removes that", len(self.done), counted(total, "file"), self._folder,
        )  # fmt: skip

    def add(self, path: Path, results: Sequence[TensorResult]) -> None:
        """Take down a complete file, and what was measured while it was written."""
        if self._durable:
            sync(path)
            sync_names(path.parent)
        name = path.relative_to(self._folder).as_posix()
        taken = None if self._passing else _digest(path)
        self.done[name] = {"digest": taken, "results": [asdict(result) for result in results]}
        self._write()

    def flush(self) -> None:
        """Write the list, also where no file was added to it."""
        self._write()

    def _write(self) -> None:
        fresh = self._folder / f"{_NAME}.new"
        with fresh.open("w", encoding="utf-8", newline="\n") as file:
            json.dump({"key": self._key, "files": self.done}, file)
        if self._durable:
            sync(fresh)
        fresh.replace(self._folder / _NAME)
        if self._durable:
            sync_names(self._folder)

    def close(self) -> list[TensorResult]:
        """Remove the list, for the output is complete; return all that was measured."""
        (self._folder / _NAME).unlink(missing_ok=True)
        results = (TensorResult(**result) for entry in self.done.values() for result in entry["results"])
        return sorted(results, key=lambda result: result.name)


def _digest(path: Path) -> str:
    hasher = digest.new()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()
