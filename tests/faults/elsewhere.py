"""Run command lines as on another system: what Linux has and that system has not is taken away, in this process.

    python -m tests.faults.elsewhere COMMANDS SYSTEM=FOLDER ...

SYSTEM is `windows`, `macos` or `here`, with `+c` where the compiled C is there; COMMANDS is JSON, a list of command
lines for `loratools`, which run in FOLDER. For each system a line of JSON goes to stdout: exit code, stdout and stderr
of each. A system is a fork of this process, which has imported the libraries of others, and nothing of ours.

What `windows` is like, besides the calls, flags, signals and modules that it lacks:

- a descriptor of `os.open` translates ends of lines unless O_BINARY says otherwise, and folders are not opened;
- a text file has its `\\n` written as `\\r\\n`, and the encoding cp1252, where the code does not say what it wants;
- what is open, or mapped into memory, is not renamed or deleted, nor is a folder that holds it;
- a rename replaces nothing; fsync wants a descriptor that may write; bytes are locked by msvcrt, folders not at all.

Where paths are concerned this stays Linux: `os.name` decides what pathlib does.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

O_BINARY = 1 << 29
"""A bit that Linux does not use; `_open` takes it away."""

ABSENT = {
    "windows": (
        "O_CLOEXEC O_DIRECT O_DIRECTORY O_DSYNC O_NOATIME O_NOCTTY O_NOFOLLOW O_NONBLOCK O_PATH O_SYNC O_TMPFILE chown "
        "copy_file_range fchdir fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg getpgid "
        "getpriority getuid killpg lchown lockf major memfd_create mkfifo mknod nice openpty pipe2 posix_fadvise "
        "posix_fallocate posix_spawn pread preadv pwrite pwritev readv register_at_fork sched_getaffinity "
        "sched_setaffinity sched_yield sendfile setpriority setsid setuid splice sync sysconf uname wait4 waitid "
        "waitstatus_to_exitcode writev"
    ),
    "macos": (
        "O_DIRECT O_NOATIME O_PATH O_TMPFILE copy_file_range memfd_create pipe2 posix_fadvise posix_fallocate "
        "sched_getaffinity sched_setaffinity splice"
    ),
    "here": "",
}
MODULES = {
    "windows": ["fcntl", "grp", "pwd", "readline", "resource", "syslog", "termios", "tty"],
    "macos": [],
    "here": [],
}
SIGNALS = "SIGALRM SIGCHLD SIGCONT SIGHUP SIGKILL SIGPIPE SIGPROF SIGQUIT SIGSTOP SIGTSTP SIGUSR1 SIGUSR2"
_COMPILED = "linalg/native"


def import_libraries() -> None:
    """Import the libraries of others: those that are installed here are built for Linux, and know it."""
    import blake3  # noqa: F401
    import click  # noqa: F401
    import huggingface_hub.file_download  # noqa: F401
    import safetensors.torch  # noqa: F401
    import threadpoolctl  # noqa: F401
    import torch  # noqa: F401
    import tqdm  # noqa: F401


def become(system: str, *, compiled: bool) -> None:
    """Make this process one of another system; before loratools is imported, and for good."""
    import_libraries()
    if system == "windows":
        _windows()
    for name in ABSENT[system].split():
        if hasattr(os, name):
            delattr(os, name)
    for module in MODULES[system]:
        sys.modules[module] = None  # type: ignore[assignment]
    _load(own_symbols=system == "here", compiled=compiled)
    sys.platform = {"windows": "win32", "macos": "darwin", "here": sys.platform}[system]


def _load(*, own_symbols: bool, compiled: bool) -> None:
    """Let `ctypes` load no compiled C of ours, and not find the process's own symbols, as ctypes of Windows says it."""
    start = ctypes.CDLL.__init__

    def init(self: ctypes.CDLL, name: str | None, *arguments: Any, **options: Any) -> None:
        if name is None and not own_symbols:
            raise TypeError("argument of type 'NoneType' is not a path")
        if not compiled and Path(name or "").parent.as_posix().endswith(_COMPILED):
            raise OSError(f"{name}: no such library")
        start(self, name, *arguments, **options)

    ctypes.CDLL.__init__ = init  # type: ignore[method-assign]


