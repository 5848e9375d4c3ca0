"""`loratools`, and `python -m loratools`."""

from __future__ import annotations

import gc
import sys


def main() -> int:
    """Run the command line of this process and return its exit code."""
    # A command is over before cycles of garbage matter, and looking for them takes a tenth of importing torch.
    gc.disable()
    try:
        from loratools.cli._run import run
    except KeyboardInterrupt:
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
