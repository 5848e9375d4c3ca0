"""The Hub itself: two listeners (the Hub, and the storage origin it redirects to) over one set of repositories."""

import hashlib
import sys
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from socket import SHUT_RDWR, socket
from tempfile import SpooledTemporaryFile
from typing import Any, Literal

from . import accounts, routes, routes_files, routes_repos, routes_upload  # noqa: F401  # routes register themselves
from .accounts import User
from .faults import Fault, Faults
from .objects import Objects
from .requestlog import Entry, RequestLog
from .store import Blob, Commit, Pull, Repo, Store, upload_mode
from .wire import PIECE, FileSlice, HubError, Origin, Reply, Request, error_reply
from .xet import Cas

OWNER, OTHER, READER = "hf_owner-of-the-repos", "hf_somebody-else", "hf_owner-read-only"


class _Dropped(Exception):
    """The connection is to be closed without (the rest of) an answer."""


class LocalHub:
    """A model Hub on 127.0.0.1: `endpoint`, tokens, repositories, armed `faults` and the request `log`.

    Tokens: `token` (user tester, may write under tester and lab), `other_token` (user stranger), `reader_token`
    (tester, read only). Storage answers on another origin (`cdn`: host localhost, a port of its own). Give
    `cas=True` for xet storage; else run clients with HF_HUB_DISABLE_XET=1. `crashes` holds unexpected exceptions.
    """

    token, other_token, reader_token = OWNER, OTHER, READER

    def __init__(self, root: Path, *, cas: bool = False) -> None:
        self.store = Store()
        self.objects = Objects(root / "objects")
        self.cas = Cas(root / "cas") if cas else None
        self.faults = Faults()
        self.tokens: Mapping[str, User] = {
            OWNER: User("tester", ("lab",)),
            READER: User("tester", ("lab",), "read"),
            OTHER: User("stranger"),
        }
        self.log = RequestLog(self.tokens)
        self.crashes: list[BaseException] = []
        self.page_size = 1000
        self.multipart_above = 1 << 30
        self.part_size = 16 << 20
        self._ids = count(1)
        self._listeners = [_Listener(self, "hub"), _Listener(self, "cdn")]
        self.endpoint = f"http://127.0.0.1:{self._listeners[0].server_port}"
        self.cdn = f"http://localhost:{self._listeners[1].server_port}"

    def __enter__(self) -> "LocalHub":
        for listener in self._listeners:
            listener.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.clear()
        for listener in self._listeners:
            listener.stop()

    @property
    def cas_url(self) -> str | None:
        """Address of xet storage, None without."""
        return self.cas.url if self.cas else None

    def next_id(self) -> str:
        """Return an id not used before."""
        return str(next(self._ids))

    def user(self, request: Request) -> User | None:
        """Return who sent a request."""
        return accounts.user_of(request, self.tokens)

    def find(self, request: Request, repo_id: str) -> Repo:
        """Return a repository the sender of a request may see."""
        return accounts.find(self.store, repo_id, self.user(request))

    def pull_url(self, repo: Repo, pull: Pull) -> str:
        """Return the address of a pull request."""
        return f"{self.endpoint}/{repo.id}/discussions/{pull.number}"

    def xet_file(self, sha256: str) -> tuple[str, int] | None:
        """Return the xet hash and size of a file in xet storage."""
        return self.cas.find(sha256) if self.cas else None

    def large_bytes(self, sha256: str) -> FileSlice:
        """Return a large file, taken out of xet storage when that is where it is; 404 NoSuchKey."""
        path = self.objects.path(sha256)
        if not path.exists():
            if self.cas is None:
                raise HubError(404, "NoSuchKey")
            self.cas.materialise(sha256, path)
        return self.objects.slice(sha256)

    # What tests say directly to the Hub, without a client in between.

    def seed(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        private: bool | None = None,
        gated: Literal[False, "auto", "manual"] | None = None,
        message: str = "seed",
        revision: str = "main",
    ) -> Commit:
        """Commit `files` to a branch of a repository, created when missing, and return the commit."""
        with self.store.lock:
            repo = self.store.repos.get(repo_id) or self.store.create(repo_id, repo_id.split("/")[0])
            repo.private = repo.private if private is None else private
            repo.gated = repo.gated if gated is None else gated
            head = repo.commit(revision)
            tree = dict(head.files)
            for path, data in files.items():
                if upload_mode(path, len(data), data[:512]) == "regular":
                    tree[path] = Blob.regular(data)
                    continue
                sha256 = hashlib.sha256(data).hexdigest()
                self.objects.put(sha256, [data])
                repo.large.add(sha256)
                tree[path] = Blob.large(sha256, len(data))
            ref = repo.ref(revision)
            assert ref is not None, f"{revision} is not a branch"
            return repo.record(ref, head, tree, message, "", repo.owner)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision, without the Hub's own .gitattributes."""
        tree = self.store.repos[repo_id].commit(revision).files
        return {path: self._bytes(blob) for path, blob in tree.items() if path != ".gitattributes"}

    def _bytes(self, blob: Blob) -> bytes:
        if blob.data is not None:
            return blob.data
        assert blob.sha256 is not None
        return self.large_bytes(blob.sha256).read()

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, newest first; the last is the Hub's own first commit."""
        return list(self.store.repos[repo_id].history(revision))


class _Listener(ThreadingHTTPServer):
    """One origin of a Hub."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, hub: LocalHub, origin: Origin) -> None:
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

    server: _Listener
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
                reply = fault.answer(request, self._answer) if fault else self._answer(request)
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

    def _answer(self, request: Request) -> Reply:
        try:
            return routes.dispatch(self.server.hub, request)
        except HubError as error:
            return error_reply(error)
        except Exception as error:
            self.server.hub.crashes.append(error)
            return error_reply(HubError(500, f"Internal error of the test Hub: {error!r}"))

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
