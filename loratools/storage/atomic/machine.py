"""Which machine made a hidden folder, where a lock does not tell: on the file system of a server.

A lock of a folder is known on its own machine alone there, by NFS, sshfs and their like, so that what a run on another
machine holds looks as if nobody did. The machine is in the name of what it makes; what no name of this one is on is
left alone as long as something in it is new.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from loratools.storage.atomic import system

_LENGTH = 12

NEW = 86400
"""Seconds after the last change in a folder for which its run may be alive."""


@cache
def mark() -> str:
    """Return four hex digits for this machine: for its name, and on Linux for its kernel since it was started.

    A container has a name of its own, and often mounts of its own, through which no lock of another is seen.
    """
    from platform import node  # what only reads makes no folder

    from blake3 import blake3

    own = node()
    with suppress(OSError):  # no Linux
        own += Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    return blake3(own.encode()).hexdigest()[:4]


def perhaps_elsewhere(folder: Path) -> bool:
    """Tell whether a hidden folder may be one in which a run on another machine works.

    Args:
        folder: A hidden folder, `.NAME.partial-XXXXXXXXMMMM` with the mark of its machine, or one without a mark.

    Returns:
        True on the file system of a server, where the name does not end in this machine's mark, and the folder or
        something in it was changed in the last day, by the clock of the server or of this machine.
    """
    token = folder.name.rpartition("-")[2]
    if (len(token) == _LENGTH and token.endswith(mark())) or not system.is_served(folder):
        return False
    return time.time() - max(_changed(path) for path in (folder, *folder.rglob("*"))) < NEW


def token() -> str:
    """Return what makes the name of a hidden folder one of its own: eight hex digits by chance, and the `mark`.

    Example:
        >>> len(token())
        12
    """
    return os.urandom(4).hex() + mark()


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:  # it has just gone, so somebody is at work
        return time.time()
