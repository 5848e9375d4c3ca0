"""What an interrupted merge has finished: which files are complete, and that they still are, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratools.engine.plan import MergePlan
from loratools.engine.run import Settings
from loratools.engine.task import TensorResult
from loratools.errors import BadFile
from loratools.storage import digest
from loratools.storage.atomic.sync import sync, sync_names
from loratools.storage.strict_json import MAX_INDEX, read_json

_NAME = ".merge.json"


def fingerprint(plan: MergePlan, settings: Settings) -> str:
    """Return a digest of everything that the bytes of a merge's output depend on.

    The base is told by the size and the time of its files: reading it all would take as long as merging it.
    """
    # The number of threads does not change the bytes.
    chosen = {key: value for key, value in asdict(settings).items() if key != "threads"}
    files = [file.name for file in plan.files]
    paths = [shard.path.resolve() for shard in plan.base.shards]
    shards = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    document = {"plan": plan.to_json(1), "files": files, "base": shards, "settings": chosen}
    hasher = digest.new()
    hasher.update(json.dumps(document, sort_keys=True, default=str).encode())
    for file in plan.files:
        hasher.update(file.header)
    return hasher.hexdigest()


class Journal:
    """The list of complete files in the folder of a merge that may be interrupted, written anew after each of them.

    `done` has the digest of each file, and what was measured while it was written.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Find what an earlier run with the same `key` (a `fingerprint`) completed, and delete everything else."""
        self._folder, self._key = folder, key
        document: dict[str, Any] = {}
        with suppress(BadFile):  # as if there were none
            document = read_json(folder / _NAME, most=MAX_INDEX)
        self.done: dict[str, Any] = {
            name: entry
            for name, entry in (document["files"].items() if document.get("key") == key else ())
            if (folder / name).is_file() and _digest(folder / name) == entry["digest"]
        }
        for path in folder.rglob("*"):
            if not path.is_dir() and str(path.relative_to(folder)) not in self.done:
                path.unlink()

    def add(self, path: Path, results: Sequence[TensorResult]) -> None:
        """Take down a complete file, and what was measured while it was written; both are on disk afterwards."""
        sync(path)
        sync_names(path.parent)
        name = str(path.relative_to(self._folder))
        self.done[name] = {"digest": _digest(path), "results": [asdict(result) for result in results]}
        fresh = self._folder / f"{_NAME}.new"
        with fresh.open("w", encoding="utf-8") as file:
            json.dump({"key": self._key, "files": self.done}, file)
        sync(fresh)
        fresh.replace(self._folder / _NAME)
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
