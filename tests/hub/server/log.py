"""Every request the Hub saw, for tests to assert on."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

from tests.hub.server.wire import Origin, Request

_SMALL = 1 << 20


@dataclass
class Entry:
    """One request: where it went, whether it carried a credential, and how many body bytes moved each way."""

    origin: Origin
    host: str
    method: str
    target: str
    range: str | None
    has_auth: bool
    carries_token: bool
    user_agent: str
    bytes_in: int
    status: int = 0
    bytes_out: int = 0


class RequestLog:
    """The requests in order of arrival."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = [secret.encode() for secret in secrets]
        self._entries: list[Entry] = []
        self._lock = Lock()

    def add(self, request: Request, bytes_in: int) -> Entry:
        """Record `request`; the caller fills in status and bytes before it sends them, so a client never sees more."""
        seen = request.target.encode() + b"\n" + request.headers.as_bytes()
        if bytes_in <= _SMALL:
            seen += request.body()
        entry = Entry(
            origin=request.origin,
            host=request.headers.get("Host", ""),
            method=request.method,
            target=request.target,
            range=request.headers.get("Range"),
            has_auth="Authorization" in request.headers,
            carries_token=any(secret in seen for secret in self._secrets),
            user_agent=request.headers.get("User-Agent", ""),
            bytes_in=bytes_in,
        )
        with self._lock:
            self._entries.append(entry)
        return entry

    def select(self, method: str = ".*", target: str = "", origin: Origin | None = None) -> list[Entry]:
        """Return the entries whose method matches `method` whole, whose target contains `target` (both regex)."""
        with self._lock:
            entries = list(self._entries)
        return [
            entry
            for entry in entries
            if re.fullmatch(method, entry.method) and re.search(target, entry.target) and origin in (None, entry.origin)
        ]

    def bytes_out(self, method: str = ".*", target: str = "", origin: Origin | None = None) -> int:
        """Return how many body bytes the selected requests were answered with."""
        return sum(entry.bytes_out for entry in self.select(method, target, origin))

    def leaks(self) -> list[Entry]:
        """Return the requests that took a credential to the storage origin: always a defect of the client."""
        return [entry for entry in self.select(origin="cdn") if entry.has_auth or entry.carries_token]

    def clear(self) -> None:
        """Forget all requests so far."""
        with self._lock:
            self._entries.clear()
