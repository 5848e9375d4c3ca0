"""What systems differ in: calls that Windows or macOS do not have, and what does the same there.

Everything that asks whether a call exists is here, in `locks.py` and in `place.py`.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from functools import cache
from importlib import import_module
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

BINARY = getattr(os, "O_BINARY", 0)
"""A flag of `os.open`: Windows would change ends of lines without it, and other systems have none."""

SYNCED = os.O_RDWR | BINARY if BINARY else os.O_RDONLY
"""How a file is opened whose bytes are to reach the disk: Windows syncs only what may be written."""

_TURNS = tuple(Lock() for _ in range(64))  # of descriptors, by their numbers, where a place in a file is their state


def module(name: str) -> Any:
    """Return a module of Python that not every system has; None where this one has not."""
    try:
        return import_module(name)
    except ImportError:
        return None


def read_at(source: int, buffer: memoryview, offset: int) -> int:
    """Read into `buffer` from `offset` on, and return how many bytes there were; 0 at the end of the file.

    Threads may share the descriptor, for reading and writing.
    """
    if hasattr(os, "preadv"):
        return os.preadv(source, [buffer], offset)
    with _TURNS[source % len(_TURNS)]:
        os.lseek(source, offset, os.SEEK_SET)
        return FileIO(source, closefd=False).readinto(buffer)


def write_at(target: int, buffer: memoryview, offset: int) -> int:
    """Write `buffer` at `offset`, and return how many bytes of it were taken; threads may share the descriptor."""
    if hasattr(os, "pwrite"):
        return os.pwrite(target, buffer, offset)
    with _TURNS[target % len(_TURNS)]:
        os.lseek(target, offset, os.SEEK_SET)
        return os.write(target, buffer)


def free(folder: Path) -> int:
    """Return the bytes that whoever runs this may still write to the disk of a folder."""
    if not hasattr(os, "statvfs"):
        from shutil import disk_usage  # brings the libraries of three compressions along

        return disk_usage(folder).free
    told = os.statvfs(folder)
    return told.f_bavail * told.f_frsize


_BLOCK = 4096


def copies_well(target: int, start: int, offset: int) -> bool:
    """Tell whether the kernel's own copy, from `start` of some file to `offset` of this one, may beat reads and writes.

    It does where it shares whole blocks or has another machine do it. On a local disk it otherwise moves page by page,
    which is slower than reading and writing.
    """
    if not hasattr(os, "copy_file_range"):
        return False
    return start % _BLOCK == offset % _BLOCK == 0 or os.major(os.fstat(target).st_dev) == 0  # the device is no disk


_CLONE_RANGE = 0x4020940D
"""Linux' request FICLONERANGE: descriptor of the source, its start, the length (0: to its end), the target's start."""


def shares(source: int, start: int, target: int, offset: int) -> bool:
    """Let a file have another one's bytes from `start` to the end, at `offset`, as the same blocks on the disk.

    Returns False where nothing was done: the file system shares no blocks, or both do not begin with a whole one.
    """
    fcntl = module("fcntl")
    if fcntl is None or not sys.platform.startswith("linux") or start % _BLOCK or offset % _BLOCK:
        return False
    try:
        fcntl.ioctl(target, _CLONE_RANGE, struct.pack("qQQQ", source, start, 0, offset))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.EXDEV, errno.ENOSYS, errno.EPERM):
            return False
        raise
    return True


_NO_RESERVE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EPERM}


_TMPFS, _RAMFS = 0x01021994, 0x858458F6

_SERVED = {
    0x6969: "NFS", 0x65735546: "FUSE", 0xFF534D42: "CIFS", 0xFE534D42: "SMB 2", 0x517B: "SMB", 0x00C36400: "Ceph",
    0x0BD00BD0: "Lustre", 0x47504653: "GPFS", 0x01021997: "9P", 0x5346414F: "AFS", 0x6B414653: "AFS of Linux",
    0x19830326: "BeeGFS", 0x7461636F: "OCFS2", 0x01161970: "GFS2", 0x20030528: "OrangeFS", 0xAAD7AAEA: "PanFS",
    0x786F4256: "VirtualBox",
}  # fmt: skip
"""The numbers of file systems that several machines may share, as statfs tells them."""


@cache
def _libc() -> Any:
    """Return the C library of a 64-bit Linux, or None."""
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return None
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate") or not hasattr(libc, "fstatfs"):
        return None
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    return libc


def _reserves(target: int) -> Any:
    """Return Linux' own call that reserves room, or None where there is none or it does no good.

    `os.posix_fallocate` writes zeros where a file system lacks the call, and so does a file system in memory itself.
    """
    if (libc := _libc()) is None:
        return None
    import ctypes

    status = (ctypes.c_long * 32)()  # a struct statfs, and more; its first number is the file system's own
    if libc.fstatfs(target, status) == 0 and status[0] & 0xFFFFFFFF in (_TMPFS, _RAMFS):
        return None
    return libc.fallocate


def is_served(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder is on a file system that other machines may share; False where the system does not say."""
    if (libc := _libc()) is None:
        return False
    import ctypes

    status = (ctypes.c_long * 32)()
    return libc.statfs(os.fsencode(folder), status) == 0 and status[0] & 0xFFFFFFFF in _SERVED


def make_room(target: int, size: int) -> None:
    """Make a new file so long, and reserve its blocks at once where the file system can: writing them is faster then.

    Raises `OSError` where the disk has no room for it.
    """
    call = _reserves(target)
    if call is not None and size:
        import ctypes

        while call(target, 0, 0, size):
            code = ctypes.get_errno()
            if code in _NO_RESERVE:
                break
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        else:
            return
    os.ftruncate(target, size)
