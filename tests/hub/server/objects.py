"""Large file storage: objects named by sha256 on disk, signed addresses, single and multipart uploads."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from urllib.parse import urlencode

from tests.hub.server.wire import FileSlice, HubError, Request

_KEY = b"the loopback hub's signing key"


class Objects:
    """The objects under `root`; nothing is visible under its sha256 before its bytes have been checked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = Lock()
        self._counter = 0
        root.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        """Return where an object is kept."""
        return self.root / sha256

    def slice(self, sha256: str) -> FileSlice:
        """Return the whole of an object."""
        path = self.path(sha256)
        return FileSlice(path, 0, path.stat().st_size)

    def put(self, sha256: str, pieces: Iterable[bytes]) -> None:
        """Store an object; 400 when the bytes have another sha256."""
        with self._lock:
            self._counter += 1
            incoming = self.root / f"incoming-{self._counter}"
        digest = hashlib.sha256()
        with incoming.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != sha256:
            incoming.unlink()
            raise HubError(400, f"The uploaded bytes have sha256 {digest.hexdigest()}, expected {sha256}.")
        incoming.replace(self.path(sha256))

    def put_part(self, upload: str, number: int, pieces: Iterable[bytes]) -> str:
        """Store one part of a multipart upload and return its ETag."""
        digest = hashlib.md5(usedforsecurity=False)
        with (self.root / f"part-{upload}-{number}").open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
        return f'"{digest.hexdigest()}"'

    def complete(self, upload: str, sha256: str, parts: list[dict[str, object]]) -> None:
        """Join the parts of a multipart upload; 400 for a missing part, a wrong ETag or wrong bytes."""
        paths = [self.root / f"part-{upload}-{number + 1}" for number in range(len(parts))]
        for number, (path, part) in enumerate(zip(paths, parts, strict=True), start=1):
            if part.get("partNumber") != number or not path.is_file():
                raise HubError(400, f"InvalidPart: part {number} was not uploaded.")
            if part.get("etag") != f'"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}"':
                raise HubError(400, f"InvalidPart: part {number} has another ETag.")
        # The parts stay: a client whose reply was lost sends the completion again.
        self.put(sha256, (piece for path in paths for piece in FileSlice(path, 0, path.stat().st_size).pieces()))


def signed(base: str, path: str, **claims: str) -> str:
    """Return an address that carries its own permission, as storage addresses do: no credential goes with it."""
    return f"{base}{path}?{urlencode({**claims, 'X-Amz-Signature': _signature(path, claims)})}"


def check_signature(request: Request, *names: str) -> list[str]:
    """Return the named claims of a signed address; 403 for a bad signature, 400 when a credential comes as well."""
    if "Authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed; the signature or the Authorization header.")
    claims = {name: request.query(name) for name in names}
    if not hmac.compare_digest(request.query("X-Amz-Signature"), _signature(request.path, claims)):
        raise HubError(403, "SignatureDoesNotMatch")
    return list(claims.values())


def _signature(path: str, claims: dict[str, str]) -> str:
    return hmac.new(_KEY, repr((path, sorted(claims.items()))).encode(), "sha256").hexdigest()
