"""A reference to the Hub becomes a local path; `loratools.storage.sources` calls this when it meets `hf://`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loratools.hub.client import Hub
from loratools.hub.headers import headers_of
from loratools.hub.pull import cached
from loratools.hub.refs import parse
from loratools.storage.sources import Need, Watch


def resolve(reference: str, need: Need, watch: Watch, folder: Callable[[], Path], *, token: str | None = None) -> Path:
    """Return a local path of what a reference to the Hub names.

    `adapter` and `checkpoint` are downloaded to the cache of huggingface_hub, each file checked against the Hub's own
    digest; `watch` shows the progress of that. For `header`, headers and small JSON files are fetched by range
    requests into the folder that `folder` makes. `token` is by default that of huggingface_hub (HF_TOKEN, `hf auth
    login`).

    Raises `HubError`, and `BadFile` for a reference that is none.
    """
    ref, hub = parse(reference), Hub(token=token)
    return headers_of(hub, ref, folder()) if need == "header" else cached(hub, ref, need, watch)
