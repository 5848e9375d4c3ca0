"""One origin of a Hub over HTTP: reads a request whole, logs it, and sends the answer as an armed fault shapes it."""

import sys
import threading
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SHUT_RDWR, socket
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

from tests.hub.server.faults import Fault
from tests.hub.server.log import Entry
from tests.hub.server.wire import PIECE, Origin, Reply, Request

if TYPE_CHECKING:
    from tests.hub.server.hub import LocalHub


class _Dropped(Exception):
    """The connection is to be closed without (the rest of) an answer."""


class Listener(ThreadingHTTPServer):
    """One origin of a Hub."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, hub: "LocalHub", origin: Origin) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.origin = hub, origin
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), name=f"local-hub-{origin}")
        self._open: set[socket] = set()
        self._lock = threading.Lock()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        # A client that goes away is its own affair; anything else is a fault of this Hub, which the fixture reports.
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.crashes.append(error)

    def stop(self) -> None:
        """Stop, closing connections that clients keep alive."""
        if self.thread.ident is not None:
            self.shutdown()
            self.thread.join()
        with self._lock:
            still_open = list(self._open)
        for connection in still_open:
            with suppress(OSError):
                connection.shutdown(SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Print nothing: the request log is the record."""

    def _serve(self) -> None:
        hub = self.server.hub
        fault = hub.faults.take(self.command, self.path)
        try:
            with SpooledTemporaryFile[bytes](max_size=1 << 20) as spool:
                whole = self._read(spool, fault)
                request = Request(self.server.origin, self.command, self.path, self.headers, spool)
                entry = hub.log.add(request, spool.tell())
                if not whole:
                    raise _Dropped
                reply = fault.answer(request, hub.answer) if fault else hub.answer(request)
                if reply is None:
                    raise _Dropped
                self._send(request, reply, entry, fault)
        except _Dropped:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read(self, spool: SpooledTemporaryFile[bytes], fault: Fault | None) -> bool:
        # The whole body is read before any answer: else the rest would be taken for the next request.
        left = int(self.headers.get("Content-Length", 0))
        limit = fault.cut_request_after if fault else None
        wanted = left if limit is None else min(left, limit)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                spool.write(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        while wanted and (piece := self.rfile.read(min(PIECE, wanted))):
            spool.write(piece)
            wanted -= len(piece)
        return not wanted and limit is None

    def _send(self, request: Request, reply: Reply, entry: Entry, fault: Fault | None) -> None:
        size = len(reply.body)
        if fault and fault.cut_after is not None and (size == 0 or request.method == "HEAD"):
            raise _Dropped  # there is no body to cut
        entry.status = reply.status
        self.send_response(reply.status)
        trace = request.headers.get("X-Amzn-Trace-Id") or uuid.uuid4().hex
        for name, value in {"X-Request-Id": trace, "Content-Length": str(size), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method == "HEAD":
            return
        for piece in fault.shape(reply.pieces(), size) if fault else reply.pieces():
            # Counted before it is sent: whoever has the bytes finds them in the log.
            entry.bytes_out += len(piece)
            self.wfile.write(piece)
        if entry.bytes_out < size:
            raise _Dropped
