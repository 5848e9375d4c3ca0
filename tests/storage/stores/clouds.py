"""Servers for gs:// and az:// on loopback, each behind what counts, cuts and breaks (`server.py`).

Google's XML interface is S3's, and obstore speaks it: moto's server takes it, but for the word that stands for a
signature. Azure is Microsoft's own emulator, azurite (npm), where the machine has it: `azurite-blob` on the PATH, or
its `main.js` in AZURITE_MAIN.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from email.utils import formatdate
from pathlib import Path
from threading import Thread
from typing import Any

from tests.storage.stores.server import S3, Broken, Log

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""What the emulator's documentation gives to everyone."""


class Google(S3):
    """The S3 server as Google's XML interface, with one bucket, `bucket`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        inner = self._server.app
        self._server.app = lambda environ, start: inner(_signed_for_s3(environ), start)  # type: ignore[method-assign]
        account = {"gcs_base_url": self.endpoint, "disable_oauth": True, "client_email": "", "private_key": "",
                   "private_key_id": ""}  # fmt: skip
        self._account = folder / "account.json"
        self._account.write_text(json.dumps(account))

    @property
    def env(self) -> dict[str, str]:
        """What a client's environment is to say."""
        return {"GOOGLE_SERVICE_ACCOUNT": str(self._account), "GOOGLE_ALLOW_HTTP": "true"}

    def path(self, key: str) -> str:
        """Return the path of requests for a key."""
        return f"/bucket/{key}"


def _signed_for_s3(environ: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request with the header of a signature as S3 has it, which moto does not check, in Google's place."""
    scope = "AKID/20260101/us-east-1/s3/aws4_request"
    return {**environ, "HTTP_AUTHORIZATION": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"}


class Azure:
    """A running azurite with one container, `bucket`."""

    def __init__(self, folder: Path) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, type: str, message: str, *args: Any) -> None:
                pass

        self._port = _free_port()
        words = ["--blobHost", "127.0.0.1", "--blobPort", str(self._port), "--silent", "--skipApiVersionCheck"]
        self._process = subprocess.Popen(
            [*(azurite() or ()), *words, "--location", str(folder)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.log = Log()
        self._server = make_server(
            "127.0.0.1", 0, Broken(self._passed_on, self.log), threaded=True, request_handler=Quiet
        )
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/{ACCOUNT}"
        self._thread = Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        deadline = time.monotonic() + 60
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            except OSError:
                self._process.poll()
        raise RuntimeError("azurite did not start")

    @property
    def env(self) -> dict[str, str]:
        """What a client's environment is to say."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": self.endpoint, "AZURE_ALLOW_HTTP": "true",
        }  # fmt: skip

    def path(self, key: str) -> str:
        """Return the path of requests for a key."""
        return f"/{ACCOUNT}/bucket/{key}"

    def reset(self) -> None:
        """Make the container, or empty it."""
        self._signed("PUT", "bucket", restype="container")
        for key in self.objects():
            self._signed("DELETE", f"bucket/{key}")
        self.log.clear()

    def put(self, folder: Path, key: str) -> None:
        """Store all files of a folder under a key."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._signed("PUT", f"bucket/{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        self.log.clear()

    def objects(self, start: str = "") -> dict[str, bytes]:
        """Return the bytes of all objects whose keys begin so."""
        import re

        listed = self._signed("GET", "bucket", comp="list", restype="container").decode()
        names = [name for name in re.findall(r"<Name>([^<]+)</Name>", listed) if name.startswith(start)]
        return {name: self._signed("GET", f"bucket/{name}") for name in names}

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._process.terminate()
        self._process.wait()

    def _signed(self, method: str, path: str, body: bytes = b"", **query: str) -> bytes:
        """Ask the emulator itself, with the signature of a shared key."""
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        if method == "PUT" and not query:
            headers["x-ms-blob-type"] = "BlockBlob"
        named = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        asked = "".join(f"\n{name}:{value}" for name, value in sorted(query.items()))
        length = str(len(body)) if body else ""
        text = f"{method}\n\n\n{length}\n\n\n\n\n\n\n\n\n{named}/{ACCOUNT}/{ACCOUNT}/{path}{asked}"
        digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        headers["Content-Length"] = str(len(body))
        url = f"/{ACCOUNT}/{path}?{'&'.join(f'{name}={value}' for name, value in query.items())}".rstrip("?")
        status, _, data = self._ask(method, url, headers, body)
        if status >= 400 and not (status == 409 and query.get("restype") == "container"):
            raise RuntimeError(f"{method} {path}: {status} {data[:300]!r}")
        return data

    def _ask(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request(method, url, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _passed_on(self, environ: Mapping[str, Any], start: Any) -> Iterable[bytes]:
        """Pass a request on as it came: a WSGI application."""
        headers = {
            name.removeprefix("HTTP_").replace("_", "-").lower(): value
            for name, value in environ.items()
            if name.startswith("HTTP_") or (name in ("CONTENT_TYPE", "CONTENT_LENGTH") and value)
        }
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        status, answered, data = self._ask(environ["REQUEST_METHOD"], environ["RAW_URI"], headers, body)
        hop = ("transfer-encoding", "connection", "keep-alive", "date", "server")
        kept = [(name, value) for name, value in answered if name.lower() not in hop]
        if not any(name.lower() == "content-length" for name, _ in kept) and environ["REQUEST_METHOD"] != "HEAD":
            kept.append(("Content-Length", str(len(data))))
        start(f"{status} Passed on", kept)
        return [data]


def azurite() -> tuple[str, ...] | None:
    """Return the words that start azurite; None where there is none."""
    if script := os.environ.get("AZURITE_MAIN"):
        node = shutil.which("node")
        return (node, script) if node else None
    found = shutil.which("azurite-blob")
    return (found,) if found else None


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
