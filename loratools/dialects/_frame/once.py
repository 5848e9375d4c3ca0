"""An adapter that a task opens again, to check it, to weigh it, to say what it was, is read once."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from loratools.adapter.model import Adapter
from loratools.decisions import warned, warnings_to
from loratools.dialects._frame.listing import Listing
from loratools.storage.sources import remember, remembered, stamps

CONFIG = "adapter_config.json"

Read = Callable[[Listing, str | None], Adapter]
"""Reads the adapter of a listing in a dialect, None: in its own."""


def once(listing: Listing, dialect: str | None, read: Read) -> Adapter:
    """Return what `read` makes of a listing; within a task, of the same files and options, only the first time.

    What is warned of then is warned of each time, since some who open an adapter listen to no warning. With a base,
    whose names may explain a file, nothing is remembered.
    """
    files = (*listing.files, CONFIG)  # that of PEFT may lie beside a single file
    key = (listing.path.absolute(), files, stamps(listing.folder, files), dialect, listing.alpha, listing.enabled)
    if listing.base is not None or not listing.files:
        return read(listing, dialect)
    if (known := remembered().get((*key, listing.initial))) is None:
        said: list[str] = []
        try:
            with warnings_to(said.append):
                adapter = read(listing, dialect)
        finally:
            for text in said:
                warned("%s", text)
        for initial in {listing.initial, True}:  # what is read anyway is read by one who takes an initial adapter
            remember((*key, initial), (adapter, said))
        return adapter
    adapter, said = cast(tuple[Adapter, list[str]], known)
    for text in said:
        warned("%s", text)
    return adapter
