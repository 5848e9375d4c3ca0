"""The Hub itself: two listeners (the Hub, and the storage origin it redirects to) over one set of repositories."""

import hashlib
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Literal

import tests.hub.server.routes.files
import tests.hub.server.routes.repos
import tests.hub.server.routes.upload
import tests.hub.server.routes.xet  # noqa: F401  # each file of routes registers its addresses
from tests.hub.server import accounts, routes
from tests.hub.server.accounts import User
from tests.hub.server.faults import Faults
from tests.hub.server.listener import Listener
from tests.hub.server.log import RequestLog
from tests.hub.server.objects import Objects
from tests.hub.server.store import Blob, Commit, Pull, Repo, Store, upload_mode
from tests.hub.server.wire import FileSlice, HubError, Reply, Request, error_reply
from tests.hub.server.xet import Cas

OWNER, OTHER, READER = "hf_owner-of-the-repos", "hf_somebody-else", "hf_owner-read-only"


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
        self._listeners = [Listener(self, "hub"), Listener(self, "cdn")]
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

    def answer(self, request: Request) -> Reply:
        """Answer a request by its route; what a handler did not expect is a 500, and is kept in `crashes`."""
        try:
            return routes.dispatch(self, request)
        except HubError as error:
            return error_reply(error)
        except Exception as error:
            self.crashes.append(error)
            return error_reply(HubError(500, f"Internal error of the test Hub: {error!r}"))

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
