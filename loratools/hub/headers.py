"""A folder of headers alone, fetched by range requests: enough for `inspect` and for the schema tier of a base hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.errors import BadFile
from loratools.hub import files
from loratools.hub.client import Hub, RemoteFile, quiet
from loratools.hub.refs import Ref
from loratools.parallel import each
from loratools.storage import atomic
from loratools.storage.header import MAX_HEADER
from loratools.storage.strict_json import MAX_INDEX, parse_json_object

FIRST = 1 << 16
"""Bytes of the first request for a header; a longer header takes a second one for exactly the rest."""

_SMALL = 1_000_000
_NOT_NEEDED = ("tokenizer", "vocab", "special_tokens_map", "added_tokens", "trainer_state")


@quiet()
def headers_of(hub: Hub, ref: Ref, folder: Path) -> Path:
    """Fill a folder with the headers and small JSON files of what `ref` names; return it, or the file in it.

    Every file has its full size there, but zeros where a tensor's data, a tokenizer or a text would be: to be read by
    what looks at headers only.

    Raises `HubError`, and `BadFile` where the weights are not safetensors.
    """
    commit = hub.commit(ref.repo, ref.revision)
    tree = hub.tree(ref.repo, commit)
    selection, names = choose(hub, ref, commit, tree)
    if pickles := [name for name in selection.weights if not name.endswith((".safetensors", ".json"))]:
        hint = f"Fetch it first: loratools pull {ref.repo} -o DIR"
        raise BadFile(f"{ref}: {pickles[0]} has no header that can be read from afar", hint=hint)

    def fetch(name: str, file: RemoteFile) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as output:
            if name.endswith(".safetensors"):
                output.write(_header(hub, ref.repo, commit, file))
            elif name in selection.weights or _is_config(name, file):
                output.write(hub.small(ref.repo, commit, file, MAX_INDEX))
            output.truncate(file.size)

    each(fetch, {name: tree[names[name]] for name in selection.paths}, 8)
    return folder / Path(ref.path).name if ref.path in names.values() and ref.path else folder


def choose(
    hub: Hub, ref: Ref, commit: str, tree: Mapping[str, RemoteFile], kind: files.Kind | None = None
) -> tuple[files.Selection, dict[str, str]]:
    """Return what is needed of what `ref` names, and name -> path in the repository of all that lies there."""
    try:
        names = files.under(tree, ref.path)

        def index(name: str) -> dict[str, Any]:
            if name not in names:
                raise BadFile(f"{name} is not there")
            return parse_json_object(hub.small(ref.repo, commit, tree[names[name]], MAX_INDEX).strip(), Path(name))

        if ref.path in tree and ref.path:  # a file that was asked for by name is what is wanted
            name = Path(ref.path).name
            return files.Selection((name,), tuple(sorted(names.keys() - {name}))), names
        return files.select(names, kind or files.kind_of(names), index), names
    except BadFile as error:
        raise BadFile(f"{ref}: {error.message}", error.problems, hint=error.hint) from None


def _header(hub: Hub, repo: str, commit: str, file: RemoteFile) -> bytes:
    begin = hub.part(repo, commit, file, 0, min(FIRST, file.size))
    stop = 8 + int.from_bytes(begin[:8], "little")
    if len(begin) < stop <= min(file.size, 8 + MAX_HEADER):
        begin += hub.part(repo, commit, file, len(begin), stop)
    return begin[:stop]


def _is_config(name: str, file: RemoteFile) -> bool:
    return name.endswith(".json") and file.size <= _SMALL and not Path(name).name.startswith(_NOT_NEEDED)


def schema_of(hub: Hub, ref: Ref, algorithm: str) -> str:
    """Return the schema tier of the base hash of a model on the Hub, from its headers alone."""
    from loratools.storage.checkpoint import Checkpoint

    with atomic.temporary("headers") as folder:
        return Checkpoint.open(headers_of(hub, ref, folder)).schema(algorithm)
