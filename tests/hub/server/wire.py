"""What travels: a request as read, a reply to send, and an error the client can understand."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

PIECE = 64 * 1024

Origin = Literal["hub", "cdn"]


class HubError(Exception):
    """An error reply: status, sentence, and the X-Error-Code that the client turns into an exception class."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(f"{status} {message}")
        self.status, self.message, self.code = status, message, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class FileSlice:
    """Bytes `start` to `stop` (exclusive) of a file on disk, so that shards are never held in memory."""

    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> "FileSlice":
        start, stop, _ = part.indices(len(self))
        return FileSlice(self.path, self.start + start, self.start + stop)

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes in pieces."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for offset in range(0, len(self), PIECE):
                yield file.read(min(PIECE, len(self) - offset))

    def read(self) -> bytes:
        """Return the bytes at once."""
        return b"".join(self.pieces())


@dataclass
class Reply:
    """Status, headers and body of one answer; Content-Length is always that of `body`."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | FileSlice = b""

    def pieces(self) -> Iterator[bytes]:
        """Yield the body in pieces."""
        if isinstance(self.body, FileSlice):
            yield from self.body.pieces()
            return
        for offset in range(0, len(self.body), PIECE):
            yield self.body[offset : offset + PIECE]


def json_reply(value: Any, status: int = 200, **headers: str) -> Reply:
    """Return `value` as a JSON answer."""
    spelled = {name.replace("_", "-"): text for name, text in headers.items()}
    return Reply(status, {"Content-Type": "application/json; charset=utf-8", **spelled}, json.dumps(value).encode())


def error_reply(error: HubError) -> Reply:
    """Return the answer for `error`, with the headers the client's error mapping reads."""
    headers = {"X-Error-Message": error.message.replace("\n", " "), **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    return json_reply({"error": error.message}, error.status, **headers)


@dataclass
class Request:
    """One request, its body spooled (to disk when large)."""

    origin: Origin
    method: str
    target: str
    headers: Message
    spool: SpooledTemporaryFile[bytes]

    @property
    def path(self) -> str:
        """Path of the target, still percent-encoded."""
        return urlsplit(self.target).path

    def query(self, name: str, default: str = "") -> str:
        """Return one value of the query string."""
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True).get(name, [default])[0]

    def body(self) -> bytes:
        """Return the whole body."""
        self.spool.seek(0)
        return self.spool.read()

    def pieces(self) -> Iterator[bytes]:
        """Yield the body in pieces."""
        self.spool.seek(0)
        while piece := self.spool.read(PIECE):
            yield piece

    def json(self) -> Any:
        """Return the body parsed as JSON; 400 when it is not."""
        try:
            return json.loads(self.body())
        except ValueError as error:
            raise HubError(400, f"Invalid JSON body: {error}") from error


def ranged(request: Request, body: bytes | FileSlice, headers: dict[str, str]) -> Reply:
    """Return `body`, or the single byte range asked for (206), or 416 when it starts past the end (RFC 9110 §14)."""
    size = len(body)
    headers = {"Accept-Ranges": "bytes", **headers}
    wanted = request.headers.get("Range")
    if wanted is None or not wanted.startswith("bytes=") or "," in wanted:
        return Reply(200, headers, body)
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    if not (first or last) or not (first + last).isdigit():
        return Reply(200, headers, body)
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if first and last and int(last) < start:
        return Reply(200, headers, body)
    if start >= size:
        return Reply(416, {**headers, "Content-Range": f"bytes */{size}"})
    return Reply(206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}, body[start:stop])
