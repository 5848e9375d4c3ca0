"""What metadata say of an adapter, as lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from loratools.cli import _show as show
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.dialects._frame.facts import Facts

_LONGEST = 300
"""Characters of a value that is shown; pictures and tags of large data sets have a million."""
_MOST = 200
"""Entries that are shown."""
_TAGS = 10
_ON_BASE = "what they do depends on the base"


def fact_lines(facts: Facts, *, base: bool = True) -> Iterator[tuple[str, str | None]]:
    """Yield name and value of every fact, None where the metadata are silent; `base` says whether that is one."""
    tags = ", ".join(f"{tag} ({count})" for tag, count in facts.frequent_tags[:_TAGS])
    more = facts.tags_in_all - min(len(facts.frequent_tags), _TAGS)
    yield "title", _clip(facts.title)
    yield "trigger words", _clip(", ".join(facts.trigger))
    yield "tags", _clip(", ".join(facts.tags))
    yield "frequent tags", _clip(f"{tags} and {more} more" if more else tags)
    yield "base model", _clip(facts.base) if base else None
    yield "base as stated", _clip(_of_base(facts))
    yield "family", _clip(facts.family)
    yield "resolution", _clip(facts.resolution)
    trained = ((facts.steps, "step"), (facts.epochs, "epoch"), (facts.images, "image"))
    counts = [f"{show.exact(count)} {what}{'' if count == 1 else 's'}" for count, what in trained if count is not None]
    yield "training", ", ".join(counts) or None
    yield "learning rate", _clip(facts.learning_rate)
    yield "date", _clip(facts.date)
    yield "trained with", _clip(facts.trained_with)
    yield "description", _clip(facts.description)
    yield "author", _clip(facts.author)
    yield "license", _clip(facts.license)
    yield "comment", _clip(facts.comment)
    yield "thumbnail", f"{facts.thumbnail[0]}, {show.size(facts.thumbnail[1])}" if facts.thumbnail else None


def _of_base(facts: Facts) -> str | None:
    """Return what the file says of its base beside name and family; nobody compares that hash, of a whole file."""
    version = facts.base_version if facts.base_version != facts.family else None
    hashed = f"a file with the hash {facts.base_hash}, which is not compared" if facts.base_hash else None
    return ", ".join(filter(None, (version, hashed))) or None


def entry_lines(entries: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each entry of a header, its value cut where it is long."""
    if not entries:
        yield "no entries in the header"
        return
    yield f"{counted(len(entries), 'entry', 'entries')} in the header:"
    for key in sorted(entries)[:_MOST]:
        yield f"  {_clip(key)} = {show.entry(entries[key], _LONGEST)}"
    if len(entries) > _MOST:
        yield f"  and {len(entries) - _MOST} more"


def bounded(entries: Mapping[str, str]) -> dict[str, str]:
    """Return entries for a JSON document, of which none is longer than a line can be."""
    return {key: show.clipped(value, show.LONGEST) for key, value in entries.items()}


def _clip(text: str | None) -> str | None:
    return show.clipped(text, _LONGEST) if text else None


def why_apart(reasons: Iterable[str]) -> str:
    """Return why adapters are compared by their parameters and not by what they change, in a few words.

    >>> why_apart(["2 of its changes depend on the base model, such as q: DoRA"]), why_apart(["it changes no module"])
    ('what they do depends on the base', 'it changes no module')
    """
    said = {_ON_BASE if "depend on the base model" in reason else reason for reason in reasons}
    return said.pop() if len(said) == 1 else "reasons that --json lists"
