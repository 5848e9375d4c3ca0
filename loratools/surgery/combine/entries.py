"""What the headers of several files say, in the header of the one that they become.

Entries that all have alike stay. Trigger words and tags add up; of a thumbnail the first is carried. Of each adapter
everything that not all say is under `combined_from`, a JSON list of one object for each in their order: `digest`,
`weight`, `entries`, and, of one that was combined itself, its own `combined_from`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.adapter.kinds import Update
from loratools.adapter.model import HEADER, Adapter, Step
from loratools.dialects._frame.metadata import ALPHAS, OF_BYTES, RANKS, metadata_of, sized

COMBINED_FROM = "combined_from"
"""The entry that says what each of the adapters says."""
MERGED_FROM, TITLE = "modelspec.merged_from", "modelspec.title"
_WORDS = (
    "modelspec.trigger_phrase", "modelspec.tags", "ss_trigger_words", "trigger_words", "trigger_word", "trigger_phrase",
    "activation_text", "tags",
)  # fmt: skip
_TAGS = "ss_tag_frequency"
_FIRST = ("modelspec.thumbnail", "ss_network_module", *OF_BYTES, *RANKS, *ALPHAS)  # the last are made anew
_COMMENT = "ss_training_comment"
_KOHYA_RULES = {"SvRatio": "sv_ratio", "SvFro": "sv_fro", "SvCumulative": "sv_cumulative"}


def joined(
    adapters: Sequence[Adapter], weights: Sequence[Any], updates: Mapping[str, Update], done: Step
) -> dict[str, Any]:
    """Return the settings that hold the entries of the adapters as those of one that has `updates`.

    `weights` are those of the adapters as JSON has them, `done` is the operation that made one of them.
    """
    every = [metadata_of(adapter) for adapter in adapters]
    if not any(every):
        return {}
    entries: dict[str, str] = {}
    for name in dict.fromkeys(name for each in every for name in each if name != COMBINED_FROM or len(every) == 1):
        if (value := _one(name, [each[name] for each in every if name in each])) is not None:
            entries[name] = value
    if len(every) > 1:
        alike = {name for name, value in every[0].items() if all(each.get(name) == value for each in every)}
        described = [
            _described(each, alike, source["digest"], weight)
            for each, source, weight in zip(every, done.inputs, weights, strict=True)
        ]
        entries[COMBINED_FROM] = json.dumps(described, ensure_ascii=False, sort_keys=True)
        if any(name.startswith("modelspec.") for name in entries):
            titles = [
                each.get(TITLE) or each.get("ss_output_name") or f"adapter {i}" for i, each in enumerate(every, 1)
            ]
            entries[MERGED_FROM] = ", ".join(titles)
    elif done.operation == "resize" and any(name.startswith("ss_") for name in entries):
        entries[_COMMENT] = f"{_resized(adapters[0], done.parameters.get('ranks', {}))}; {entries.get(_COMMENT, '')}"
    return {HEADER: sized(entries, updates, anew=True)}


def _one(name: str, values: Sequence[str]) -> str | None:
    """Return the one value of an entry that adapters have, None where each keeps its own."""
    different = list(dict.fromkeys(values))
    if len(different) == 1 or name in _FIRST:
        return different[0]
    if name in _WORDS:
        return _words(different)
    if name == _TAGS:
        return _tags(values)
    return " + ".join(different) if name == TITLE else None


def _described(entries: Mapping[str, str], alike: set[str], digest: str, weight: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        name: value for name, value in entries.items() if name not in alike and name != COMBINED_FROM
    }
    described = {"digest": digest, "weight": weight, "entries": own}
    if (before := _json(entries.get(COMBINED_FROM, ""))) is not None:
        described[COMBINED_FROM] = before
    return described


def _resized(adapter: Adapter, ranks: Mapping[str, Any]) -> str:
    """Return the comment of sd-scripts' `resize_lora.py` on what became of an adapter's rank."""
    old = max((update.rank for update in adapter.updates.values()), default=0)
    name, _, argument = str(ranks.get("rule") or f"budget({ranks.get('budget')})").partition("(")
    value = argument.rstrip(")").rpartition("=")[2]
    if name == "Fixed":
        return f"dimension is resized from {old} to {value}"
    return f"Dynamic resize with {_KOHYA_RULES.get(name, name.lower())}: {value} from {old}"


def _words(values: Sequence[str]) -> str:
    """Return the words of several lists, each once: lists of JSON, or words with commas between them."""
    lists = [_json(value) for value in values]
    if all(isinstance(each, list) for each in lists):
        return json.dumps(list(dict.fromkeys(str(word) for each in lists for word in each)), ensure_ascii=False)
    words = (word.strip() for value in values for word in value.split(","))
    return ", ".join(dict.fromkeys(word for word in words if word))


def _tags(values: Sequence[str]) -> str | None:
    """Return the counts of tags by folder, added up; None where one is no such JSON."""
    total: dict[str, dict[str, int]] = {}
    try:
        for value in values:
            for folder, counts in json.loads(value).items():
                kept = total.setdefault(folder, {})
                for tag, count in counts.items():
                    kept[tag] = kept.get(tag, 0) + count
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    return json.dumps(total, ensure_ascii=False)


def _json(text: str) -> Any:
    """Return what a text of JSON holds; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
