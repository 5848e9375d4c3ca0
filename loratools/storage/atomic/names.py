"""Names of files that an output takes over from strangers: whether every system can write them.

Windows keeps the names of devices, with any suffix (`aux.json`), has characters that no name may hold, and drops dots
and spaces at the end; there a colon leads into a stream beside the file or to another drive. Windows and macOS take
names for one that differ in case alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from loratools.errors import BadFile

WINDOWS = os.name == "nt"
"""Whether names are written here that Windows must be able to write."""

_DEVICE = r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])"
_NEVER = r'[<>:"|?*\\\x00-\x1f]'
_LONGEST = 255


def fault(name: str) -> str | None:
    """Say why Windows cannot write a relative path with `/` between its parts; None where it can."""
    for part in name.split("/"):
        if match := re.search(_NEVER, part):
            return f"{match[0]!r} is in no name there"
        if part != part.rstrip(". ") and part not in (".", ".."):
            return "a dot or a space at the end of a name is lost there"
        if re.fullmatch(_DEVICE, part.split(".")[0].rstrip(" "), re.IGNORECASE):
            return f"{part.split('.')[0]} is a device there"
        if (len(part) if part.isascii() else len(part.encode("utf-16-le")) // 2) > _LONGEST:
            return f"a name has at most {_LONGEST} characters"
    return None


def faults(names: Iterable[str]) -> list[str]:
    """Return a line for each relative path that Windows cannot write, and for all that it takes for one."""
    ordered = sorted(names)
    lines = [f"{name!r}: {reason}" for name in ordered if (reason := fault(name))]
    return lines + [f"{' and '.join(map(repr, each))}: one name there" for each in clashes(ordered)]


def clashes(names: Iterable[str]) -> list[list[str]]:
    """Return the names that systems take for one which do not tell upper from lower case."""
    alike: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        alike.setdefault(_composed(name).casefold(), []).append(name)
    return [group for group in alike.values() if len(group) > 1]


def _composed(name: str) -> str:
    if name.isascii():
        return name
    from unicodedata import normalize

    return normalize("NFC", name)


def check(names: Iterable[str], where: Path | str) -> None:
    """Raise `BadFile`, which names `where` they are from, for names that cannot be written, where this is Windows."""
    if WINDOWS and (problems := faults(names)):
        raise BadFile(f"{where}: {len(problems)} of its names cannot be written on Windows", problems)


def check_case(names: Iterable[str], folder: Path, output: Path) -> None:
    """Raise `BadFile` for names that would be one name of an output, where the file system of `folder` is such."""
    if (alike := clashes(names)) and ignores_case(folder):
        lines = [" and ".join(group) for group in alike]
        raise BadFile(f"{output}: names that differ in case alone are one name on this file system", lines)


def ignores_case(folder: Path) -> bool:
    """Tell whether the file system of a folder that exists takes its name in other letters for the same."""
    other = folder.absolute().with_name(folder.name.swapcase())
    return other.name != folder.name and other.exists() and other.samefile(folder)