def _windows() -> None:
    import fcntl

    os.O_BINARY = O_BINARY  # type: ignore[attr-defined]
    opened, synced, flags_of, flock = os.open, os.fsync, fcntl.fcntl, fcntl.flock
    get_flags, exclusive, at_once = fcntl.F_GETFL, fcntl.LOCK_EX, fcntl.LOCK_NB
    library = str(Path(os.__file__).parent)

    def open_descriptor(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        text = os.fsdecode(path)
        if Path(text).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), text)
        if not flags & O_BINARY and text != os.devnull and not _called_from(library):
            raise AssertionError(f"{text} is opened without O_BINARY")
        return opened(path, flags & ~O_BINARY, mode)

    def fsync(descriptor: int) -> None:
        if flags_of(descriptor, get_flags) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        synced(descriptor)

    def locking(descriptor: int, mode: int, count: int) -> None:
        try:
            flock(descriptor, exclusive | at_once)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None

    msvcrt = ModuleType("msvcrt")
    msvcrt.__dict__.update(LK_NBLCK=2, LK_UNLCK=0, locking=locking)
    sys.modules["msvcrt"] = msvcrt  # subprocess has been imported, and knows that this is Linux
    shutil._use_fd_functions = shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
    os.open, os.fsync = open_descriptor, fsync  # type: ignore[assignment]
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        setattr(os, name, _shared(getattr(os, name), replaces=name != "rename"))
    for place in (io, builtins):
        place.open = _text(open, library)  # type: ignore[attr-defined]
    for name in SIGNALS.split():
        signal.Signals._member_map_.pop(name, None)
        delattr(signal, name)
    for name in ("setitimer", "getitimer", "alarm", "pthread_sigmask", "pause", "sigwait"):
        delattr(signal, name)
    for name in [name for name in vars(mmap) if name.startswith(("MADV_", "MAP_", "PROT_"))]:
        delattr(mmap, name)


def _called_from(library: str) -> bool:
    """Tell whether the one who calls a patched function is Python itself or a library of others."""
    file = sys._getframe(2).f_code.co_filename
    return file.startswith((library, "<")) or "site-packages" in file


def _open_paths() -> Iterator[str]:
    """Yield the path of every file that this process has open, or mapped."""
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            yield str(Path(f"/proc/self/fd/{entry}").readlink())
        except OSError:  # the descriptor of this listing
            continue
    with io.FileIO("/proc/self/maps") as maps:
        yield from {line.split(maxsplit=5)[5] for line in maps.readall().decode().splitlines() if line.count("/")}


def _shared(call: Callable[..., None], *, replaces: bool) -> Callable[..., None]:
    """Return a rename or a deletion that fails where something of it is open, as Windows has it."""

    def checked(*paths: Any, **options: Any) -> None:
        full = [os.path.realpath(os.fsdecode(path)) for path in paths]
        for path in _open_paths():
            if any(path == each or path.startswith(each + os.sep) for each in full):
                raise PermissionError(errno.EACCES, "the file is in use by a process", path)
        if len(full) == 2 and os.path.lexists(full[1]) and (not replaces or Path(full[1]).is_dir()):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), full[1])
        call(*paths, **options)

    return checked


def _text(call: Callable[..., Any], library: str) -> Callable[..., Any]:
    """Return `open` with the defaults of Windows for text, for all but Python's own library and those of others."""

    def opened(file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
               newline: str | None = None, *rest: Any, **options: Any) -> Any:  # fmt: skip
        if "b" not in mode:
            if newline is None and set(mode) & set("wax+"):
                newline = "\r\n"
            encoding = encoding or "cp1252"
        return call(file, mode, buffering, encoding, errors, newline, *rest, **options)

    return opened


def main(system: str, commands: list[list[str]]) -> list[dict[str, Any]]:
    """Return what each command line did."""
    name, _, compiled = system.partition("+")
    become(name, compiled=bool(compiled))
    from loratools.cli._run import run

    results = []
    for arguments in commands:
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="cp1252" if name == "windows" else "utf-8") for _ in "ab")
        with redirect_stdout(out), redirect_stderr(err):
            code = run(arguments)
        texts = [stream.buffer.getvalue().decode(stream.encoding) for stream in (out, err) if not stream.flush()]
        results.append({"code": code, "out": texts[0], "err": texts[1]})
    return results


def start(system: str, commands: list[list[str]], folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Run command lines in a folder, in a process of their own; return what each did."""
    (results,) = start_all({system: folder}, commands, **environment)
    return results


def start_all(
    folders: Mapping[str, Path], commands: list[list[str]], **environment: str
) -> Iterator[list[dict[str, Any]]]:
    """Run command lines on each system, in its folder and a process of its own; yield what each did there."""
    places = [f"{system}={folder}" for system, folder in folders.items()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.elsewhere", json.dumps(commands), *places], check=False,
        cwd=next(iter(folders.values())), capture_output=True, text=True, env=dict(os.environ) | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line, _ in zip(done.stdout.splitlines(), folders, strict=True):
        yield json.loads(line)


def fork(place: str, commands: list[list[str]]) -> int:
    """Run command lines on one system in a fork of this process, which tells what they did; return how it ended."""
    system, _, folder = place.partition("=")
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(folder)
    print(json.dumps(main(system, commands)))
    sys.exit()


if __name__ == "__main__":
    import_libraries()
    sys.exit(max(abs(fork(place, json.loads(sys.argv[1]))) for place in sys.argv[2:]))
