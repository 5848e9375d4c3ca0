"""Give what is finished its final name, in one step of the kernel where it has one.

What is replaced is never missing for a moment: old and new change places. Linux has renameat2 for it, macOS
renameatx_np; on a file system that knows neither, the old folder is moved aside first, and `leftovers` puts it back
after a kill.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

_NAME, _HERE, _ONLY_NEW, _EXCHANGE = (
    ("renameatx_np", -2, 4, 2) if sys.platform == "darwin" else ("renameat2", -100, 1, 2)
)
"""The function; its AT_FDCWD, for paths as they are; and its flags: fail where the target exists, or exchange both."""


def put(source: Path, target: Path, aside: Path, *, force: bool) -> Path | None:
    """Rename `source` to `target`; return where the folder that was there is now, or None where there was none.

    A folder that is replaced lies under the old name of `source` then, or under `aside`. Raises `FileExistsError` where
    `target` exists and `force` is not set, and `OSError`; then `target` is what it was.
    """
    if not force:
        _put_new(source, target)
        return None
    if not target.is_dir():
        source.replace(target)  # which replaces a file in one step
        return None
    if _rename(source, target, _EXCHANGE) == 0:
        return source
    target.rename(aside)
    try:
        source.replace(target)
    except BaseException:
        if not target.exists():
            aside.rename(target)
        raise
    return aside


def _put_new(source: Path, target: Path) -> None:
    number = _rename(source, target, _ONLY_NEW)
    if number == errno.EEXIST or (number and os.path.lexists(target)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if number:
        source.rename(target)


def _rename(source: Path, target: Path, flag: int) -> int:
    """Rename with a flag, and return 0, or the number of the error; ENOSYS where the system has no such function.

    A file system or a sandbox that does not know the flag answers in many ways (EINVAL, ENOTSUP, EPERM), and nothing
    has happened then.
    """
    if (function := _function()) is None:
        return errno.ENOSYS
    return function(os.fsencode(source), os.fsencode(target), flag)


@cache
def _function() -> Callable[[bytes, bytes, int], int] | None:
    import ctypes

    try:
        rename = ctypes.CDLL(None, use_errno=True)[_NAME]
    except (AttributeError, OSError, TypeError):  # an older C library; no such thing as the process's own symbols
        return None
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)

    def call(source: bytes, target: bytes, flag: int) -> int:
        return 0 if rename(_HERE, source, _HERE, target, flag) == 0 else ctypes.get_errno() or errno.EIO

    return call
