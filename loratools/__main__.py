"""`loratools`, and `python -m loratools`."""

from __future__ import annotations

import atexit
import gc
import os
import sys

from loratools.cli._signals import Handlers, code_of

TYPE_CHECKING = False  # as checkers know it; typing itself takes longer to import than this
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> int:
    """Run the command line of this process and return its exit code."""
    try:
        with Handlers():
            # A command is over before cycles of garbage matter; looking for them takes a tenth of importing torch.
            gc.disable()
            atexit.register(gc.freeze)  # or the interpreter looks for them once more when it ends, in all it imported
            # Our threads each call BLAS by themselves; its own would be started with NumPy, and spin for a while.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            from loratools.cli._run import run

            return run()
    except KeyboardInterrupt as stopped:  # before `run` could say so
        return code_of(stopped)


def process() -> NoReturn:
    """Run the command line of this process, and end the process with its exit code.

    Threads are waited for, what was registered for the end is done, and what was printed is flushed. Then the process
    ends at once: the interpreter is not taken apart, which takes a tenth of a small command. Who has registered
    something before, such as a tool that measures what runs, has the interpreter end as ever.
    """
    code: list[int] = []
    if not atexit._ncallbacks():
        atexit.register(_end, code)  # the first to be registered is the last to be called
    code.append(main())
    sys.exit(code[0])


def _end(code: list[int]) -> None:
    if not code:  # an exception ends the process, and the interpreter shows it
        return
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError):  # the interpreter tries once more, and says so
        return
    os._exit(code[0])


if __name__ == "__main__":
    process()
