"""Fixtures: a running S3 server with this process pointed at it. Other conftest files may import them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage.stores.server import S3


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3]:
    """One server for all tests of a run; skipped where moto or obstore is missing."""
    pytest.importorskip("obstore")
    pytest.importorskip("moto.server")
    server = S3()
    yield server
    server.close()


@pytest.fixture
def s3(s3_server: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The server with an empty bucket, and the environment of this process pointed at it."""
    s3_server.reset()
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server
