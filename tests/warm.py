"""Start `loratools` without the wait: a process that has imported what commands need forks one for each command line.

A start takes two seconds of a core, most of them for torch, and the tests start loratools hundreds of times. So the
`loratools` that tests find on their PATH (see `write_script`) asks the process that `Server` holds, over a socket, for
a fork of itself. The fork takes over the asker's streams, folder, environment and arguments, runs `main`, and its exit
code goes back: it is a process of its own in all that a test can see. Where the asker's environment differs in what
Python or torch read as they start, and on systems other than Linux, the script starts an ordinary process instead.
`COLD=1` in the environment always does so. That loratools starts by itself is proven by test_startup.py, tests/faults
and what CI runs of the README.

`python -m tests.warm NAME` serves on the abstract socket NAME until its stdin ends, which it does with the process
that started it, however that one ends.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import resource
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

READ_AT_START = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "TORCH", "LC_", "LANG", "LD_", "CUDA", "COLD")
"""What the names of environment variables begin with that a started process can no longer obey."""

ASK = """
import json, os, socket, sys
streams = []
for number in (0, 1, 2):
    try:
        os.fstat(number)
        streams.append(number)
    except OSError:
        pass
message = json.dumps([streams, sys.argv[2:], os.getcwd(), dict(os.environ)], ensure_ascii=True).encode()
server = socket.socket(socket.AF_UNIX)
server.connect("\\0" + sys.argv[1])
socket.send_fds(server, [len(message).to_bytes(4, "big")], streams)
server.sendall(message)
answer = b""
while piece := server.recv(16):
    answer += piece
os._exit(int(answer) if answer else 250)
"""
"""What the script runs: exits as the fork did; 251 if that may not run warm, 250 if it was killed."""


class Server:
    """The process that forks; it ends with `stop`, or with the process that made it."""

    def __init__(self, env: dict[str, str], folder: Path) -> None:
        self.name = f"loratools-tests-{os.getpid()}-{id(self)}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", self.name], env=env, cwd=folder, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.read(6) == b"ready\n"

    def stop(self) -> None:
        self._process.communicate()


def write_script(folder: Path, server: Server | None) -> None:
    """Write `loratools` into a folder of the PATH."""
    script = folder / "loratools"
    cold = f'exec "{sys.executable}" -m loratools "$@"\n'
    if server is None:
        script.write_text(f"#!/bin/sh\n{cold}")
    else:
        (folder / "ask.py").write_text(ASK)
        ask = f'"{sys.executable}" -I -S "{folder}/ask.py" {server.name} "$@"'
        script.write_text(f"#!/bin/sh\n{ask}\ncode=$?\n[ $code -eq 251 ] || exit $code\n{cold}")
    script.chmod(0o755)


def serve(name: str) -> None:
    """Answer askers until stdin ends."""
    started_with = at_start(dict(os.environ))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        os.write(1, b"ready\n")
        while sys.stdin.buffer not in (ready := select.select([listener, sys.stdin.buffer], [], [])[0]):
            assert ready
            with contextlib.suppress(ChildProcessError):  # collect the forks that have answered
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
            asker = listener.accept()[0]
            if os.fork() == 0:
                listener.close()
                answer(asker, started_with)
            asker.close()


def at_start(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(READ_AT_START)}


def answer(asker: socket.socket, started_with: dict[str, str]) -> None:
    """Run one command line in a fork of this fork, send its exit code, and end."""
    length, streams, _, _ = socket.recv_fds(asker, 4, 3)
    size, message = int.from_bytes(length, "big"), b""
    while len(message) < size:
        message += asker.recv(size - len(message))
    numbers, arguments, folder, env = json.loads(message)
    code = 251
    if at_start(env) == started_with:
        process = os.fork()
        if process == 0:
            asker.close()
            become(dict(zip(numbers, streams, strict=True)), arguments, folder, env)
        for stream in streams:
            os.close(stream)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        code = 128 - code if code < 0 else code  # as a shell reports a signal
    with contextlib.suppress(OSError):  # the asker may be gone
        asker.sendall(str(code).encode())
    os._exit(0)


def become(streams: dict[int, int], arguments: list[str], folder: str, env: dict[str, str]) -> None:
    """Take over what makes a process another, run loratools, and end."""
    copies = {number: os.dup(stream) for number, stream in streams.items()}
    for number in (0, 1, 2):
        os.close(number)
    for number, copy in copies.items():
        os.dup2(copy, number)
    os.closerange(3, 256)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    if limits := env.get("LIMITS"):
        limit(*map(int, limits.split()))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["loratools", *arguments]
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False)) if 0 in streams else None  # type: ignore[assignment]
    for number, attribute in ((1, "stdout"), (2, "stderr")):
        stream = None
        if number in streams:
            raw = io.FileIO(number, "w", closefd=False)
            buffered = number == 2 or os.isatty(number)
            stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", line_buffering=buffered)
        setattr(sys, attribute, stream)
    from loratools.__main__ import main

    code = 1
    try:
        code = main()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.flush()
        os._exit(code)


def limit(seconds: int, nbytes: int) -> None:
    """Let this process have so much processor time, and so much more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + nbytes,) * 2)


def import_what_commands_need() -> None:
    """Import loratools but for its network side, which reads the environment as it is imported."""
    import loratools

    for module in pkgutil.walk_packages(loratools.__path__, "loratools."):
        if not module.name.startswith(("loratools.hub", "loratools.__main__", "loratools.linalg.native.build")):
            with contextlib.suppress(ImportError):  # of an extra
                importlib.import_module(module.name)
    assert "huggingface_hub" not in sys.modules, "a fork could no longer be pointed at another Hub"


if __name__ == "__main__":
    import_what_commands_need()
    serve(sys.argv[1])
