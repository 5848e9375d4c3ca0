"""The record of a merge, `loratools.json` beside the shards of a model: which adapters, which base, how.

A merge writes it; `unmerge` and `switch` read it, and a merge that must not apply an adapter twice. It has no host
path and no time, so equal merges have equal records. A person may have edited it: `read` gives what is there,
`is_complete` checks it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loratools.adapter.identity import one_name
from loratools.adapter.input import AdapterInput
from loratools.adapter.kinds import Update
from loratools.adapter.model import HEADER, Adapter, BaseIdentity
from loratools.errors import OutputRefused, counted
from loratools.format.manifest import LAYERS, public, usual
from loratools.storage.beside.paths import public_entries
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.companions import RECORD
from loratools.storage.sources import origin
from loratools.storage.strict_json import MAX_INDEX, parse_json_object, read_json
from loratools.version import __version__

TOOL = f"loratools {__version__}"
TURNED = "transposed"
"""Field of an adapter's entry: the modules whose weights the base stores (in, out)."""
REPLACED = "replaced"
"""Field of an adapter's entry: the tensors of the model that are the adapter's own."""
SAYS = "header"
"""Field of an adapter's entry: what the header of its file says of its use, such as trigger words."""
TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words", "trigger_word", "trigger_phrase")
"""Entries that hold the words which call what an adapter was trained on."""
KEPT = (
    *TRIGGERS,
    "modelspec.title",
    "modelspec.architecture",
    "modelspec.license",
    "license",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
)
"""Entries of an adapter's header that a record keeps: no names, comments, captions, tags or pictures of a run."""
CARRIED = "carried_from"
"""Field of an adapter's entry: the digest of the adapter of the original that was carried into a folded base."""
DEVICE = "device"
"""Field: what computed the weights, where it was not the processor: whose bytes another device may not write."""
BROUGHT = "brought"
"""Field: files beside the weights that an adapter brought, and that are not the base's."""
ERROR = "error_bound"
"""Field: how far any element can be from the base with these adapters, where some were taken out by subtraction."""
IN_FILE = "loratools.record"
"""Field of a GGUF file, and entry in the header of a model that is one safetensors file: the record as JSON."""
WORDS = "weights"
"""Field of an adapter's entry: the weight of each module in the words of the merge; the scalings have it in them."""

_HOLDS = ("merge", "switch", "unmerge")  # operations after which a model holds the adapters that the record lists


def of_merge(base: Checkpoint, inputs: Sequence[AdapterInput], turned: Sequence[Sequence[str]] = ()) -> dict[str, Any]:
    """Return what a record says before the merge runs.

    `turned` has for each adapter the modules whose weights the base stores (in, out); () where that is not known.
    """
    own, revision = origin(base.path)
    named = one_name([each.adapter.base.id for each in inputs if each.adapter.base and each.adapter.base.id])
    name = own if revision else named  # a folder's name tells less than an adapter may know
    adapters = []
    for i, each in enumerate(inputs):
        updates = each.adapter.updates.values()
        entry: dict[str, Any] = {"id": each.name} if each.name else {}
        entry |= {"revision": each.commit} if each.commit else {}
        entry |= {"digest": each.digest, "weight": each.weight, "dialect": each.adapter.dialect}
        entry["modules"] = len(updates)
        entry["kinds"] = ", ".join(sorted({update.kind for update in updates}))
        entry["ranks"] = ", ".join(map(str, sorted({update.rank for update in updates})))
        entry |= {WORDS: each.words} if each.words else {}
        entries = each.adapter.settings.get(HEADER) or {}
        said = public_entries({name: entries[name] for name in KEPT if name in entries})
        entry |= _applied(each.adapter) | ({TURNED: list(turned[i])} if turned else {})
        adapters.append(entry | ({SAYS: dict(said)} if said else {}))
    identity = {"id": name and public(name), "schema": base.schema()} | ({"revision": revision} if revision else {})
    return {"schema": 1, "operation": "merge", "tool": TOOL, "base": identity, "adapters": adapters}


def _applied(adapter: Adapter) -> dict[str, Any]:
    """Return what decides the change besides the tensors, which the digest covers: scalings, layouts, repeated layers.

    `scaling` is that of most modules, `scalings` has those of the others.
    """
    each = {module: update.scaling for module, update in sorted(adapter.updates.items())}
    most = usual(each.values())
    layouts = {module: _layout(update) for module, update in sorted(adapter.updates.items()) if _layout(update)}
    layers = [list(part) for part in adapter.settings.get(LAYERS) or ()]
    return {"scaling": most, "scalings": {module: s for module, s in each.items() if s != most}, "layouts": layouts} | (
        {"layers": layers} if layers else {}
    )


def _layout(update: Update) -> dict[str, Any]:
    # How the base stores a weight is recorded as it was found, whoever said it.
    return {name: value for name, value in update.layout.items() if name != "transposed"}


