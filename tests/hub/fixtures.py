"""Fixtures: a running local Hub with the client of this process pointed at it. Other conftest files may import them."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest
from huggingface_hub import close_session
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

import loratools.hub.faults
from tests.hub.server import LocalHub
from tests.hub.server.client import aim

# Raised inside the client's own upload, in every version; it says nothing about the code under test.
_CLIENTS_OWN = "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let tests that use a Hub pass under `-W error` in spite of the client's own deprecation warning."""
    for item in items:
        if {"hub", "xet_hub"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.filterwarnings(_CLIENTS_OWN))


@pytest.fixture
def hub_home(tmp_path: Path) -> Path:
    """The HF_HOME of this test."""
    home = tmp_path / "hf-home"
    home.mkdir()
    return home


def _running(hub: LocalHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    aim(monkeypatch, hub, home)
    close_session()  # a client made before knows another environment
    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    with hub:
        yield hub
        close_session()
    if not quiet:
        enable_progress_bars()
    assert hub.crashes == []


@pytest.fixture
def hub(tmp_path: Path, hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A running Hub without xet storage."""
    yield from _running(LocalHub(tmp_path / "hub"), hub_home, monkeypatch)


@pytest.fixture
def xet_hub(tmp_path: Path, hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A running Hub with xet storage, for clients in a process of their own."""
    yield from _running(LocalHub(tmp_path / "hub", cas=True), hub_home, monkeypatch)


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make back-off, the client's and ours, take no time; the list records how long it would have slept."""
    seconds: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": seconds.append})
    for module in (huggingface_hub.utils._http, huggingface_hub.file_download, loratools.hub.faults):
        monkeypatch.setattr(module, "time", clock)
    return seconds
