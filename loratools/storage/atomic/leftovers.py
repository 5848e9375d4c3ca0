"""Hidden folders beside an output: who works in one is known by its lock, and what killed runs left is removed.

.NAME.partial-XXXXXXXX…   a run writes in it; after an exchange it holds the old output, to be deleted
.NAME.replaced-XXXXXXXX…  the old output, moved aside by the run of that `partial`, where nothing can be exchanged
.NAME.resume-XXXXXXXX     what a run that may be interrupted has finished
.NAME.pull-X…             what has been fetched of a commit
.NAME.part-X…             what one part of several has finished
.NAME.lock-X…             a file that is locked in place of all those, where folders cannot be
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from loratools.decisions import warned
from loratools.storage.atomic import locks, machine
from loratools.storage.atomic.together import put_back

_HEX = r"-([0-9a-f]{8,16})"
GARBAGE = ("replaced", "partial")
"""What only a kill leaves; in this order, for an old output must be back before its run's own folder goes."""
KEPT = ("resume", "pull", "part")
"""What a run left on purpose, for the next of its kind."""


def sweep(target: Path, kinds: Sequence[str], mine: Path | None = None) -> None:
    """Remove what killed runs for the same target left, of these kinds; not `mine`, nor what a living run holds.

    On the file system of a server, what may be the work of another machine stays (`machine`).
    A run that was killed in the middle of a replacement may have moved the old folder aside: that is put back.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + rf"({'|'.join(kinds)}){_HEX}")
    try:
        names = [match for path in target.parent.iterdir() if (match := pattern.fullmatch(path.name))]
    except OSError:
        return  # a folder that cannot be read has no leftovers that could be known; writing into it says why not
    for match in sorted(names, key=lambda match: kinds.index(match[1])):
        leftover = target.with_name(match[0])
        if leftover != mine:
            owner = target.with_name(f".{target.name}.partial-{match[2]}") if match[1] == "replaced" else leftover
            _sweep(leftover, owner, target)
    locks.sweep(target)


def parts_of(target: Path) -> list[Path]:
    """Return the folders in which parts of an output lie, by name."""
    pattern = re.compile(re.escape(f".{target.name}.") + rf"part{_HEX}")
    return sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name))


def _sweep(leftover: Path, owner: Path, target: Path) -> None:
    held = None
    try:
        with suppress(FileNotFoundError):  # of an old output that was moved aside: its run was killed later
            held = locks.lock(owner)
        if machine.perhaps_elsewhere(owner if held else leftover):
            return
        if leftover != owner and not os.path.lexists(target):
            leftover.rename(target)
            return
        put_back(leftover, target)
        remove(leftover)
        if leftover.is_dir() and not leftover.is_symlink():
            warned("%s: left over from a run that was killed, and it cannot be removed", leftover)
    except (BlockingIOError, FileNotFoundError, NotADirectoryError):
        return  # a living run's; or it is gone already; or a file of somebody who likes such names
    except OSError as error:
        warned("%s: perhaps left over from a run that was killed: %s", leftover, (error.strerror or "").lower())
    finally:
        if held:
            held.release()


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there, as far as it can be deleted."""
    if path.is_dir() and not path.is_symlink():
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
