"""What makes the peers write as they always do, and sooner."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest


@pytest.fixture(scope="session", autouse=True)
def templates_are_compiled_once() -> Iterator[None]:
    """Keep what jinja compiles: PEFT fills in its model card's template at every save, most of whose time that is."""
    environment = pytest.importorskip("jinja2").Environment
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "compile", lru_cache(maxsize=64)(environment.compile))
        yield
