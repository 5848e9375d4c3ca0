"""Who calls: which thread or task, and in the course of which function of another library."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Set
from threading import get_ident
from typing import Any


def frames() -> Iterator[tuple[str, str, Any]]:
    """Yield (function, module, frame) of everything that runs, from the inside out."""
    frame: Any = sys._getframe(1)
    while frame := frame.f_back:
        yield frame.f_code.co_name, frame.f_globals.get("__name__", ""), frame


def calling(functions: Set[tuple[str, str]]) -> str | None:
    """Return the module of the innermost of these functions, (name, module), that runs now; None where none does."""
    return next((module for name, module, _ in frames() if (name, module) in functions), None)


def who() -> tuple[int, int]:
    """Return what tells this thread, and the task of asyncio that runs in it, from others."""
    asyncio: Any = sys.modules.get("asyncio")
    running = asyncio is not None and asyncio._get_running_loop() is not None
    return get_ident(), id(asyncio.current_task()) if running else 0
