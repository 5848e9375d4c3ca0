"""Who works in a folder is known by its lock, which the system drops when the process ends, however it ends.

flock locks the folder itself. Windows locks bytes of files, and cannot rename a folder that holds an open one: there a
file beside it is locked, which goes with the lock: `.NAME.lock-X` for every `.NAME.…-X`, else `FOLDER.lock`. Process
numbers could not tell: they are used again, and mean nothing in another container or on another machine.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loratools.storage.atomic import system

_OF_RUN = r"(\..+)\.[a-z]+-([0-9a-f]{8,16})"
_fcntl, _msvcrt = system.module("fcntl"), system.module("msvcrt")


@dataclass(frozen=True, slots=True, eq=False)
class Lock:
    """A lock that is held: its open descriptor, and the file that is there for its sake, if any."""

    descriptor: int
    file: Path | None = None

    def release(self) -> None:
        """Let the lock go."""
        os.close(self.descriptor)
        if self.file:
            with suppress(OSError):  # the next one holds it open already, and removes it
                self.file.unlink()


def lock(folder: Path) -> Lock:
    """Lock a folder until the lock is released, or the process ends.

    Raises `BlockingIOError` where another run holds the lock, `FileNotFoundError` where there is no such folder,
    `NotADirectoryError` for a file or a link, and another `OSError` where nothing can be locked.
    """
    if _fcntl:
        return _locked(folder, Lock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)), _flock)
    if not _msvcrt:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK), str(folder))
    if folder.is_symlink() or not folder.is_dir():
        number = errno.ENOTDIR if os.path.lexists(folder) else errno.ENOENT
        raise OSError(number, os.strerror(number), str(folder))
    match = re.fullmatch(_OF_RUN, folder.name)
    file = folder.with_name(f"{match[1]}.lock-{match[2]}" if match else f"{folder.name}.lock")
    return _locked(folder, Lock(os.open(file, os.O_RDWR | os.O_CREAT | system.BINARY, 0o666), file), _lock_byte)


def share(folder: Path) -> Lock | None:
    """Lock a folder beside others that do so too: `lock` refuses it then, so that nobody takes it for a leftover.

    Returns None on Windows, which has no such lock for folders. Raises what `lock` raises.
    """
    if not _fcntl:
        return None
    return _locked(folder, Lock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)), _flock_shared)


def sweep(target: Path) -> None:
    """Remove the files of locks for an output whose folders are gone; Windows keeps those that somebody holds."""
    if _msvcrt and not _fcntl:
        from glob import escape

        for file in target.parent.glob(f".{escape(target.name)}.lock-*"):
            token = file.name.rpartition("-")[2]
            if not any(target.parent.glob(f".{escape(target.name)}.*[!k]-{token}")):
                with suppress(OSError):
                    file.unlink()


def _locked(folder: Path, held: Lock, take: Callable[[int], None]) -> Lock:
    try:
        take(held.descriptor)
        # Between its making and its locking another run may have taken it for a leftover.
        gone = not folder.exists() if held.file else not os.path.samestat(os.fstat(held.descriptor), folder.stat())
        if gone:
            raise FileNotFoundError(f"{folder} is another folder by now")
    except BlockingIOError:
        os.close(held.descriptor)  # the file is the other one's
        raise
    except BaseException:
        held.release()
        raise
    return held


def _flock(descriptor: int) -> None:
    _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)


def _flock_shared(descriptor: int) -> None:
    _fcntl.flock(descriptor, _fcntl.LOCK_SH | _fcntl.LOCK_NB)


def _lock_byte(descriptor: int) -> None:
    try:
        _msvcrt.locking(descriptor, _msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EDEADLK):  # how Windows says that another process has it
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK)) from None
        raise
