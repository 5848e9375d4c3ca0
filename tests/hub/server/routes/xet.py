"""Tokens for xet storage, as the real hf-xet client asks for them."""

import time
from typing import TYPE_CHECKING

from tests.hub.server import accounts
from tests.hub.server.routes import route
from tests.hub.server.wire import HubError, Reply, Request, json_reply

if TYPE_CHECKING:
    from tests.hub.server.hub import LocalHub


@route("GET", "/api/models/{repo}/xet-read-token/{revision}")
def read_token(hub: "LocalHub", request: Request, repo: str, revision: str) -> Reply:
    """Hand out a storage token for reading."""
    accounts.check_files(hub.find(request, repo), hub.user(request))
    return _token(hub)


@route("GET", "/api/models/{repo}/xet-write-token/{revision}")
def write_token(hub: "LocalHub", request: Request, repo: str, revision: str) -> Reply:
    """Hand out a storage token for writing."""
    repository = hub.find(request, repo)
    accounts.check_write(repository.owner, hub.user(request), pull=bool(request.query("create_pr")))
    return _token(hub)


def _token(hub: "LocalHub") -> Reply:
    if hub.cas_url is None:
        raise HubError(404, "This Hub has no xet storage: set HF_HUB_DISABLE_XET=1 or give it one.")
    expiry = int(time.time()) + 3600
    body = {"casUrl": hub.cas_url, "accessToken": "storage-token", "exp": expiry}
    headers = {
        "X-Xet-Cas-Url": hub.cas_url,
        "X-Xet-Access-Token": "storage-token",
        "X-Xet-Token-Expiration": str(expiry),
    }
    reply = json_reply(body)
    reply.headers.update(headers)
    return reply
