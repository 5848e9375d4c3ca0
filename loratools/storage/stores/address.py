"""`s3://bucket/key`, `gs://…`, `az://container/key`, `https://host/path`: where something lies, and how it is shown."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit

from loratools.errors import BadFile, InvalidOption

_SECRET = re.compile(r"(?<=://)[^/\s@\"']*@|\?[^\s\"'<>)]*|#[^\s\"'<>)]*")


def shown(text: str) -> str:
    """Return a text with nothing in its addresses that may be secret: neither who asks, nor what comes after `?`.

    >>> shown("https://me:word@host/model?token=1")
    'https://host/model'
    """
    return _SECRET.sub("", text)


@dataclass(frozen=True, slots=True)
class Address:
    """A place in a store: the `root` by which the store is opened, and the key of an object, or of a folder of them.

    `lists` tells whether the store can list its objects; a server of web pages cannot.
    """

    scheme: str
    host: str
    root: str
    key: str
    lists: bool = True

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}/{self.key}".rstrip("/")

    @property
    def name(self) -> str:
        """What a file or folder of it is called here."""
        return self.key.rpartition("/")[2] or self.host.partition(":")[0]

    def at(self, key: str) -> Address:
        """Return the place of another key in the same store."""
        return replace(self, key=key)


def parse(reference: str) -> Address:
    """Return where a reference leads.

    >>> parse("s3://bucket/models/llama/").key
    'models/llama'

    Raises `BadFile` for one without a bucket or host, or with a key that leaves its folder; `InvalidOption` for
    `http://` to another machine.
    """
    try:
        parts = urlsplit(reference)
        host = parts.netloc.rpartition("@")[2]
        port = parts.port
    except ValueError:
        raise BadFile(f"{shown(reference)}: not an address") from None
    web = parts.scheme in ("http", "https")
    path = parts.path if web else reference.partition("://")[2].partition("/")[2]
    key = (unquote(path) if web else path).strip("/")
    if not host or (parts.port is None and port):
        raise BadFile(f"{shown(reference)}: expected {parts.scheme}://BUCKET/KEY")
    if key and not is_plain(key):
        raise BadFile(f"{shown(reference)}: {key!r} is not a path inside a store")
    if parts.scheme == "http" and not _is_here(parts.hostname or ""):
        raise InvalidOption(
            f"{shown(reference)}: http:// lets everyone on the way read and change what is fetched",
            hint="Use https://; http:// is for servers on this machine.",
        )
    if web and (parts.hostname or "") in ("huggingface.co", "hf.co", "www.huggingface.co"):
        raise BadFile(f"{shown(reference)}: a page of the Hub", hint=f"Write it hf://{'/'.join(key.split('/')[:2])}")
    query = f"?{parts.query}" if web and parts.query else ""
    root = f"{parts.scheme}://{parts.netloc}/{query}" if web else f"{parts.scheme}://{host}"
    return Address(parts.scheme, host, root, key, lists=not web)


def _is_here(host: str) -> bool:
    """Tell whether a host is this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_plain(path: str) -> bool:
    """Tell whether a path from elsewhere is relative and stays inside the folder that it is put into."""
    parts = path.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\\0]|[\x01-\x1f]", path)
