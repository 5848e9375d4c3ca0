"""Change files where they stand: small files, and headers of safetensors files whose data stay.

A reader sees the old or the new, and so does everybody after a kill or a power cut. One file that is small, or whose
data the file system can share, is written anew beside the old one and takes its name. The header of a large file is
written over the old one, for that costs a header where a copy costs all data: what shall happen is written down first
(`apply.py`), a process of its own does it, which no kill of this one stops, and what a power cut leaves undone the next
run for the same file does.

    apply    carry out a plan; run again, it does what is left
    header   headers with other metadata, and copies of a file's data behind them
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from loratools.decisions import decided, warned
from loratools.errors import OutputRefused
from loratools.storage.atomic import check_space, leftovers, locks
from loratools.storage.atomic.inputs import check_unchanged, forget
from loratools.storage.atomic.locks import Lock
from loratools.storage.atomic.sync import sync, sync_names
from loratools.storage.atomic.undisturbed import undisturbed
from loratools.storage.rewrite import apply as plans
from loratools.storage.rewrite.header import LARGE, NewHeader, data_start, write_copy

__all__ = ["Editing", "How", "NewHeader", "editing", "finish", "scratch_of"]

How = Literal["replaced", "header"]
"""How a file was changed: a new file took its name, or the header was written over the old one."""

_APPLY = Path(plans.__file__)
_CANNOT = 3


class Editing:
    """Files in one folder that this process, and no other, is about to change."""

    def __init__(self, scratch: Path, lock: Lock | None) -> None:
        self.scratch = scratch
        self.lock = lock

    def commit(self, changes: Mapping[str, bytes | NewHeader]) -> dict[str, How]:
        """Give files beside the scratch folder other contents, all of them or none; return how each was changed.

        Args:
            changes: Name of a file -> its new bytes, or the header that its data get. A file that is not there yet is
                made.

        Raises:
            BadFile: A file is another than when it was read.
            OutputRefused: A file is a symbolic link or is write-protected.
            NoSpace: The disk is too full.
        """
        check_unchanged(self.scratch)
        for name in changes:
            _check_writable(self.scratch.parent / name)
        how = self._commit(changes, over=True)
        for name in changes:
            forget(self.scratch.parent / name)
        return how

    def _commit(self, changes: Mapping[str, bytes | NewHeader], *, over: bool) -> dict[str, How]:
        folder, how, steps = self.scratch.parent, dict[str, How](), list[dict[str, Any]]()
        for number, (name, content) in enumerate(changes.items()):
            path, made = folder / name, self.scratch / f"{number}"
            if over and isinstance(content, NewHeader) and _fits_over(path):
                start, status = data_start(path), path.stat()
                made.write_bytes(content.encoded)
                steps.append({
                    "header": made.name, "of": name, "size": status.st_size, "inode": status.st_ino,
                    "grow": len(content.encoded) - start,
                })  # fmt: skip
                how[name] = "header"
                continue
            if isinstance(content, NewHeader):
                check_space(path, path.stat().st_size)
                write_copy(path, content, made)
            else:
                made.write_bytes(content)
            _like(made, path)
            steps.append({"put": made.name, "over": name})
            how[name] = "replaced"
        if len(steps) == 1 and "put" in steps[0]:
            sync(self.scratch / steps[0]["put"])
            with undisturbed():
                (self.scratch / steps[0]["put"]).replace(folder / steps[0]["over"])
                sync_names(folder)
            return how
        self._write(steps)
        with undisturbed():
            if not self._carry_out(any("header" in step for step in steps)):
                (self.scratch / plans.PLAN).unlink()
                decided("%s: no room can be made for a longer header there; the file is copied", folder)
                for step in steps:
                    (self.scratch / str(step.get("header") or step["put"])).unlink()
                return self._commit(changes, over=False)
            sync_names(folder)
            (self.scratch / plans.PLAN).unlink()
        return how

    def _write(self, steps: list[dict[str, Any]]) -> None:
        """Write down what shall happen; from here on it will."""
        draft = self.scratch / "plan.draft"
        draft.write_text(json.dumps({"steps": steps}), encoding="utf-8")
        sync(self.scratch)
        draft.replace(self.scratch / plans.PLAN)
        sync_names(self.scratch)
        sync_names(self.scratch.parent)

    def _carry_out(self, alone: bool) -> bool:
        """Carry out the plan, in a process of its own where half a step would show; False where it cannot be."""
        if not alone:
            plans.apply(self.scratch)
            return True
        worker = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_APPLY), str(self.scratch)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
            pass_fds=() if self.lock is None else (self.lock.descriptor,),
        )  # fmt: skip
        _, said = worker.communicate()
        if worker.returncode not in (0, _CANNOT):
            lines = said.decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise OSError(errno.EIO, f"the header could not be written: {lines[-1]}", str(self.scratch.parent))
        return worker.returncode == 0


@contextmanager
def editing(place: Path) -> Iterator[Editing]:
    """Keep a file, or the folder of `place` under that name, for changes by this process; do what a killed run left.

    Raises `OutputRefused` while another process has it.
    """
    scratch = scratch_of(place)
    scratch.mkdir(exist_ok=True)
    lock = None
    try:
        lock = _lock(scratch, place)
        _finish(scratch)
        yield Editing(scratch, lock)
    finally:
        with undisturbed():
            if not (scratch / plans.PLAN).exists():  # a plan that failed is for the next run
                leftovers.remove(scratch)
            if lock is not None:
                lock.release()


def scratch_of(place: Path) -> Path:
    """Return the hidden folder in which changes of a file are prepared."""
    absolute = place.absolute()
    return absolute.with_name(f".{absolute.name}.edit")


def finish(place: Path) -> None:
    """Do what a killed run had begun to do to a file, and remove what it left; nothing where there is no such run."""
    if (scratch_of(place) / plans.PLAN).is_file():
        with editing(place):
            pass


def _finish(scratch: Path) -> None:
    if (scratch / plans.PLAN).is_file():
        warned("%s: an edit that was killed is brought to its end", scratch.parent)
        try:
            plans.apply(scratch)
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.ENOENT):
                raise
            warned("%s: %s; what was to be written is dropped", scratch.parent, (error.strerror or "").lower())
        sync_names(scratch.parent)
        (scratch / plans.PLAN).unlink()
    for left in scratch.iterdir():
        leftovers.remove(left)


def _lock(scratch: Path, place: Path) -> Lock | None:
    try:
        return locks.lock(scratch)
    except (BlockingIOError, FileNotFoundError):
        hint = "Wait for it, and run it again."
        raise OutputRefused(f"{place} is being edited by another process", hint=hint) from None
    except OSError:  # nothing can be locked here
        return None


def _fits_over(path: Path) -> bool:
    """Tell whether a header may be written over the old one: of a large file that has one name, on Linux."""
    status = path.stat()
    return sys.platform == "linux" and status.st_nlink == 1 and status.st_size >= LARGE and hasattr(os, "RWF_DSYNC")


def _check_writable(path: Path) -> None:
    if path.is_symlink():
        raise OutputRefused(
            f"{path} is a symbolic link, to {os.readlink(path)}; loratools does not write through links",  # noqa: PTH115
            hint="Edit the file itself, or write a new one with -o.",
        )
    if not path.exists():
        return
    if not path.is_file():
        raise OutputRefused(f"{path}: not a regular file")
    if not os.access(path, os.W_OK):
        raise OutputRefused(f"{path} is write-protected", hint="Write a new one with -o, or allow it with chmod u+w.")
    if path.stat().st_nlink > 1:
        warned("%s has %d names (hard links); the others keep the old file", path, path.stat().st_nlink)


def _like(made: Path, path: Path) -> None:
    """Give a new file the mode, owner and attributes of the one that it replaces, as far as that is allowed."""
    if not path.exists():
        return
    status = path.stat()
    made.chmod(status.st_mode & 0o7777)
    if hasattr(os, "chown") and (status.st_uid, status.st_gid) != (made.stat().st_uid, made.stat().st_gid):
        with suppress(OSError):
            os.chown(made, status.st_uid, status.st_gid)
    if hasattr(os, "listxattr"):
        with suppress(OSError):
            for name in os.listxattr(path):
                os.setxattr(made, name, os.getxattr(path, name))
