"""Repositories as git sees them: blobs, commits, branches, tags and pull requests. One lock makes commits atomic."""

import fnmatch
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import RLock
from typing import Literal

from tests.hub.server.wire import HubError

# What the Hub writes at creation (shortened); it decides which uploads go to large file storage.
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.npz", "*.npy", "*.onnx", "*.zip")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
LFS_THRESHOLD = 10 * 1024 * 1024
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


def git_blob_oid(data: bytes) -> str:
    """Return git's blob id: sha1 of b"blob <size>\\0" + data."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def upload_mode(path: str, size: int, sample: bytes) -> Literal["lfs", "regular"]:
    """Return how the Hub wants a file: lfs for the patterns of .gitattributes, large files and binary files."""
    name = path.rsplit("/", 1)[-1]
    by_name = any(fnmatch.fnmatch(name, pattern) for pattern in LFS_PATTERNS)
    return "lfs" if by_name or size > LFS_THRESHOLD or b"\0" in sample else "regular"


@dataclass(frozen=True)
class Blob:
    """One file: its bytes, or the sha256 (and xet hash) under which large file storage has them."""

    oid: str
    size: int
    data: bytes | None = None
    sha256: str | None = None
    xet_hash: str | None = None
    pointer_size: int = 0

    @classmethod
    def regular(cls, data: bytes) -> "Blob":
        """Return a file kept in git itself."""
        return cls(git_blob_oid(data), len(data), data)

    @classmethod
    def large(cls, sha256: str, size: int, xet_hash: str | None = None) -> "Blob":
        """Return a file kept in large file storage; git has only its pointer file."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(git_blob_oid(pointer), size, None, sha256, xet_hash, len(pointer))


@dataclass(frozen=True)
class Commit:
    """One commit and the whole tree it names."""

    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Pull:
    """One pull request: its number, and the ref refs/pr/<number> that holds its commits."""

    number: int
    title: str
    description: str
    author: str
    base: str
    date: str

    @property
    def ref(self) -> str:
        """Name of the ref its commits go to."""
        return f"refs/pr/{self.number}"


@dataclass
class Repo:
    """One model repository."""

    id: str
    private: bool = False
    gated: Literal[False, "auto", "manual"] = False
    granted: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)
    large: set[str] = field(default_factory=set)

    @property
    def owner(self) -> str:
        """Namespace of the repository."""
        return self.id.split("/")[0]

    def now(self) -> str:
        """Return a date that only depends on the number of commits, so that ids repeat from run to run."""
        moment = EPOCH + timedelta(seconds=len(self.commits) + len(self.pulls))
        return moment.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def ref(self, revision: str) -> str | None:
        """Return the full ref a branch, tag, or pull request revision stands for."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def commit(self, revision: str) -> Commit:
        """Return the commit of a branch, tag, pull request, or (abbreviated) commit id; 404 RevisionNotFound."""
        ref = self.ref(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            commits = [commit for oid, commit in self.commits.items() if oid.startswith(revision)]
            if len(commits) == 1:
                return commits[0]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def file(self, revision: str, path: str) -> tuple[Commit, Blob]:
        """Return a file and the commit it was found in; 404 EntryNotFound names the commit as the Hub does."""
        commit = self.commit(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        return commit, commit.files[path]

    def history(self, revision: str) -> Iterator[Commit]:
        """Yield the commit of `revision` and its ancestors, newest first."""
        commit: Commit | None = self.commit(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def record(
        self, ref: str, parent: Commit | None, files: Mapping[str, Blob], title: str, message: str, author: str
    ) -> Commit:
        """Add a commit on top of `parent` and move `ref` to it."""
        tree = sorted((path, blob.oid) for path, blob in files.items())
        before = parent.oid if parent else None
        oid = hashlib.sha1(
            repr((self.id, len(self.commits), before, tree, title, message)).encode(), usedforsecurity=False
        ).hexdigest()
        commit = Commit(oid, before, title, message, author, self.now(), dict(files))
        self.commits[oid] = commit
        self.refs[ref] = oid
        return commit

    def open_pull(self, title: str, description: str, author: str, base: Commit, base_ref: str) -> Pull:
        """Open a pull request that starts at `base`."""
        pull = Pull(len(self.pulls) + 1, title, description, author, base_ref, self.now())
        self.pulls.append(pull)
        self.refs[pull.ref] = base.oid
        return pull


class Store:
    """All repositories of one Hub; hold `lock` around anything that reads a head and then moves it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lock = RLock()

    def create(self, repo_id: str, author: str, *, private: bool = False) -> Repo:
        """Create a repository with the Hub's own first commit."""
        repo = Repo(repo_id, private)
        first = {".gitattributes": Blob.regular(GITATTRIBUTES)}
        repo.record("refs/heads/main", None, first, "initial commit", "", author)
        self.repos[repo_id] = repo
        return repo
