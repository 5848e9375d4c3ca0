"""What was decided and why, for whoever asks: `loratools -v`, or a program that listens to the logger `loratools`."""

from __future__ import annotations

import sys


def decided(what: str, *values: object) -> None:
    """Log a decision at level INFO; `values` are put into `what` as logging does it, where somebody listens.

    logging is not imported for it: where nobody else has, nobody listens.
    """
    if logging := sys.modules.get("logging"):
        logging.getLogger("loratools").info(what, *values)
