"""What people look for in an adapter's metadata: trigger words, tags, resolution, steps, learning rate, base, date.

Of kohya's `ss_` entries, of the standard `modelspec.`, and of what ai-toolkit, OneTrainer and diffusers' scripts write.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

MOST_TAGS = 20
"""So many of the most frequent tags are listed."""

_LONGEST = 1_000_000  # characters of an entry that is read as JSON; tags of large data sets take some ten thousand
_SILENT = frozenset({"format"})
"""Entries that say nothing of what is looked for: all that most files of language models have."""

_REPEATED = r"\d+_(?P<name>.+)"


class Facts(NamedTuple):
    """What the metadata of an adapter say, None or () where they are silent.

    `frequent_tags` are the tags of the captions that it was trained on with their counts, the most frequent first, and
    `tags_in_all` is how many there are. `base_version` and `base_hash` are what sd-scripts wrote of the base model: its
    version, and the SHA-256 of its file or, where that is missing, the short hash that web UIs had; neither is our base
    hash, which is of tensors and not of files. `base` is the name that the metadata have for the base model or, where
    they have none, for its family. `thumbnail` is the type of the picture and its bytes, `trained_with` the program.
    """

    trigger: tuple[str, ...] = ()
    title: str | None = None
    tags: tuple[str, ...] = ()
    frequent_tags: tuple[tuple[str, int], ...] = ()
    tags_in_all: int = 0
    base: str | None = None
    family: str | None = None
    resolution: str | None = None
    steps: int | None = None
    epochs: int | None = None
    images: int | None = None
    learning_rate: str | None = None
    date: str | None = None
    trained_with: str | None = None
    description: str | None = None
    author: str | None = None
    license: str | None = None
    comment: str | None = None
    thumbnail: tuple[str, int] | None = None
    base_version: str | None = None
    base_hash: str | None = None


def facts_of(entries: Mapping[str, str], base: str | None = None, card: str | None = None) -> Facts:
    """Return the facts in the entries of a header; `base` is the name that other files have, `card` a README.md.

    An entry that is not what it should be says nothing.
    """
    if card is None and entries.keys() <= _SILENT:
        return Facts(base=base)
    from loratools.dialects._frame.places import ALSO  # most entries say nothing of it

    counts = _frequencies(entries)
    run, config = _object(entries, "training_info"), _object(entries, "ot_config")
    software = _object(entries, "software")
    tags = Counter[str]()
    for folder in counts.values():
        tags.update(folder)
    return Facts(
        trigger=_trigger(entries, counts) or words(_of_card(card, "instance_prompt")),
        title=_first(entries, "modelspec.title", "ss_output_name", "name"),
        tags=words(_first(entries, *ALSO["tags"])),
        frequent_tags=tuple(sorted(tags.items(), key=lambda item: (-item[1], item[0]))[:MOST_TAGS]),
        tags_in_all=len(tags),
        base=base or _first(entries, "ss_sd_model_name", "ss_base_model") or _text(config.get("base_model_name")),
        family=_first(entries, "modelspec.architecture", "ss_base_model_version"),
        resolution=_resolution(_first(entries, "modelspec.resolution", "ss_resolution"))
        or _text(config.get("resolution")),
        steps=_count(_first(entries, "ss_steps", "ss_max_train_steps") or run.get("step")),
        epochs=_count(_first(entries, "ss_epoch", "ss_num_epochs") or run.get("epoch") or config.get("epochs")),
        images=_count(_first(entries, "ss_num_train_images")),
        learning_rate=_rates(entries) or _text(config.get("learning_rate")),
        date=_date(_first(entries, "modelspec.date", "ss_training_finished_at", "ss_training_started_at")),
        trained_with=_trained_with(entries, software),
        description=_first(entries, *ALSO["description"]),
        author=_first(entries, *ALSO["author"]),
        license=_first(entries, *ALSO["license"]),
        comment=_first(entries, "ss_training_comment"),
        thumbnail=_picture(entries.get("modelspec.thumbnail")),
        base_version=_first(entries, "ss_base_model_version"),
        base_hash=_first(entries, "ss_new_sd_model_hash", "ss_sd_model_hash"),
    )


def words(text: str | None) -> tuple[str, ...]:
    """Return the words of an entry: a list of JSON, or phrases with commas between them.

    >>> words("sks dog, on a beach"), words('["sks", "dog"]')
    (('sks dog', 'on a beach'), ('sks', 'dog'))
    """
    if not text:
        return ()
    listed = _json(text) if text.lstrip().startswith("[") else None
    parts = [str(part) for part in listed] if isinstance(listed, list) else text.split(",")
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _first(entries: Mapping[str, str], *names: str) -> str | None:
    """Return the first of these entries that says something."""
    values = (entries[name].strip() for name in names if name in entries)
    return next((value for value in values if value and value not in ("None", "null")), None)


def _trigger(entries: Mapping[str, str], counts: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """Return the words that are stated; or the one that ai-toolkit writes as the only tag of a folder of its name."""
    from loratools.dialects._frame.places import ALSO

    if stated := _first(entries, *ALSO["trigger"]):
        return words(stated)
    alone = [(folder, *tags) for folder, tags in counts.items() if len(tags) == 1]
    named = [tag for folder, tag in alone if (match := re.fullmatch(_REPEATED, folder)) and match["name"] == tag]
    return tuple(named) if len(named) == len(counts) else ()


def _frequencies(entries: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Return the counts of tags by folder that sd-scripts and ai-toolkit write."""
    folders = _object(entries, "ss_tag_frequency")
    return {
        str(folder): {
            str(tag).strip(): count
            for tag, count in tags.items()
            if isinstance(count, int) and not isinstance(count, bool)
        }
        for folder, tags in folders.items()
        if isinstance(tags, dict)
    }


