"""One adapter of a call, and what goes with it on its whole way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratools.adapter.model import Adapter


@dataclass(frozen=True, slots=True, eq=False)
class AdapterInput:
    """One adapter of a call, and what goes with it on its whole way: the weight of its change, digest, and origin.

    `adapter` is replaced as the call goes on: by one under the base's names, without copies, with untied heads.
    `words` are the weight of each module, which are in the scalings already; `weight` is 1 then.
    `digest` stays that of the adapter as it was read. `path` is None for an adapter that came open. `name` is what it
    is called elsewhere: the repository of one from the Hub, whose `commit` is known then, or the title in its file.
    """

    adapter: Adapter
    weight: float = 1.0
    digest: str = ""
    path: Path | None = None
    words: str = ""
    name: str | None = None
    commit: str | None = None
