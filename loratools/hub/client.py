"""One Hub, asked as one user: every read is retried, every byte is checked, every refusal is a sentence."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from loratools.errors import BadFile, HubError
from loratools.hub import faults
from loratools.version import __version__

T = TypeVar("T")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit as the Hub lists it: `sha256` of a large file, `blob` the git id of any other."""

    path: str
    size: int
    sha256: str | None
    blob: str

    def holds(self, content: Path | bytes) -> bool:
        """Tell whether a local file, or bytes, are these very bytes."""
        hasher = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
            return file.tell() == self.size and hasher.hexdigest() == (self.sha256 or self.blob)


class Hub:
    """A Hub as huggingface_hub knows it (HF_ENDPOINT, HF_TOKEN, `hf auth login`), or with a token given.

    The token is handed on and kept nowhere.
    """

    def __init__(self, *, token: str | None = None) -> None:
        from huggingface_hub import HfApi

        self.api = HfApi(token=token, library_name="loratools", library_version=__version__)
        self.endpoint = str(self.api.endpoint)
        self._known: dict[tuple[str, str, str], bytes] = {}

    def read(self, call: Callable[[], T], repo: str, revision: str | None = None) -> T:
        """Return `call()`, repeated after a failure that may pass; the call must be harmless when done twice.

        Raises `HubError`, in the user's words.
        """
        try:
            with quiet():
                return faults.retried(call)
        except Exception as error:
            refusal = faults.in_words(error, repo, self.endpoint, revision)
            if refusal is error:
                raise
            raise refusal from error

    def info(self, repo: str, revision: str | None = None) -> Any:
        """Return what the Hub says of a repository at a revision: `sha`, `card_data`, …"""
        return self.read(lambda: self.api.model_info(repo, revision=revision), repo, revision)

    def commit(self, repo: str, revision: str | None = None) -> str:
        """Return the commit that a branch or tag stands for now."""
        return str(self.info(repo, revision).sha)

    def tree(self, repo: str, commit: str) -> dict[str, RemoteFile]:
        """Return all files of a commit by path, as the Hub names them: a path may lead anywhere."""

        def listed() -> dict[str, RemoteFile]:
            entries: Any = self.api.list_repo_tree(repo, recursive=True, revision=commit)
            return {
                entry.path: RemoteFile(
                    entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id
                )
                for entry in entries
                if hasattr(entry, "blob_id")
            }  # fmt: skip

        return self.read(listed, repo, commit)

    def part(self, repo: str, commit: str, file: RemoteFile, start: int, stop: int) -> bytes:
        """Return the bytes [`start`, `stop`) of a file by one range request; nothing more is transferred."""
        return self.read(lambda: self._part(repo, commit, file.path, start, stop), repo, commit) if file.size else b""

    def small(self, repo: str, commit: str, file: RemoteFile, limit: int) -> bytes:
        """Return a whole small file, checked, asked for once; raise `BadFile` beyond `limit` bytes."""
        key = repo, commit, file.path
        if key in self._known:
            return self._known[key]
        if file.size > limit:
            raise BadFile(f"hf://{repo}/{file.path}: {file.size} bytes, at most {limit} were expected")

        def whole() -> bytes:
            data = self._part(repo, commit, file.path, 0, file.size) if file.size else b""
            if not file.holds(data):
                raise _damaged(repo, file)
            return data

        return self._known.setdefault(key, self.read(whole, repo, commit))

    def fetch(self, repo: str, commit: str, file: RemoteFile, folder: Path | None = None) -> Path:
        """Download a file to the cache, or into `folder`, going on where an earlier try ended; return its path.

        What arrives is compared with the digest that the Hub lists; a file that huggingface_hub had in its cache is
        taken as it is. Raises `HubError` when the bytes are wrong every time.
        """
        from huggingface_hub import try_to_load_from_cache

        known = None if folder else try_to_load_from_cache(repo, file.path, revision=commit)
        if isinstance(known, str):
            return Path(known)

        def down() -> Path:
            path = Path(self.api.hf_hub_download(repo, file.path, revision=commit, local_dir=folder))
            if not file.holds(path):
                for name in {path, path.resolve()}:  # in the cache the name is a link to the bytes
                    name.unlink(missing_ok=True)
                raise _damaged(repo, file)
            return path

        return self.read(down, repo, commit)

    def validate_card(self, repo: str, text: str) -> None:
        """Ask the Hub whether it takes a model card; raise `HubError` with each of its objections."""

        def ask() -> Any:
            from huggingface_hub import get_session

            body = {"content": text, "repoType": "model"}
            response = get_session().post(f"{self.endpoint}/api/validate-yaml", json=body, headers=self._headers())
            if response.status_code != 400:
                response.raise_for_status()
            return response.json()

        if objections := [str(objection.get("message")) for objection in self.read(ask, repo).get("errors", ())]:
            raise HubError(f"{repo}: the Hub refuses the front matter of README.md", objections)

    def _part(self, repo: str, commit: str, path: str, start: int, stop: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url

        url = hf_hub_url(repo, path, revision=commit, endpoint=self.endpoint)
        headers = {**self._headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            if response.status_code >= 400:
                response.read()
            _utils().hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start  # a server may send the whole file instead
            data = bytearray()
            for piece in response.iter_bytes():
                data += piece
                if len(data) >= skip + stop - start:
                    break
        if len(data) < skip + stop - start:
            raise faults.Damaged(f"{repo}: {path} ended after {len(data)} bytes, {stop} were expected")
        return bytes(data[skip : skip + stop - start])

    def _headers(self) -> dict[str, str]:
        headers: dict[str, str] = _utils().build_hf_headers(
            token=self.api.token, library_name="loratools", library_version=__version__
        )
        return headers


def _damaged(repo: str, file: RemoteFile) -> faults.Damaged:
    return faults.Damaged(
        f"{repo}: the bytes of {file.path} that arrived are not those of the Hub ({file.sha256 or file.blob})",
        hint="Try again; a proxy or a mirror in between may be at fault.",
    )


def _utils() -> Any:
    # Public, but its names are not listed in a way that type checkers of every version accept.
    return import_module("huggingface_hub.utils")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep huggingface_hub from drawing bars and from warning of what is retried here."""
    utils = _utils()
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    shown = not utils.are_progress_bars_disabled() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ
    logger.setLevel(logging.ERROR)
    if shown:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            utils.enable_progress_bars()