def unlike(entry: Mapping[str, Any], adapter: Adapter) -> list[str]:
    """Return in what an adapter differs from that of a record's entry although the digests agree, a sentence each.

    [] where it does not, or where an older record says nothing of scalings and layouts.
    """
    if not isinstance(entry.get("scaling"), int | float):
        return []
    stated = _applied(adapter)
    scalings, layouts, problems = entry.get("scalings"), entry.get("layouts"), []
    scalings, layouts = (value if isinstance(value, Mapping) else {} for value in (scalings, layouts))
    for module, update in sorted(adapter.updates.items()):
        recorded = scalings.get(module, entry["scaling"])
        if not isinstance(recorded, int | float) or not math.isclose(recorded, update.scaling, rel_tol=1e-12):
            problems.append(f"{module}: merged with scaling {recorded}, this file says {update.scaling:g}")
        if layouts.get(module, {}) != stated["layouts"].get(module, {}):
            now = stated["layouts"].get(module, {})
            problems.append(f"{module}: merged with the layout {layouts.get(module, {})}, this file says {now}")
    if entry.get("layers", []) != stated.get("layers", []):
        problems.append(f"layers: merged with {entry.get('layers', [])}, this file says {stated.get('layers', [])}")
    return problems


def read(model: Checkpoint) -> dict[str, Any]:
    """Return the record of a model, of a merge or of another operation; {} where there is none.

    It is in the header of a model that is one file, else beside the files.
    """
    if model.path.suffix == ".gguf":
        from loratools.storage.gguf.container import read_container  # most models are of safetensors

        text = read_container(model.path).get(IN_FILE)
        return parse_json_object(text.encode(), model.path) if isinstance(text, str) else {}
    if is_in_file(model):
        return parse_json_object(model.shards[0].metadata[IN_FILE].encode(), model.shards[0].path, constants=True)
    path = model.root / RECORD
    return read_json(path, most=MAX_INDEX) if model.root.is_dir() and path.is_file() else {}


def is_in_file(model: Checkpoint) -> bool:
    """Tell whether a model is one safetensors file with its record in the header."""
    return len(model.shards) == 1 and IN_FILE in model.shards[0].metadata


def is_complete(record: Mapping[str, Any]) -> bool:
    """Tell whether a record says which adapters the model holds, and what is needed to take them out again."""
    adapters, base = record.get("adapters"), record.get("base")
    if record.get("operation") not in _HOLDS or not isinstance(adapters, list) or not isinstance(base, Mapping):
        return False
    stated = [(each.get("digest"), each.get("weight")) for each in adapters if isinstance(each, Mapping)]
    sound = all(isinstance(digest, str) and isinstance(weight, int | float) for digest, weight in stated)
    return sound and len(stated) == len(adapters) and isinstance(base.get("tensors"), Mapping)


def base_of(record: Mapping[str, Any]) -> BaseIdentity:
    """Return what a record says of the base: digests of the changed tensors, and the root where a residual was kept.

    The schema in a record is that of the base as it was merged, which may have had layers repeated: it proves nothing
    of the files, and is left out.
    """
    base: Any = record.get("base")
    base = base if isinstance(base, Mapping) else {}
    return BaseIdentity(base.get("id"), tensors=base.get("tensors") or {}, root=base.get("root"))


def held(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the entries of the adapters that a model holds by its record, as far as they can be read."""
    entries: Any = record.get("adapters") if record.get("operation") in _HOLDS else None
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []


def in_short(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a record's adapters without what the headers of their files say, which may be pictures."""
    return [{name: value for name, value in entry.items() if name != SAYS} for entry in record["adapters"]]


def refuse_second_merge(base: Checkpoint, digests: Sequence[str], taken: Sequence[str] = ()) -> None:
    """Raise `OutputRefused` if a base holds an adapter of one of these digests, and it is not `taken` out."""
    merged = {entry.get("digest") for entry in held(read(base))}
    if again := sorted(set(digests) & (merged - set(taken))):
        in_file = base.path.suffix == ".gguf" or is_in_file(base)
        where = f"{IN_FILE} in its header" if in_file else RECORD
        raise OutputRefused(
            f"{base.path} already is a merge of this adapter ({again[0]}); merging again would apply it twice",
            hint=f"Merge into the base model instead, or remove {where} if you mean it.",
        )


def made_by(record: Mapping[str, Any]) -> str:
    """Return in words what made a model: the operation, how many adapters it holds, by which program."""
    adapters, removed = record.get("adapters"), record.get("removed")
    of = f" of {counted(len(adapters), 'adapter')}" if isinstance(adapters, list) and adapters else ""
    out = f", {len(removed)} taken out" if isinstance(removed, list) and removed else ""
    how = "approximate " if record.get("approximate") else ""
    return f"{how}{record.get('operation')}{of}{out}, by {record.get('tool')}"
