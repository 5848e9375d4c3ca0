"""What the tests of refusals share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import (
    LoraToolsError,
)
from loratools.surgery.merge import merge
from tests.faults.killer import hashes


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(kind: type[LoraToolsError], match: str, folder: Path, *adapters: Any, **options: Any) -> LoraToolsError:
    """Merge; expect a refusal in one sentence, and no file anywhere that was not there before."""
    before = hashes(folder)
    with pytest.raises(kind, match=match) as caught:
        merge(folder / "base", adapters or [folder / "adapter"], folder / "out", **options)
    assert hashes(folder) == before
    assert not (folder / "out").exists()
    assert not list(folder.glob(".*"))
    assert "\n" not in caught.value.message
    return caught.value


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the sentence with which it refuses."""
    try:
        return call()
    except LoraToolsError as error:
        return error.message
