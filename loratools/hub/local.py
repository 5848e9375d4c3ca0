"""A path or a reference becomes a local path."""

from __future__ import annotations

from pathlib import Path

from loratools.hub.refs import Need, Watch, is_ref, parse


def local(
    path_or_ref: str | Path,
    *,
    need: Need = "adapter",
    token: str | None = None,
    progress: Watch | None = None,
) -> Path:
    """Return a local path for a path or a reference to the Hub.

    A path is returned as it is, and an existing local path always wins. What a reference names is downloaded to the
    cache of huggingface_hub, each file checked against the Hub's own digest; `header` fetches only headers and small
    JSON files, by range requests, into a folder that lives as long as this process. `progress` is called with the bytes
    to fetch, and gives a context whose function takes the bytes that arrived since the last call.

    Raises `HubError`, and `BadFile` for a reference that is none.
    """
    if not is_ref(path_or_ref) or Path(path_or_ref).exists():
        return Path(path_or_ref)
    from loratools.hub.client import Hub
    from loratools.hub.headers import headers_of
    from loratools.hub.pull import cached

    ref, hub = parse(str(path_or_ref)), Hub(token=token)
    return headers_of(hub, ref) if need == "header" else cached(hub, ref, need, progress=progress)
