"""`loratools`, and `python -m loratools`."""

from __future__ import annotations

import atexit
import gc
import os
import sys

from loratools.cli._signals import Handlers, code_of


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


if __name__ == "__main__":
    sys.exit(main())
