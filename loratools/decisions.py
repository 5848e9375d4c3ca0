"""What was decided and why, and what a user must know of it, wherever in the library it is found out.

`decided` is for whoever asks: `loratools -v`, or a program that listens to the logger `loratools`; `detailed` is what
`-vv` adds, of every tensor. `warned` is for
everybody: a warning on the command line and in its JSON, and in Python a warning of that logger, which is shown on
stderr unless the program says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loratools.errors import printable

_listeners: list[Callable[[str], None]] = []


def decided(what: str, *values: object) -> None:
    """Log a decision at level INFO; `values` are put into `what` as logging does it, where somebody listens.

    logging is not imported for it: where nobody else has, nobody listens.
    """
    if logging := sys.modules.get("logging"):
        logging.getLogger("loratools").info(what, *values)


def wants_detail() -> bool:
    """Tell whether anybody listens to `detailed`, where what it would say costs something."""
    logging = sys.modules.get("logging")
    return logging is not None and logging.getLogger("loratools").isEnabledFor(logging.DEBUG)


def detailed(what: str, *values: object) -> None:
    """Log a decision about one tensor or module at level DEBUG, as `decided` logs those about all of them."""
    if logging := sys.modules.get("logging"):
        logging.getLogger("loratools").debug(what, *values)


def warned(what: str, *values: object) -> None:
    """Warn of what the result does not show; `values` are put into `what` as logging does it.

    The command line that runs takes it (`warnings_to`), else the logger `loratools` at level WARNING.
    """
    if _listeners:
        _listeners[-1](what % values if values else what)
        return
    import logging

    logging.getLogger("loratools").warning("%s", printable(what % values if values else what))


@contextmanager
def warnings_to(take: Callable[[str], None]) -> Iterator[None]:
    """Hand every warning to `take`, from whichever thread it comes, while the block runs."""
    _listeners.append(take)
    try:
        yield
    finally:
        _listeners.remove(take)
