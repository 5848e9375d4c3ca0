"""A pickle that lies in a file by itself, as Python's `pickle` and PyTorch before 1.6 write it; only looked through.

Nobody here reads tensors of one. But a stranger who is handed such a file wants to know what it would have run.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratools.storage.pickles.unpickle import is_known
from loratools.storage.sources import open_file

_LOOKED_AT = 2**20
"""Bytes that are looked through; the pickle of a thousand tensors has about a hundred thousand."""

_PICKLES = 5
"""Pickles one after the other: PyTorch before 1.6 has a number, a version, the machine, the tensors, and their keys."""

_CALLS = frozenset({"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STOP"})
_PUTS, _GETS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"}), frozenset({"GET", "BINGET", "LONG_BINGET"})


def foreign(path: Path, start: int, stop: int) -> str | None:
    """Return the first name that the pickles in bytes [`start`, `stop`) of a file would import and no state dict has.

    None where there is none, or no pickle. Nothing is imported, and no object is built.
    """
    with open_file(path) as file:
        file.seek(start)
        raw = file.read(min(stop - start, _LOOKED_AT))
    whole = io.BytesIO(raw)
    for _ in range(_PICKLES):
        first, called = None, raw.startswith(b"\x80")  # text that begins as a pickle's name is not one
        try:
            for operation, name in _imports(whole):
                first = first or (name if name and not is_known(name) else None)
                called |= operation in _CALLS
        except (ValueError, UnicodeDecodeError, OverflowError):
            return first[:200] if first and called else None  # cut short or damaged: what it would run comes before
        if first:
            return first[:200]
    return None


def _imports(file: io.BytesIO) -> Iterator[tuple[str, str | None]]:
    """Yield every operation of the pickle at a file's place, with the name that it imports if it does."""
    memo: dict[Any, Any] = {}
    last: list[Any] = ["", ""]  # the two things put on the stack last, as far as they are strings
    for opcode, value, _ in pickletools.genops(file):
        argument: Any = value
        name = None
        if opcode.name in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            name = ".".join(str(each) for each in last)
        elif opcode.name in _PUTS:
            memo[argument] = last[1]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = last[1]
        elif opcode.name in _GETS:
            last = [last[1], memo.get(argument, "")]
        elif pickletools.markobject not in opcode.stack_after and opcode.stack_after:
            last = [last[1], argument if isinstance(argument, str) else ""]
        yield opcode.name, name
