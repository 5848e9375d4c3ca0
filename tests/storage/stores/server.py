"""A real S3 server on loopback (moto's), and a server of plain files, behind something that counts, cuts and breaks.

What is broken is said by rules: each sees the request and may answer in the store's place, or change its answer.
"""

from __future__ import annotations

import http.server
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock, Thread
from typing import Any


@dataclass
class Request:
    """One request as it came, and the bytes of the answer's body that were sent, and of its own body."""

    method: str
    path: str
    query: str
    range: str | None
    sent: int = 0
    taken: int = 0

    @property
    def first(self) -> int:
        """The first byte that is asked for."""
        return int((self.range or "bytes=0-").removeprefix("bytes=").partition("-")[0])


@dataclass
class Rule:
    """Breaks `times` of the requests that `meets`: by a status, a body cut after some bytes, or one that is shorter."""

    meets: Callable[[Request], bool]
    times: int = 1
    status: int | None = None
    cut: int | None = None
    shorten: int | None = None
    before: Callable[[], object] | None = None


@dataclass
class Log:
    """Every request, and the rules."""

    requests: list[Request] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    lock: Any = field(default_factory=Lock)

    def of(self, method: str, part: str = "") -> list[Request]:
        """Return the requests of a method whose path holds a text."""
        return [each for each in self.requests if each.method == method and part in each.path]

    @property
    def sent(self) -> int:
        """Bytes of the bodies of all answers to GET."""
        return sum(each.sent for each in self.requests if each.method == "GET")

    def clear(self) -> None:
        """Forget the requests and the rules."""
        self.requests.clear()
        self.rules.clear()

    def rule(self, request: Request) -> Rule | None:
        """Take a request down, and return the rule that it meets."""
        with self.lock:
            self.requests.append(request)
            for rule in self.rules:
                if rule.times > 0 and rule.meets(request):
                    rule.times -= 1
                    return rule
        return None


class Broken:
    """A WSGI application around another."""

    def __init__(self, app: Any, log: Log) -> None:
        self.app, self.log = app, log

    def __call__(self, environ: Mapping[str, Any], start: Any) -> Iterable[bytes]:
        request = Request(
            environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", ""), environ.get("HTTP_RANGE"),
            taken=int(environ.get("CONTENT_LENGTH") or 0),
        )  # fmt: skip
        rule = self.log.rule(request)
        if rule and rule.before:
            rule.before()
        if rule and rule.status:
            body = b"<Error><Code>InternalError</Code></Error>"
            start(f"{rule.status} Broken", [("Content-Length", str(len(body)))])
            return [body]
        if rule and rule.shorten is not None:
            return self._shortened(environ, start, request, rule.shorten)
        return self._counted(self.app(environ, start), request, rule.cut if rule else None)

    def _counted(self, body: Iterable[bytes], request: Request, cut: int | None) -> Iterator[bytes]:
        for piece in body:
            if cut is not None and request.sent + len(piece) > cut:
                yield piece[: cut - request.sent]
                raise ConnectionAbortedError("cut")
            request.sent += len(piece)
            yield piece

    def _shortened(self, environ: Any, start: Any, request: Request, by: int) -> Iterable[bytes]:
        told: list[Any] = []
        body = b"".join(self.app(environ, lambda *answer: told.append(answer)))[:-by]
        first = request.first
        changed = {"content-length": str(len(body)), "content-range": f"bytes {first}-{first + len(body) - 1}/*"}
        size = next(value for name, value in told[0][1] if name.lower() == "content-range").rpartition("/")[2]
        changed["content-range"] = changed["content-range"].replace("*", size)
        start(told[0][0], [(name, changed.get(name.lower(), value)) for name, value in told[0][1]])
        return self._counted([body], request, None)


class S3:
    """A running S3 server with one bucket, `bucket`."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, type: str, message: str, *args: Any) -> None:
                pass

        self.log = Log()
        app = Broken(DomainDispatcherApplication(create_backend_app), self.log)
        self._server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def env(self) -> dict[str, str]:
        """What a client's environment is to say."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIDSHOWN", "AWS_SECRET_ACCESS_KEY": "never-to-be-seen",
        }  # fmt: skip

    def reset(self) -> None:
        """Empty it, and make the bucket anew."""
        self._ask("POST", "/moto-api/reset")
        self._ask("PUT", "/bucket")
        self.log.clear()

    def put(self, folder: Path, key: str) -> None:
        """Store all files of a folder, or one file, under a key."""
        for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            if path.is_file():
                inner = f"/{path.relative_to(folder).as_posix()}" if folder.is_dir() else ""
                self._ask("PUT", f"/bucket/{key}{inner}", path.read_bytes())
        self.log.clear()

    def objects(self, start: str = "") -> dict[str, bytes]:
        """Return the bytes of all objects whose keys begin so."""
        from moto.s3.models import s3_backends

        keys = s3_backends["123456789012"]["aws"].buckets["bucket"].keys
        return {key: keys[key].value for key in keys if key.startswith(start)}

    def uploads(self) -> int:
        """Return the number of uploads that were begun and not finished."""
        from moto.s3.models import s3_backends

        return len(s3_backends["123456789012"]["aws"].buckets["bucket"].multiparts)

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        import urllib.request

        headers = {"Content-Type": "application/octet-stream"}  # or a body would be taken for a form
        request = urllib.request.Request(f"{self.endpoint}{path}", body, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Files:
    """A server of the files of a folder, with ranges, or without."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.log = Log()
        handler = partial(_Handler, folder=folder, log=self.log, ranges=ranges)
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, folder: Path, log: Log, ranges: bool) -> None:
        self.folder, self.log, self.ranges = folder, log, ranges
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        path, _, query = self.path.partition("?")
        self.log.rule(request := Request(self.command, path, query, self.headers.get("Range")))
        file = self.folder / path.lstrip("/")
        if not file.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return b""
        data, size = file.read_bytes(), file.stat().st_size
        if request.range and self.ranges:
            first, _, last = request.range.removeprefix("bytes=").partition("-")
            data = data[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{file.stat().st_mtime_ns:x}"')
        self.send_header("Last-Modified", self.date_time_string(file.stat().st_mtime))
        self.end_headers()
        request.sent = len(data) if self.command == "GET" else 0
        return data
