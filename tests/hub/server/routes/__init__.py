"""The table of endpoints: handlers register themselves with the method and the address they answer."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import unquote

from tests.hub.server.wire import HubError, Origin, Reply, Request

if TYPE_CHECKING:
    from tests.hub.server.hub import LocalHub

Handler = Callable[..., Reply]

_PARTS = {"repo": r"(?P<repo>[^/]+/[^/]+)", "path": r"(?P<path>.+)"}
_ROUTES: list[tuple[Origin, str, re.Pattern[str], Handler]] = []


def route(method: str, template: str, origin: Origin = "hub") -> Callable[[Handler], Handler]:
    """Register a handler; `{repo}` is a namespace/name, `{path}` any rest, other `{names}` one path segment.

    The matched parts reach the handler percent-decoded, as keyword arguments after the Hub and the request.
    """
    pattern = re.sub(r"\{(\w+)\}", lambda part: _PARTS.get(part[1], rf"(?P<{part[1]}>[^/]+)"), template)

    def register(handler: Handler) -> Handler:
        _ROUTES.append((origin, method, re.compile(pattern), handler))
        return handler

    return register


def _candidates(request: Request) -> Iterator[tuple[str, Handler, dict[str, str]]]:
    for origin, method, pattern, handler in _ROUTES:
        match = pattern.fullmatch(request.path)
        if origin == request.origin and match:
            yield method, handler, {name: unquote(part) for name, part in match.groupdict().items()}


def dispatch(hub: "LocalHub", request: Request) -> Reply:
    """Answer a request by its route; 404 for an unknown address, 405 for a known one with another method."""
    # The body of a HEAD reply is dropped when it is sent, so that its headers are those of GET.
    method = "GET" if request.method == "HEAD" else request.method
    candidates = list(_candidates(request))
    for known, handler, parts in candidates:
        if known == method:
            return handler(hub, request, **parts)
    if candidates:
        raise HubError(405, f"{request.method} is not allowed here.")
    raise HubError(404, f"Sorry, we can't find the page you are looking for: {request.path}")
