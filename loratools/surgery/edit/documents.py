"""What an adapter's files say, as it is edited: header, manifest, adapter_config.json and README.md."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.adapter.model import HEADER, Adapter
from loratools.decisions import warned
from loratools.dialects._frame.hashes import legacy_hash
from loratools.dialects._frame.listing import Listing
from loratools.dialects._frame.places import Place
from loratools.errors import BadFile
from loratools.format import manifest as sealed
from loratools.format import validate
from loratools.format.clauses import CONFIG_FILE, Subject
from loratools.storage.beside import making
from loratools.storage.beside.cards import read_card
from loratools.storage.beside.front import data_of, parted, with_field
from loratools.storage.beside.links import refuse_outside
from loratools.storage.header import Header, read_header
from loratools.storage.lazy import LazyTensor
from loratools.storage.rewrite import NewHeader
from loratools.storage.strict_json import parse_json_object

CARD = "README.md"
_LEGACY = "sshs_legacy_hash"
_TECHNICAL = ("lora", "peft", "loratools", "transformers", "diffusers", "base_model:", "text-to-image", "template:")


@dataclass(slots=True)
class Documents:
    """The parts of an adapter's files that say things about it, to be changed, and what they were.

    `entries` are those of the header or, of a sealed adapter, those that its manifest keeps for other layouts; None
    where no safetensors file holds the adapter. `stated` is the manifest, `config` adapter_config.json, `card` the text
    of README.md. `silent` is whether the files are to say nothing of how they were made, this edit included.
    """

    path: Path
    folder: Path
    weights: Path | None
    header: Header | None
    entries: dict[str, str] | None
    stated: dict[str, Any] | None
    config: dict[str, Any] | None
    card: str | None
    before: dict[str, Any] = field(default_factory=dict)
    silent: bool = False

    @classmethod
    def of(cls, listing: Listing, adapter: Adapter | None) -> Documents:
        """Read what lies beside the tensors; raise `BadFile` for what cannot be read."""
        weights = _weights(listing, adapter)
        header = read_header(weights) if weights else None
        stated, entries, config, card = None, dict(header.metadata) if header else None, None, None
        if weights and entries is not None and sealed.METADATA_KEY in entries:
            stated = parse_json_object(entries[sealed.METADATA_KEY].encode(), weights)
            kept = stated.get("settings", {}).get(HEADER, {})
            entries = {str(name): str(value) for name, value in kept.items()} if isinstance(kept, Mapping) else {}
            made = (header.metadata if header else {}).get(making.ENTRY)
            entries |= {making.ENTRY: made} if made else {}
        if not listing.single:
            config = listing.json(CONFIG_FILE)
            if CARD in listing.files:
                refuse_outside([listing.folder / CARD], listing.folder)
                card = read_card(listing.folder / CARD)
        documents = cls(listing.path, listing.folder, weights, header, entries, stated, config, card)
        documents.before = copy.deepcopy(documents.said())
        return documents

    def said(self) -> dict[str, dict[str, Any]]:
        """Return what every document says now, by field."""
        manifest = {name: value for name, value in (self.stated or {}).items() if name != "settings"}
        settings = {k: v for k, v in (self.stated or {}).get("settings", {}).items() if k != HEADER}
        front, text = parted(self.card) if self.card is not None else ([], "")
        return {
            "header": dict(self.entries or {}),
            "manifest": {**manifest, **{f"settings.{name}": value for name, value in settings.items()}},
            CONFIG_FILE: dict(self.config or {}),
            CARD: {**data_of(front), "": text} if self.card is not None else {},
        }

    def has(self, place: Place) -> bool:
        """Tell whether the document of a place is there, so that a fact can be written into it."""
        if place.inner is not None:
            return place.key in (self.entries or {})
        documents = {"header": self.entries, "manifest": self.stated, "config": self.config, "card": self.card}
        return documents[place.where] is not None

    def get(self, place: Place) -> Any:
        """Return what stands in a place; None where nothing does."""
        if place.where == "header":
            value = (self.entries or {}).get(place.key)
            if place.inner is None or value is None:
                return value
            inside = self._inside(value)
            return next((inside[name] for name in inside if _is_field(name, place.inner)), None)
        if place.where == "card":
            return data_of(parted(self.card or "")[0]).get(place.key)
        if place.where == "manifest":
            return (self.stated or {}).get("base_model", {}).get(place.key)
        return (self.config or {}).get(place.key)

    def put(self, place: Place, value: str | None) -> None:
        """Write a value into a place, or take it out."""
        _PUT[place.where](self, place, value)

    def put_entry(self, key: str, value: str | None) -> None:
        """Set an entry of the header, or take it out."""
        assert self.entries is not None
        if value is None:
            self.entries.pop(key, None)
        else:
            self.entries[key] = value

    def _put_header(self, place: Place, value: str | None) -> None:
        if place.inner is None:
            self.put_entry(place.key, value)
            return
        inside = self._inside((self.entries or {})[place.key])
        names = [name for name in inside if _is_field(name, place.inner)] or [place.inner]
        self.put_entry(place.key, json.dumps(inside | dict.fromkeys(names, value), indent=2, sort_keys=True))

    def _put_manifest(self, place: Place, value: str | None) -> None:
        assert self.stated is not None
        base = dict(self.stated.get("base_model", {}))
        base.pop("revision" if base.get(place.key) != value else "", None)  # a commit of the old name
        base |= {place.key: value} if value is not None else {}
        if value is None:
            base.pop(place.key, None)
        self.stated["base_model"] = base
        if not base:
            del self.stated["base_model"]

    def _put_config(self, place: Place, value: str | None) -> None:
        assert self.config is not None
        if self.config.get(place.key) != value and self.config.get("revision") is not None:
            self.config["revision"] = None
        self.config[place.key] = value

    def _put_card(self, place: Place, value: str | None) -> None:
        front, text = parted(self.card or "")
        data = data_of(front)
        if place.key == "tags":
            tags = data.get("tags")
            old = [str(tag) for tag in (tags if isinstance(tags, list) else [tags] if tags else [])]
            kept = [tag for tag in old if tag.startswith(_TECHNICAL)]
            new = [tag for tag in (part.strip() for part in (value or "").split(",")) if tag and tag not in kept]
            front = with_field(front, "tags", [*kept, *new] or None)
        else:
            front = with_field(front, place.key, value)
        if place.key == "base_model":
            front = _with_base_tag(front, value)
        self.card = "\n".join(["---", *front, "---", text])

    @staticmethod
    def _inside(text: str) -> dict[str, Any]:
        return parse_json_object(text.encode(), Path("the header"))

    def settle(self) -> None:
        """Compute anew what other entries decide: the old hash of sd-scripts covers its `ss_` entries."""
        entries = self.entries or {}
        if self.header and self.stated is None and _LEGACY in entries and entries != self.before["header"]:
            tensors = {name: LazyTensor.stored(spec) for name, spec in self.header.tensors.items()}
            entries[_LEGACY] = legacy_hash(tensors, entries)

    def changes(self, made: Mapping[str, str] | None = None) -> dict[str, bytes | NewHeader]:
        """Return the new contents of the files that are to change, by their names; `made` are entries of a record.

        Raises `InvalidFormat` where a sealed adapter would break a clause, and `BadFile` for a header that is too long.
        """
        files: dict[str, bytes | NewHeader] = {}
        now = self.said()
        changed = any(now[part] != self.before[part] for part in ("header", "manifest"))
        if self.weights and self.header and (changed or made):
            metadata = {**self._metadata(), **({} if self.silent else made or {})}
            try:
                files[self.weights.name] = NewHeader.of(self.weights, self.header, metadata)
            except UnicodeEncodeError:
                raise BadFile(f"{self.weights}: a new entry is no text that UTF-8 can hold") from None
        if now[CONFIG_FILE] != self.before[CONFIG_FILE]:
            files[CONFIG_FILE] = (json.dumps(self.config, indent=2, ensure_ascii=False) + "\n").encode()
        if now[CARD] != self.before[CARD]:
            files[CARD] = (self.card or "").encode()
        return files

    def _metadata(self) -> dict[str, str]:
        """Return the entries of the new header, with hashes and manifest that agree with them.

        Where one says how the file was made, that it was edited is said instead, or nothing.
        """
        assert self.weights is not None
        assert self.header is not None
        entries = dict(self.entries or {})
        made = making.entry() if entries.pop(making.ENTRY, None) and not self.silent else {}
        if self.stated is None:
            return entries | made
        settings = {name: value for name, value in self.stated.get("settings", {}).items() if name != HEADER}
        settings |= {HEADER: dict(sorted(entries.items()))} if entries else {}
        document = {name: value for name, value in self.stated.items() if name != "settings"}
        document |= {"settings": settings} if settings else {}
        text = sealed.canonical(document)
        shapes = {name: (spec.dtype, spec.shape) for name, spec in self.header.tensors.items()}
        subject = Subject(self.weights, shapes, json.loads(text), text, self.config)
        if problems := validate.problems(subject, digest=False):
            raise validate.refusal(self.weights, problems)
        kept = {name: value for name, value in self.header.metadata.items() if name != making.ENTRY}
        return {**kept, sealed.METADATA_KEY: text, **made}


_PUT = {
    "header": Documents._put_header, "manifest": Documents._put_manifest, "config": Documents._put_config,
    "card": Documents._put_card,
}  # fmt: skip


def _is_field(name: str, inner: str) -> bool:
    """Tell whether a name is a field's, bare or behind the name of a component: `unet.base_model_name_or_path`."""
    return name == inner or name.endswith(f".{inner}")


