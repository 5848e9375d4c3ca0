"""How an output was made, in its record: the command, its options that are no default, its inputs by digest.

    {"command": "merge", "tool": "loratools 1.0", "options": {"keep-residual": true}, "inputs": {
        "base": {"schema": "blake3:…", "content": "blake3:…", "hub": "lab/base", "commit": "…"},
        "adapters": [{"digest": "blake3:…", "content": "blake3:…", "recipe": {…}}]}}

No path and no time is in it, so that equal work has equal records. `digest` is that of the tensors, `content` of all
else that is read of an input, `recipe` the account of an input that has one itself, `suffix` the ending of an output
that is a file. A model is named by the `schema` of its tensors where its numbers can be told from the output and the
record beside it, for reading all of it takes time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.dialects import Listing, located
from loratools.dialects._frame.listing import WEIGHTS
from loratools.errors import BadFile, LoraToolsError, UnsupportedAdapter
from loratools.format import record
from loratools.recipe import identity
from loratools.storage.beside.making import ENTRY, FIELD, noted_root
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import read_header
from loratools.storage.sources import local, origin

if TYPE_CHECKING:
    from loratools.recipe.catalog import Role

MOST = 1_000_000
"""Characters of the account of an input that are taken along; of a longer one only the digest is."""


Content = Callable[[Path], str]
"""Returns the `identity.content_of` an adapter."""


def describe(
    command: str, options: Mapping[str, Any], inputs: Mapping[str, Sequence[str] | str], roles: Mapping[str, Role],
    suffix: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Return the account of a command that runs: `inputs` are the places of what it takes, by option.

    `options` are those whose result it depends on; `roles` says which inputs are models; `suffix` is the ending of an
    output that is a file.
    """
    numbers = command != "merge" or "dtype" in options
    dialect = options.get("dialect")
    listed = {name: [places] if isinstance(places, str) else places for name, places in inputs.items()}
    adapters = {local(place) for name, places in listed.items() for place in places if roles[name] == "adapter"}
    taken: dict[str, Any] = {}
    with identity.contents_of(adapters) as content_of:  # beside their digests, which read all of them too
        for name, places in listed.items():
            entries = [_entry(place, roles[name], dialect, numbers, content_of) for place in places]
            taken[name] = entries[0] if isinstance(inputs[name], str) else entries
    form = {"suffix": suffix} if suffix in WEIGHTS else {}
    return {"command": command, "tool": record.TOOL, "options": dict(options), "inputs": taken, **form}


def _entry(place: str, role: Role, dialect: Any, numbers: bool, content_of: Content) -> dict[str, Any]:
    """Return what an account says of one input; `numbers` has all of a model read for its digest."""
    path = local(place, "checkpoint" if role == "model" else "adapter")
    repository, commit = origin(path)
    entry: dict[str, Any] = {"hub": repository, "commit": commit} if commit else {}
    if role == "adapter":
        entry["digest"] = identity.adapter_of(path, dialect) or content_of(path)
    elif numbers:
        entry["digest"] = noted_root(path) or identity.tensors_of(path, "model")
    else:
        entry["schema"] = identity.schema_of(path)
    entry["content"] = content_of(path) if role == "adapter" else identity.content_of(path, role)
    before = of(path, role)
    if before and len(json.dumps(before)) <= MOST:
        entry[FIELD] = before
    return entry


def of(path: Path, role: Role = "adapter") -> dict[str, Any] | None:
    """Return the account in the record of what lies at a path; None where there is none, or none that is sound.

    An adapter may lie in a folder below; a model (`role`) lies where it is said to, and no dialect is asked.
    """
    try:
        found = _read(path, role)
    except LoraToolsError:
        return None
    return found if is_sound(found) else None


def _read(path: Path, role: Role) -> Any:
    if path.suffix == ".gguf" and path.is_file():
        from loratools.storage.gguf.container import read_container

        fields = read_container(path)
        if text := fields.get(ENTRY):
            return _parsed(text)
    for file in _headers(path, role):
        if text := read_header(file).metadata.get(ENTRY):
            return _parsed(text)
    return record.read(Checkpoint.open(path)).get(FIELD)


def _headers(path: Path, role: Role) -> list[Path]:
    """Return the safetensors files of an adapter; those of a model have its record beside them."""
    if path.is_file():
        return [path] if path.suffix == ".safetensors" else []
    try:
        listing = Listing.of(path) if role == "model" else located(Listing.of(path))
    except (BadFile, UnsupportedAdapter):
        return []
    return [listing.folder / name for name in listing.weights if name.endswith(".safetensors")][:1]


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None


def is_sound(account: Any, depth: int = 0) -> bool:
    """Tell whether a JSON value has the form of an account: a file is a stranger's, and may say anything."""
    if not isinstance(account, dict) or depth > 64 or account.get("suffix", ".gguf") not in WEIGHTS:
        return False
    options, inputs = account.get("options"), account.get("inputs")
    if not (isinstance(account.get("command"), str) and isinstance(options, dict) and isinstance(inputs, dict)):
        return False
    entries = [entry for each in inputs.values() for entry in (each if isinstance(each, list) else [each])]
    return all(
        isinstance(entry, dict)
        and all(isinstance(entry.get(name, ""), str) for name in ("digest", "schema", "content", "hub", "commit"))
        and (FIELD not in entry or is_sound(entry[FIELD], depth + 1))
        for entry in entries
    )
