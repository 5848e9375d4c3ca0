"""Have what was written outlast a power cut: each file, then the folders that name it, then the folder above."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from loratools.storage.atomic import system

_fcntl = system.module("fcntl")

_NO_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EISDIR}
"""How file systems say that folders are not theirs to sync: their names are on disk by other means, or cannot be."""


def sync(path: Path) -> None:
    """Write a file, or a folder with everything in it, to the disk itself; links are not followed.

    Raises `OSError` where the disk refuses, as it does when it is full or broken: what was written is not safe then.
    """
    if path.is_symlink():
        return
    if not path.is_dir():
        _sync(path, system.SYNCED)
        return
    with os.scandir(path) as entries:
        inside = sorted(entry.path for entry in entries)
    for each in inside:
        sync(Path(each))
    sync_names(path)


def sync_names(folder: Path) -> None:
    """Write the names that a folder holds to the disk, where its file system does that; raise `OSError` as `sync`."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    try:
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _NO_FOLDERS:
            raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        if hasattr(_fcntl, "F_FULLFSYNC"):  # fsync of macOS stops at the cache of the drive
            try:
                _fcntl.fcntl(descriptor, _fcntl.F_FULLFSYNC)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                    raise
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)