def _weights(listing: Listing, adapter: Adapter | None) -> Path | None:
    """Return the safetensors file that holds the adapter, the first of several."""
    tensors = (*adapter.tensors().values(), *adapter.copies.values()) if adapter else ()
    read = {lazy.file for lazy in tensors if lazy.file}
    named = [listing.folder / name for name in listing.weights if name.endswith(".safetensors")]
    files = [path for path in named if path in read] or ([] if adapter else named)
    if len(files) > 1:
        warned("%s: %d files hold it; the header of %s is edited", listing.path, len(files), files[0].name)
    return files[0] if files else None


def _with_base_tag(front: list[str], base: str | None) -> list[str]:
    """Give the tags of a front matter the one of this base model, `base_model:adapter:org/name`, and no other."""
    tags = data_of(front).get("tags")
    if not isinstance(tags, list):
        return front
    ours = [f"base_model:adapter:{base}"] if base and any(_is_base(tag) for tag in tags) else []
    kept = [tag for tag in tags if not _is_base(tag)]
    return with_field(front, "tags", [*ours, *kept] or None) if ours + kept != tags else front


def _is_base(tag: object) -> bool:
    return isinstance(tag, str) and tag.startswith("base_model:")


def place_of(documents: Documents) -> Path:
    """Return the path that stands for an adapter's files while they are edited."""
    return documents.weights or documents.folder / CONFIG_FILE
