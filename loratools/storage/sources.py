"""Where an input lies: a path, or a reference such as `hf://org/name` of which an installed resolver makes a path.

A resolver is installed by name (`resolvers.py`) and imported when a reference is met: nothing below `hub/` imports it,
and every function that opens an adapter or a model takes references.
"""

from __future__ import annotations

import atexit
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from loratools.errors import BadFile, InvalidOption, LoraToolsError
from loratools.storage.atomic.inputs import Stamp, see, stamp, watched
from loratools.storage.resolvers import FAR, RESOLVERS, SHOWN, forget, reference_of

if TYPE_CHECKING:
    from loratools.parallel import Progress

Location = str | os.PathLike[str]
"""A path, or a reference. A reference is a text: a `Path` has lost one of its slashes."""

_REFERENCE = r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?"
_CACHED = r"/models--(?:([^/]+?)--)?([^/]+)/snapshots/([0-9a-f]{7,64})(?:/|\Z)"
_GENERIC = {"adapter_model", "adapters", "model", "pytorch_model", "pytorch_lora_weights", "diffusion_pytorch_model"}
_FILES = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".npz", ".ckpt"}

Need = Literal["adapter", "checkpoint", "header"]
"""What of an input will be read: an adapter's files, a model's, or the headers of either."""

Watch = Callable[[int], AbstractContextManager["Progress"]]
"""Begins to show progress: bytes in all -> a context with the function that takes the bytes since the last call."""

Fetching = Callable[[str, int], AbstractContextManager["Progress"]]
"""The same for references: the reference, and the bytes in all."""


class Session:
    """What became of references in the course of one task: each was resolved once.

    `names` are paths that go away with the task, and the references that they stood for; `folders` hold them. `read` is
    what was made of inputs already (`remembered`).
    """

    def __init__(self, fetching: Fetching | None = None) -> None:
        self.fetching = fetching or (lambda reference, total: nullcontext(lambda count: None))
        self.paths: dict[tuple[str, Need], Path] = {}
        self.names: dict[str, str] = {}
        self.read: dict[object, Any] = {}
        self.folders = ExitStack()
        self.made: list[Path] = []

    def named(self, text: str) -> str:
        """Return a text with references in the place of paths that only this task knows."""
        for path, reference in self.names.items():
            text = text.replace(path, reference)
        return text

    def folder(self) -> Path:
        """Return a new folder that goes away with the task, or with the process."""
        from loratools.storage.atomic import temporary

        self.made.append(made := self.folders.enter_context(temporary("headers")).resolve())
        return made

    def close(self) -> None:
        """Remove the folders, and let go of what is read for files in them."""
        for folder in self.made:
            forget(folder)
        self.folders.close()


_REMEMBERED = 64

_CURRENT: ContextVar[Session | None] = ContextVar("session", default=None)


def is_reference(location: object) -> bool:
    """Tell whether an input is a text that begins as a reference does, and no path that exists."""
    return isinstance(location, str) and location.startswith(tuple(RESOLVERS)) and not Path(location).exists()


def as_path(location: object) -> Path:
    """Return the path that a text or a path-like value is; raise `InvalidOption` for anything else."""
    if isinstance(location, str | os.PathLike):
        if not os.fspath(location):
            raise InvalidOption("expected a path or a reference such as hf://org/name, found an empty text")
        return Path(location)
    raise InvalidOption(f"expected a path or a reference such as hf://org/name, found {type(location).__name__}")


def local(location: Location, need: Need = "adapter") -> Path:
    """Return a path for a path or a reference; what a reference names is fetched as far as `need` says.

    Raises what the resolver raises (`HubError`, `BadFile`), and `InvalidOption` for what is neither a text nor a path.
    """
    if isinstance(location, Path) and (written := reference_of(location)):  # an output, read again
        location = written[0]
    if not isinstance(location, str) or not is_reference(location):
        return as_path(location)
    current = _CURRENT.get()
    if current is None:
        current = Session()
        atexit.register(current.close)
    enough: tuple[Need, ...] = ("header", "checkpoint", "adapter") if need == "header" else (need,)
    for fetched in enough:
        if (location, fetched) in current.paths:
            return current.paths[location, fetched]
    module, function = next(where for prefix, where in RESOLVERS.items() if location.startswith(prefix))
    resolve = getattr(import_module(module), function)
    path: Path = resolve(location, need, partial(current.fetching, location), current.folder)
    current.paths[location, need] = path
    if known := [place for place in (path, path.parent) if str(place) in SHOWN]:
        current.names[str(known[0])] = SHOWN[str(known[0])]
    elif need == "header":
        current.names[str(path)] = location
    return path