def _object(entries: Mapping[str, str], name: str) -> dict[str, Any]:
    value = _json(entries.get(name, ""))
    return value if isinstance(value, dict) else {}


def _json(text: str) -> Any:
    try:
        return json.loads(text) if text and len(text) <= _LONGEST else None
    except (ValueError, RecursionError):
        return None


def _text(value: object) -> str | None:
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) and value != "" else None


def _count(value: object) -> int | None:
    try:
        return int(float(value)) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None


def _resolution(text: str | None) -> str | None:
    """Return `1024x1024` for what trainers write: `1024x1024`, `(1024, 1024)`, `1024`."""
    sides = re.findall(r"\d+", text)[:2] if text else []
    return "x".join(sides if len(sides) == 2 else sides * 2) or text


def _rates(entries: Mapping[str, str]) -> str | None:
    """Return the learning rate, and those of the parts of a model that have others."""
    rates = {
        "": _first(entries, "ss_learning_rate"),
        "image model ": _first(entries, "ss_unet_lr"),
        "text encoder ": _first(entries, "ss_text_encoder_lr"),
    }
    usual = rates.pop("") or rates["image model "]
    others = [f"{part}{rate}" for part, rate in rates.items() if rate and rate not in (usual, "0", "0.0")]
    return ", ".join(filter(None, [usual, *others])) or None


def _date(text: str | None) -> str | None:
    """Return a date as ISO 8601 has it, to the second, of such a text or of seconds since 1970."""
    try:
        moment = datetime.fromtimestamp(float(text or ""), UTC)
    except (ValueError, OverflowError, OSError):
        return text
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


_OF_TRAINING = (
    "ss_steps", "ss_max_train_steps", "ss_epoch", "ss_num_epochs", "ss_training_started_at", "ss_training_finished_at",
    "ss_session_id", "ss_num_train_images", "ss_learning_rate", "ss_unet_lr", "ss_optimizer",
)  # fmt: skip
"""Entries that a training leaves: an extraction names a module of sd-scripts too, for programs that load its file.

`modelspec.implementation` is no trainer: it is the code of the model's family, alike in all files of it.
"""


def _trained_with(entries: Mapping[str, str], software: Mapping[str, Any]) -> str | None:
    """Return the program that trained it, as far as it names itself."""
    if isinstance(name := software.get("name"), str):
        return " ".join(filter(None, [name, _text(software.get("version"))]))
    if "ot_branch" in entries or "ot_config" in entries:
        return "OneTrainer"
    return _first(entries, "ss_network_module") if any(name in entries for name in _OF_TRAINING) else None


def _picture(uri: str | None) -> tuple[str, int] | None:
    """Return the type of a picture in a data URI, and its bytes."""
    kind, _, data = (uri or "").partition(";base64,")
    return (kind.removeprefix("data:")[:40], len(data) * 3 // 4) if kind.startswith("data:") and data else None


def _of_card(card: str | None, name: str) -> str | None:
    """Return a plain text of a card's front matter, without reading all of its YAML."""
    front = re.match(r"---[ \t]*\n(.*?)\n---", card, re.DOTALL) if card else None
    lines: Iterable[str] = front[1].split("\n") if front else ()
    for line in lines:
        key, _, value = line.partition(":")
        if key == name and (value := value.strip()) and value[0] not in "|>[{&*!#":
            quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
            return value[1:-1] if quoted else value
    return None
