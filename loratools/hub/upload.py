"""Files become one commit, whatever gets lost on the way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loratools.errors import HubError
from loratools.hub import faults
from loratools.hub.client import Hub, RemoteFile, quiet

_IN_MEMORY = 10_000_000  # bytes; the Hub stores anything larger as a large file, whatever its name


@dataclass(frozen=True, slots=True)
class Target:
    """Where files go, as it is now: `head` is None while the repository, or the branch, does not exist."""

    repo: str
    revision: str | None
    create_pr: bool
    exists: bool
    head: str | None
    tree: dict[str, RemoteFile]

    def has(self, name: str, content: Path | bytes) -> bool:
        """Tell whether the repository has this very file already."""
        return name in self.tree and self.tree[name].holds(content)


@dataclass(frozen=True, slots=True)
class Committed:
    """Where the files are: the commit, its address, and that of the pull request if one was asked for.

    `new` is False where there was nothing to commit; `notes` say what the card lacks, and what was not sent.
    """

    commit: str | None
    url: str
    pull_request: str | None = None
    new: bool = True
    notes: tuple[str, ...] = ()


def look(hub: Hub, repo: str, *, revision: str | None = None, create_pr: bool = False) -> Target:
    """Return the state of a repository and a branch of it; change nothing. Raises `HubError`."""
    exists = hub.read(lambda: hub.api.repo_exists(repo), repo)
    if not exists or not hub.read(lambda: hub.api.revision_exists(repo, revision or "main"), repo, revision):
        if exists and create_pr:
            raise HubError(f"{repo} has no revision {revision!r} to open a pull request against")
        return Target(repo, revision, create_pr, exists, None, {})
    head = hub.commit(repo, revision)
    return Target(repo, revision, create_pr, True, head, hub.tree(repo, head))


class Uploader:
    """Sends finished files one by one, and makes one commit of them at the end; nothing is visible before.

    A file that was sent may be deleted at once. The commit is made on top of the head that was seen first: if the
    branch moves in between, nothing is committed. If the answer to the commit is lost, the head is read again before
    anything is sent twice.
    """

    def __init__(self, hub: Hub, target: Target, *, private: bool = False) -> None:
        self.hub, self.unchanged = hub, 0
        self._operations: list[Any] = []
        self._digests: dict[str, tuple[str, str | None]] = {}
        self._removed: set[str] = set()
        if target.head is None:
            target = self._create(target, private)
        self.target = target

    def send(self, name: str, content: Path | bytes) -> None:
        """Upload a finished file, or bytes, unless the repository has it as it is; the file may be deleted then."""
        if self.target.has(name, content):
            self.unchanged += 1
        elif isinstance(content, bytes) or content.stat().st_size >= _IN_MEMORY:
            self._add(name, content)
        else:
            self._add(name, content.read_bytes())

    def remove(self, name: str) -> None:
        """Delete a file of the repository with the commit."""
        from huggingface_hub import CommitOperationDelete

        self._removed.add(name)
        self._operations.append(CommitOperationDelete(name))

    def commit(self, message: str) -> Committed:
        """Make the one commit; raise `HubError` if the branch moved since it was first looked at.

        A commit is never sent twice blindly: after an answer that was lost, or a fault of the server, the files at the
        head are compared with those that were sent. A second request carries the same parent, so only one can succeed.
        """
        hub, target = self.hub, self.target
        if not self._operations:
            return Committed(target.head, f"{hub.endpoint}/{target.repo}", new=False)
        known = self._pulls() if target.create_pr else {}
        last: Exception | None = None
        for attempt in range(faults.TRIES):
            try:
                with quiet():
                    made = hub.api.create_commit(
                        target.repo, self._operations, commit_message=message, revision=target.revision,
                        create_pr=target.create_pr, parent_commit=target.head,
                    )  # fmt: skip
                return Committed(made.oid, str(made.commit_url), made.pr_url)
            except Exception as error:
                if not faults.passes(error) and faults.status(error) not in (409, 412):
                    raise faults.in_words(error, target.repo, hub.endpoint, target.revision) from error
                last = error
            try:
                landed, head = self._landed(known), hub.commit(target.repo, target.revision)
            except HubError as error:
                lost = f"{target.repo}: the answer to the commit was lost, and so was the question whether it was made"
                hint = "Run it again later: what is there already is not sent twice."
                raise HubError(lost, [error.message], hint=hint) from last
            if landed:
                return landed
            if not target.create_pr and head != target.head:
                moved = f"{target.repo} changed while it was pushed to; nothing was committed"
                raise HubError(moved, hint="Run it again.") from last
            if attempt + 1 < faults.TRIES:
                faults.pause(last, attempt)
        assert last is not None
        raise faults.in_words(last, target.repo, hub.endpoint, target.revision) from last

    def _create(self, target: Target, private: bool) -> Target:
        api, repo, revision = self.hub.api, target.repo, target.revision
        if not target.exists:
            self.hub.read(lambda: api.create_repo(repo, private=private or None, exist_ok=True), repo)
        if revision not in (None, "main"):
            self.hub.read(lambda: api.create_branch(repo, branch=str(revision), exist_ok=True), repo)
        return look(self.hub, repo, revision=revision, create_pr=target.create_pr)

    def _add(self, name: str, data: bytes | Path) -> None:
        from huggingface_hub import CommitOperationAdd

        operation = CommitOperationAdd(name, data)
        target = self.target
        blob = None
        if isinstance(data, bytes):
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        self._digests[name] = operation.upload_info.sha256.hex(), blob
        # Storage is addressed by content: what was sent twice is there once.
        upload = partial(self.hub.api.preupload_lfs_files, revision=target.revision, create_pr=target.create_pr)
        self.hub.read(lambda: upload(target.repo, [operation]), target.repo, target.revision)
        self._operations.append(operation)

    def _landed(self, known: dict[str, str]) -> Committed | None:
        """Return the commit if it was made although its answer was lost."""
        hub, target = self.hub, self.target
        if target.create_pr:
            new = {ref: commit for ref, commit in self._pulls().items() if ref not in known}
        else:
            head = hub.commit(target.repo, target.revision)
            new = {"": head} if head != target.head else {}
        for ref, commit in new.items():
            if self._holds(hub.tree(target.repo, commit)):
                discussion = f"{hub.endpoint}/{target.repo}/discussions/{ref.rpartition('/')[2]}" if ref else None
                return Committed(commit, f"{hub.endpoint}/{target.repo}/commit/{commit}", discussion)
        return None

    def _holds(self, tree: dict[str, RemoteFile]) -> bool:
        def same(name: str) -> bool:
            sha256, blob = self._digests[name]
            return name in tree and (tree[name].sha256 == sha256 if tree[name].sha256 else tree[name].blob == blob)

        return all(map(same, self._digests)) and not self._removed & tree.keys()

    def _pulls(self) -> dict[str, str]:
        """Return the pull requests of the repository: ref -> its commit."""
        repo = self.target.repo
        refs = self.hub.read(lambda: self.hub.api.list_repo_refs(repo, include_pull_requests=True), repo)
        return {entry.ref: entry.target_commit for entry in refs.pull_requests or ()}