def remembered() -> dict[object, Any]:
    """Return what this task has made of its inputs (`remember`), by what it was made of; {} outside a task."""
    current = _CURRENT.get()
    return {} if current is None else current.read


def remember(key: object, made: object) -> None:
    """Keep what was made of inputs while this task runs, the last few; outside a task nothing is kept."""
    if current := _CURRENT.get():
        current.read[key] = made
        while len(current.read) > _REMEMBERED:
            current.read.pop(next(iter(current.read)))


def stamps(folder: Path, names: Iterable[str]) -> tuple[Stamp | None, ...]:
    """Return what some files of a folder are now, None for one that is not there."""

    def now(name: str) -> Stamp | None:
        try:
            return stamp((folder / name).stat())
        except OSError:
            return None

    return tuple(map(now, names))


@contextmanager
def session(fetching: Fetching | None = None) -> Iterator[Session]:
    """Resolve each reference once while a task runs, name it in errors as the user did, and watch the inputs.

    `fetching` shows progress. Within another session, that one goes on.
    """
    if outer := _CURRENT.get():
        yield outer
        return
    current = Session(fetching)
    token = _CURRENT.set(current)
    try:
        with watched():
            yield current
    except LoraToolsError as error:
        error.reword(current.named)
        raise
    finally:
        _CURRENT.reset(token)
        current.close()


def origin(path: Path) -> tuple[str, str | None]:
    """Return what an input is called where nobody knows this machine, and its commit where it came from the Hub.

    That is the repository of what a reference named, which lies in the Hub's cache or in a folder of this task; else
    the name of its folder, or of its file where that says more than `adapter_model`.
    """
    whole = path.absolute()
    current = _CURRENT.get()
    for place, reference in (current.names if current else {}).items():
        if whole.is_relative_to(place) and (match := re.match(_REFERENCE, reference)):
            return match[1], match[2]
    if match := re.search(_CACHED, whole.as_posix()):
        return "/".join(filter(None, (match[1], match[2]))), match[3]
    generic = whole.suffix and whole.name.partition(".")[0].partition("-")[0] in _GENERIC
    return (whole.parent.name if generic else whole.stem if whole.suffix in _FILES else whole.name) or "unnamed", None


@contextmanager
def known_as(references: Mapping[str, str]) -> Iterator[None]:
    """Have inputs called by references while the block runs: path -> what lies there, as it is on the Hub."""
    with session() as current:
        before = dict(current.names)
        current.names |= references
        try:
            yield
        finally:
            current.names = before


def refuse_pointer(begin: bytes, path: Path) -> None:
    """Raise `BadFile` for a file that begins as the pointers do that Git-LFS leaves in the place of files."""
    if begin.startswith(b"version https://git-lfs"):
        hint = "Fetch it with `git lfs pull`."
        raise BadFile(f"{path}: this is a Git-LFS pointer, not the file itself", hint=hint)


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, with the operating system's refusals put in a sentence (`BadFile`)."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise BadFile(f"{path}: not a regular file")  # opening a pipe would wait for its writer
        far = FAR.get(str(path)) if FAR else None
        file = far.open() if far else path.open("rb")
        see(path, os.fstat(file.fileno()))
        return file
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file") from None
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from None


_REPOSITORY = r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?"


def absent(path: Path | str, *, on_hub: bool = True) -> BadFile:
    """Return the error for a path that is not there, with what may have been meant.

    Args:
        path: The path as the user gave it.
        on_hub: Whether a reference to the Hub could stand there. Default: yes.
    """
    if written := reference_of(Path(path)):
        hint = "Copy it from the store to a folder here, and give that."
        return BadFile(f"{written[0]}: this needs a file or a folder here", hint=hint)
    return BadFile(f"{path}: no such file or folder", hint=_meant(Path(path), str(path), on_hub))


def _meant(path: Path, text: str, on_hub: bool) -> str | None:
    from difflib import get_close_matches

    if on_hub and re.fullmatch(_REPOSITORY, text) and not path.parent.exists():
        return f"A repository of the Hub is written hf://{text}"
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return None
    near = get_close_matches(path.name, beside, 1, 0.75)
    return f"Did you mean {path.parent / near[0]}?" if near else None
