"""What an interrupted merge has finished: which files are complete, and that they still are, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from loratools.storage.layout import FilePlan
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
    Files lie in the folder, or in the `room` that several processes share: of a file of which others write the rest the
    list has the ranges and their digest, and of one that several have written all of those.
    """

    def __init__(
        self, folder: Path, key: str, *, durable: bool = True, passing: bool = False,
        elsewhere: Mapping[str, Any] | None = None, room: Path | None = None,
    ) -> None:  # fmt: skip
        """Find what an earlier run with the same `key` (a `fingerprint`) completed, and delete everything else.

        `elsewhere` is what was taken down of files that lie in a store already.
        """
        self._folder, self._key, self._durable, self._passing = folder, key, durable, passing
        self._room = room or folder
        document: dict[str, Any] = {}
        with suppress(BadFile):  # as if there were none
            document = read_json(folder / _NAME, most=MAX_INDEX)
        listed = document["files"] if document.get("key") == key else {}
        self.done: dict[str, Any] = {
            name: entry
            for name, entry in listed.items()
            if (self._room / name).is_file() and _intact(self._room / name, entry)
        }
        self.done |= elsewhere or {}
        self.kept = tuple(self.done)
        self.damaged = tuple(name for name in listed if name not in self.done)
        for path in folder.rglob("*"):
            if not path.is_dir() and path.relative_to(folder).as_posix() not in self.done:
                path.unlink()

    def adopt(self, folders: Sequence[Path], room: Path, plans: Sequence[FilePlan]) -> None:
        """Take over files in a `room` that others wrote, whose lists of the same key lie in folders of their own.

        `plans` are those of all files. What each wrote must have the digest, if any, that was taken down then. Raises
        `BadFile` where one has not, where nobody wrote some of a file, and for a list of another merge.
        """
        moves: list[FilePlan] = []
        found: dict[str, list[dict[str, Any]]] = {}
        for folder in folders:
            document = read_json(folder / _NAME, most=MAX_INDEX)
            if document.get("key") != self._key:
                raise BadFile(f"{folder}: a part of another merge: its inputs or options differ")
            for name, entry in document["files"].items():
                found.setdefault(name, []).append(entry)
        for plan in plans:
            if plan.name in found and (room / plan.name).is_file():
                moves.append(plan)
                self.done[plan.name] = _joined(found[plan.name])
        damaged = [
            str(room / plan.name)
            for plan in moves
            if not _is_whole(plan, self.done[plan.name]) or not _intact(room / plan.name, self.done[plan.name], True)
        ]
        if damaged:
            raise BadFile(f"{', '.join(damaged)}: not what it was when it was written; make its part again")
        self._write()  # first: a run that is killed here finds every file in one place or the other
        for plan in moves:
            target = self._folder / plan.name
            target.parent.mkdir(parents=True, exist_ok=True)
            (room / plan.name).replace(target)
        self.kept = tuple(self.done)

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

    def add(self, file: FilePlan, results: Sequence[TensorResult]) -> None:
        """Take down a complete file, or what is written of it here, and what was measured meanwhile."""
        path = self._room / file.name
        if self._durable:
            sync(path)
            sync_names(path.parent)
        entry: dict[str, Any] = {"results": [asdict(result) for result in results]}
        if file.whole is None:
            entry["digest"] = None if self._passing else _digest(path)
        else:
            ranges = [[0, len(file.header)], *file.ranges]
            entry["ranges"] = [[None if self._passing else _digest(path, ranges), ranges]]
        self.done[file.name] = entry
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


def _digest(path: Path, ranges: Sequence[Sequence[int]] | None = None) -> str:
    """Return the digest of a file, or of ranges of it, one after the other."""
    hasher = digest.new()
    with path.open("rb") as file:
        for start, stop in [(0, path.stat().st_size)] if ranges is None else ranges:
            file.seek(start)
            while start < stop and (chunk := file.read(min(1 << 20, stop - start))):
                start += len(chunk)
                hasher.update(chunk)
    return hasher.hexdigest()


def _intact(path: Path, entry: Mapping[str, Any], unknown: bool = False) -> bool:
    """Tell whether a file is what it was when it was written; what has no digest is, if that may be `unknown`."""
    known = entry["ranges"] if "ranges" in entry else [[entry["digest"], None]]
    return all((unknown and was is None) or _digest(path, ranges) == was for was, ranges in known)


def _joined(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the entry of a file that one or several have written."""
    results = [result for entry in entries for result in entry["results"]]
    if len(entries) == 1 and "digest" in entries[0]:
        return {"digest": entries[0]["digest"], "results": results}
    return {"ranges": [each for entry in entries for each in entry.get("ranges", [])], "results": results}


def _is_whole(plan: FilePlan, entry: Mapping[str, Any]) -> bool:
    """Tell whether every byte of a file was written by somebody."""
    if "digest" in entry:
        return True
    end = 0
    for start, stop in sorted(tuple(each) for _, ranges in entry["ranges"] for each in ranges):
        if start > end:
            return False
        end = max(end, stop)
    return end == plan.size
