"""Who makes a path of a reference such as `hf://org/name`: a module and its function, by name, imported when met.

And what reads the bytes of a file that has only its beginning on this machine. `import loratools` fills the first, so
it imports nothing: what comes before a program's handlers of signals must be short.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as checkers know it; typing itself takes longer to import than this
if TYPE_CHECKING:
    from pathlib import Path
    from typing import IO, Protocol

    class Far(Protocol):
        """A file whose bytes lie elsewhere: what is at its path has its size, and zeros for what was not fetched.

        `told` names its state for good: its address, size and version there.
        """

        @property
        def told(self) -> str: ...

        def read_into(self, buffer: memoryview, offset: int) -> None:
            """Fill a buffer from `offset` on; raise `LoraToolsError` where that cannot be."""
            ...

        def ahead(self, start: int, stop: int) -> None:
            """Say that the bytes [`start`, `stop`) are read next, in order."""
            ...

        def open(self) -> IO[bytes]:
            """Return it as a file that is open for reading."""
            ...

        def close(self) -> None:
            """Let go of what is held in memory."""
            ...


RESOLVERS: dict[str, tuple[str, str]] = {}
"""Beginning of a reference -> module and function."""

OUTPUTS: dict[str, tuple[str, str]] = {}
"""Beginning of a reference that is an output -> module and function, which makes an `atomic.afar.Landing` of it."""

FAR: dict[str, Far] = {}
"""Path, from the root on -> what reads the file."""

SHOWN: dict[str, str] = {}
"""Path of what was made of a reference -> the reference, without anything secret."""


def install(prefix: str, module: str, function: str) -> None:
    """Have `function` of `module` resolve references that begin with `prefix`.

    It is called as `function(reference, need, watch, folder)` and returns a local path; `folder()` makes a folder for
    what is fetched, which goes away when that has been read.
    """
    RESOLVERS[prefix] = (module, function)


def install_output(prefix: str, module: str, function: str) -> None:
    """Have `function` of `module` take outputs whose references begin with `prefix`: it is called with one."""
    OUTPUTS[prefix] = (module, function)


def reference_of(target: Path) -> tuple[str, str, str] | None:
    """Return the reference that an output is, and who takes it; None for a path.

    As a path `s3://bucket/key` has lost a stroke.
    """
    first = target.parts[0] if target.parts else ""
    home = OUTPUTS.get(f"{first}//")
    if home is None or type(target)(first).exists():
        return None
    return (f"{first}//{'/'.join(target.parts[1:])}", *home)


def is_far(path: Path) -> bool:
    """Tell whether the bytes of a file are read from elsewhere; a descriptor of it serves `storage/files.py` alone."""
    return bool(FAR) and str(path) in FAR


def forget(folder: Path) -> None:
    """Let go of all files in a folder."""
    inside = f"{folder}/"
    for path in [path for path in FAR if path.startswith(inside)]:
        FAR.pop(path).close()
    for path in [path for path in SHOWN if path.startswith(inside)]:
        del SHOWN[path]
