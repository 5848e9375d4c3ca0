"""Faults a test can arm: what goes wrong, on which requests, and how often."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

from tests.hub.server.wire import HubError, Reply, Request, error_reply


@dataclass
class Fault:
    """One fault on the requests whose method matches `method` whole and whose target contains `path` (both regex).

    It passes over the first `skip` matching requests, then strikes `times` times (None: always). What it does:

    - `before`: call this first (e.g. move the branch between the client's read and its commit).
    - `status` (+ `headers`, `code`, `message`): answer this instead; with `apply_first` the request still takes effect.
    - `lose_reply`: the request takes effect, then the connection closes without an answer.
    - `cut_request_after`: read this many body bytes of the request, then close the connection; nothing takes effect.
    - `cut_after`: send this many body bytes of the reply under the full Content-Length, then close the connection
      (a reply without a body is not sent at all).
    - `corrupt_at`: flip every bit of the body byte at this offset (negative: from the end); same length, same headers.
    - `hold_after`: send this many body bytes, set `held`, and wait until `release()` (or until the Hub stops).
    - `piece`, `pause`: send the body `piece` bytes at a time with `pause` seconds before each.
    - `ignore_range`: answer 200 with the whole body whatever Range asked for.
    - `redirect_loop`: answer 302 to the very same address.
    - `drop_headers`: leave these headers out of the reply.
    """

    method: str
    path: str
    times: int | None = 1
    skip: int = 0
    before: Callable[[], object] | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None
    message: str = "A fault armed by the test."
    apply_first: bool = False
    lose_reply: bool = False
    cut_request_after: int | None = None
    cut_after: int | None = None
    corrupt_at: int | None = None
    hold_after: int | None = None
    piece: int | None = None
    pause: float = 0.0
    ignore_range: bool = False
    redirect_loop: bool = False
    drop_headers: tuple[str, ...] = ()
    seen: int = 0
    hits: int = 0
    held: Event = field(default_factory=Event)
    _released: Event = field(default_factory=Event)

    def matches(self, method: str, target: str) -> bool:
        """Whether this fault is about such a request."""
        return bool(re.fullmatch(self.method, method) and re.search(self.path, target))

    def release(self) -> None:
        """Let replies held by `hold_after` go on."""
        self._released.set()

    def answer(self, request: Request, handle: Callable[[Request], Reply]) -> Reply | None:
        """Return the reply to send, or None to close the connection without one."""
        if self.before is not None:
            self.before()
        if self.ignore_range:
            del request.headers["Range"]
        if self.redirect_loop:
            return Reply(302, {"Location": request.target})
        if self.status is not None and not self.apply_first:
            return self._refusal()
        reply = handle(request)
        if self.lose_reply:
            return None
        if self.status is not None:
            return self._refusal()
        dropped = {name.lower() for name in self.drop_headers}
        reply.headers = {name: value for name, value in reply.headers.items() if name.lower() not in dropped}
        return reply

    def _refusal(self) -> Reply:
        assert self.status is not None
        reply = error_reply(HubError(self.status, self.message, self.code))
        reply.headers.update(self.headers)
        return reply

    def shape(self, pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
        """Yield the body of `size` bytes as this fault sends it; a short total means: close the connection after it."""
        # A cut or a hold concerns at least the last byte: a fault that changes nothing lets a test pass for nothing.
        hold = None if self.hold_after is None else min(self.hold_after, size - 1)
        end = size if self.cut_after is None else max(min(self.cut_after, size - 1), 0)
        sent = 0
        for piece in self._resized(pieces):
            if sent >= end:
                return
            piece = self._corrupted(piece[: end - sent], sent, size)
            if hold is not None and not self.held.is_set() and sent + len(piece) > hold:
                early = piece[: hold - sent]
                if early:
                    yield early
                self.held.set()
                self._released.wait()
                sent, piece = sent + len(early), piece[len(early) :]
            time.sleep(self.pause)
            yield piece
            sent += len(piece)

    def _resized(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            step = self.piece or len(piece)
            for offset in range(0, len(piece), step):
                yield piece[offset : offset + step]

    def _corrupted(self, piece: bytes, start: int, size: int) -> bytes:
        if self.corrupt_at is None:
            return piece
        at = self.corrupt_at % size - start
        if not 0 <= at < len(piece):
            return piece
        return piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]


class Faults:
    """The faults armed on one Hub."""

    def __init__(self) -> None:
        self._armed: list[Fault] = []
        self._lock = Lock()

    def add(self, method: str, path: str, **what: Any) -> Fault:
        """Arm a fault (see `Fault`) and return it; its `hits` counts the requests it struck."""
        fault = Fault(method, path, **what)
        with self._lock:
            self._armed.append(fault)
        return fault

    def rate_limit(self, method: str, path: str, *, header: str = "retry-after", **what: Any) -> Fault:
        """Arm a 429 that names its wait in one of the two header styles: `retry-after` or `ratelimit`."""
        styles = {
            "retry-after": {"Retry-After": "1"},
            "ratelimit": {"ratelimit": '"api";r=0;t=1', "ratelimit-policy": '"fixed window";"api";q=500;w=300'},
        }
        return self.add(method, path, status=429, headers=styles[header], message="Too Many Requests", **what)

    def busy_creation(self, **what: Any) -> Fault:
        """Arm the 409 that the Hub gives when the same user creates two repositories at once."""
        message = "Cannot create repo: another conflicting operation is in progress"
        return self.add("POST", "/api/repos/create", status=409, message=message, **what)

    def moved_branch(self, **what: Any) -> Fault:
        """Arm the 412 that answers a commit whose parent is no longer the head."""
        return self.add("POST", "/commit/", status=412, message="A commit has happened since. Please refresh.", **what)

    def take(self, method: str, target: str) -> Fault | None:
        """Return the first armed fault that strikes this request."""
        with self._lock:
            for fault in self._armed:
                if not fault.matches(method, target):
                    continue
                fault.seen += 1
                if fault.seen > fault.skip and (fault.times is None or fault.hits < fault.times):
                    fault.hits += 1
                    return fault
        return None

    def clear(self) -> None:
        """Disarm everything and let held replies go on."""
        with self._lock:
            for fault in self._armed:
                fault.release()
            self._armed.clear()
