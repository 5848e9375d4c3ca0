"""A part of a verb's items as it travels, and what a helper does with it: call the same verb, and stop at its items."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.decisions import warnings_to
from loratools.errors import BadFile, InvalidOption, LoraToolsError
from loratools.parallel import Progress, no_progress, shared, tasks
from loratools.parallel.call import Call
from loratools.parallel.shares import Part, balanced
from loratools.storage import digest
from loratools.storage.atomic import inputs
from loratools.storage.sources import session
from loratools.surgery.sharing import verbs

SAME = "Every worker has to see the same folders under the same names."

Stamps = Mapping[str, tuple[int, int]]
"""Path -> bytes and time of change of an input, as the caller sees it."""


@dataclass(frozen=True, slots=True)
class Task:
    """One part of a call, for a worker, and what the caller decided, which the worker must come to as well.

    `room` is the caller's folder beside the output, in which the worker makes one of its own; None for a verb that
    writes nothing. `agreed` is the number that the caller has drawn, where the verb draws one.
    """

    call: Call
    part: Part
    key: str
    stamps: Stamps
    arithmetic: str
    room: str | None = None
    agreed: int | None = None

    def __str__(self) -> str:
        return f"part {self.part}"


@dataclass(frozen=True, slots=True)
class Done:
    """What a helper made of a part: name -> result, and what it warned of."""

    results: Mapping[str, Any]
    warnings: tuple[str, ...]


class Enough(BaseException):
    """Ends a verb in a helper, which has done its part."""

    def __init__(self, done: Done, key: str) -> None:
        super().__init__()
        self.done, self.key = done, key


@dataclass(slots=True)
class Helper:
    """Does one part of the items, and no more; `folder` is where what it writes lies."""

    part: Part
    folder: Path | None
    key: str | None = None
    stamps: Stamps = field(default_factory=dict)
    number: int | None = None

    def share(self, work: shared.Work, items: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Do the items of the part, and raise `Enough` with their results."""
        key = key_of(sizes)
        check_stamps(self.stamps)
        if self.key not in (None, key):
            raise BadFile(f"{tasks.place()} finds other work than the caller", hint=SAME)
        names = balanced(sizes, self.part.of)[self.part.number - 1]
        warnings: list[str] = []
        with warnings_to(warnings.append):
            results = work({name: items[name] for name in names})
        raise Enough(Done(results, tuple(warnings)), key)

    def room(self) -> Path | None:
        """Return the folder of the part."""
        return self.folder

    def agreed(self, value: int) -> int:
        """Return what the caller has drawn."""
        return value if self.number is None else self.number


def key_of(sizes: Mapping[str, int]) -> str:
    """Return the fingerprint of the items that were decided."""
    hasher = digest.new()
    hasher.update(json.dumps(sorted(sizes.items())).encode())
    return hasher.hexdigest()


def stamps() -> dict[str, tuple[int, int]]:
    """Return the inputs that this task has opened, as they were: their bytes, and the time of their last change."""
    return {str(path): stamp[2:] for path, stamp in inputs.seen().items()}


def check_stamps(known: Stamps) -> None:
    """Raise `BadFile` with every input that is another here than the caller saw."""
    mine = stamps()
    if other := sorted(path for path in mine.keys() & known.keys() if tuple(known[path]) != mine[path]):
        raise BadFile(f"{tasks.place()} sees other files than the caller", other, hint=SAME)


def do(task: Task) -> Done:
    """Do one part, in a worker."""
    verb = verbs.verb(task.call.verb)
    try:
        with session(), warnings_to(lambda text: None):  # what the verb decides, the caller has said
            task.call.check_version()
            if (own := verb.arithmetic()) != task.arithmetic:
                raise InvalidOption(
                    f"{tasks.place()} computes by {own}, the caller by {task.arithmetic}: the bytes could differ",
                    hint="Give all workers the same torch and the same kind of processor.",
                )
            folder = _folder(task)
            with shared.by(Helper(task.part, folder, task.key, task.stamps, task.agreed)):
                verbs.run(task.call, progress=_while_wanted(folder.parent) if folder else no_progress)
    except Enough as enough:
        return enough.done
    except LoraToolsError as error:
        error.problems = (*error.problems, f"in {task} of the work, by {tasks.place()}")
        raise
    raise RuntimeError(f"{task.call.verb} shares nothing")


def _folder(task: Task) -> Path | None:
    """Make a folder of its own for what a task writes, in the caller's."""
    import secrets

    if task.room is None:
        return None
    folder = Path(task.room) / f"{task.part.number:04x}-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except FileNotFoundError:
        raise BadFile(
            f"{tasks.place()} does not see {folder.parent}, which the caller has made: it was called off, or that is "
            "another folder there", hint=SAME,
        ) from None  # fmt: skip
    return folder


def _while_wanted(room: Path) -> Progress:
    """Return a progress that ends a task when the caller has ended; it looks once a second."""
    looked = [time.monotonic()]

    def progress(count: int) -> None:
        if (now := time.monotonic()) - looked[0] > 1:
            looked[0] = now
            if not room.exists():
                raise LoraToolsError("the work was called off")

    return progress
