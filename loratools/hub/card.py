"""The model card: what a person wrote stays, our facts go into the front matter and into one section of our own.

    ---
    base_model: org/base            fields that are missing are added; a person's are kept as they are, line by line
    tags: [mine, lora, loratools]   tags are joined
    ---
    A person's text.
    <!-- loratools card local=… text=… -->
    the section, written anew each time
    <!-- /loratools card -->

The opening mark holds digests of front matter and text as they were in the folder, and as they were pushed, so that at
the next push it is known on which side a person has changed them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loratools.errors import HubError
from loratools.storage.beside.cards import cut
from loratools.storage.beside.front import data_of, parted, with_field
from loratools.storage.beside.paths import without_homes, without_paths

Side = Literal["local", "hub"]

_SECTION = (
    re.compile(r"<!-- loratools card local=(?P<local>[0-9a-f]{0,64}) text=(?P<text>[0-9a-f]{0,64}) -->\n"),
    "<!-- /loratools card -->",
    "\n\n",
)


@dataclass(frozen=True, slots=True)
class Card:
    """A README.md in its parts: lines of the front matter, a person's text, and the two digests of our mark."""

    front: tuple[str, ...] = ()
    text: str = ""
    local: str = ""
    pushed: str = ""

    @property
    def digest(self) -> str:
        """Sixteen hex digits of the front matter and the person's text, white space at their ends aside."""
        whole = "\n".join(self.front).strip() + "\n---\n" + self.text.strip()
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def data(self) -> dict[str, Any]:
        """Return the front matter; raise `BadFile` where it is not YAML of names and values."""
        return data_of(list(self.front))


def parse(readme: str) -> Card:
    """Take a README.md apart; raise `BadFile` where its front matter has no end."""
    front, body = parted(readme)
    text, mark = cut(body, *_SECTION)
    digests = mark.groupdict() if mark else {}
    return Card(tuple(front), text.strip("\n"), digests.get("local") or "", digests.get("text") or "")


def merged(
    local: str | None, remote: str | None, facts: Mapping[str, Any], section: str, *, force: Mapping[str, Any],
    keep: Side | None = None,
) -> str:  # fmt: skip
    """Return the README.md to push, from that of the folder and that on the Hub.

    `facts` are fields of the front matter that are set where a person has not, `force` those that are set anyway.
    `keep` says whose text stays where both sides have changed; without it that is a `HubError`.
    """
    ours, theirs = parse(local or ""), parse(remote or "")
    base = _choose(ours, theirs, local is not None, remote is not None, keep)
    front = tuple(_front(base, facts, force))
    # A folder that came from the Hub, or has no card, tells nothing new of the one that was pushed.
    seen = theirs.local if local is None or (remote is not None and ours.digest == theirs.digest) else ours.digest
    mark = f"<!-- loratools card local={seen} text={Card(front, base.text).digest} -->"
    text = f"{base.text}\n\n" if base.text.strip() else ""
    return "\n".join(["---", *front, "---", "", f"{text}{mark}\n{section.strip()}\n<!-- /loratools card -->", ""])


def public(readme: str) -> str:
    """Return a README.md without local paths: none in its front matter, and none of somebody's home in its text."""
    card = parse(readme)
    front = [without_paths(line) for line in card.front]
    whole = readme.replace("\r\n", "\n")
    head = "\n".join(["---", *card.front, "---"])
    if card.front and head in whole:
        before, _, after = whole.partition(head)
        return before + "\n".join(["---", *front, "---"]) + without_homes(after)
    return without_homes(whole)


def _choose(ours: Card, theirs: Card, has_local: bool, has_remote: bool, keep: Side | None) -> Card:
    if not has_local or not has_remote:
        return ours if has_local else theirs
    if keep:
        return ours if keep == "local" else theirs
    if ours.digest in (theirs.local, theirs.digest):
        return theirs  # the folder's has not changed since it was pushed
    if theirs.digest == theirs.pushed:
        return ours  # the Hub's has not changed since then
    known, stated = theirs.data(), ours.data()
    if ours.text.strip() == theirs.text.strip() and all(known.get(name) == stated[name] for name in stated):
        return theirs  # which says the same, and more
    if not theirs.text.strip() and all(stated.get(name) == known[name] for name in known):
        return ours
    hint = "Say which one stays: --card local, or --card hub."
    raise HubError("README.md in the folder and on the Hub are two different texts", hint=hint)


def _front(card: Card, facts: Mapping[str, Any], force: Mapping[str, Any]) -> list[str]:
    """Return the lines of the front matter with our fields set; every other line is the person's."""
    present, lines = card.data(), list(card.front)
    for name, value in {**facts, **force}.items():
        if name == "tags":
            tags = present.get("tags") or []
            tags = tags if isinstance(tags, list) else [tags]
            of_base = any(_is_base(tag) for tag in value)
            kept = [tag for tag in tags if not (of_base and _is_base(tag) and tag not in value)]
            if (joined := [*kept, *(tag for tag in value if tag not in kept)]) != tags:
                lines = with_field(lines, name, joined)
        elif present.get(name) is None or (name in force and present[name] != value):
            lines = with_field(lines, name, value)
    return lines


def _is_base(tag: object) -> bool:
    """Tell whether a tag names a base model, as `base_model:adapter:org/name` does."""
    return isinstance(tag, str) and tag.startswith("base_model:")
