"""`hf://org/name[@revision][/file]`, wherever a path is taken."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from urllib.parse import unquote

from loratools.errors import BadFile, InvalidOption

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_REF = re.compile(
    rf"(?:{SCHEME})?(?:models/)?(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>refs/[a-z]+/[^/@]+|[^/@]+))?(?:/(?P<path>.+?))?/?"
)


@dataclass(frozen=True, slots=True)
class Ref:
    """A place on the Hub: a model repository, a branch, tag or commit of it, and a file or folder in it."""

    repo: str
    revision: str | None = None
    path: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{revision}{f'/{self.path}' if self.path else ''}"


def parse(text: str) -> Ref:
    """Return the reference that a text is, with or without `hf://`; a revision may be percent-encoded.

    >>> parse("hf://org/name@refs/pr/1/adapter_model.safetensors")
    Ref(repo='org/name', revision='refs/pr/1', path='adapter_model.safetensors')

    Raises `BadFile` for anything else, a data set or a space among it.
    """
    match = _REF.fullmatch(text)
    if match is None or match["repo"].partition("/")[0] in ("datasets", "spaces", "buckets", "kernels"):
        hint = "Expected hf://org/name, hf://org/name@revision or with /file."
        raise BadFile(f"{text!r} is not a model on the Hub", hint=hint)
    path = match["path"]
    if path and not is_plain(path):
        raise BadFile(f"{text!r}: {path!r} is not a path inside a repository")
    return Ref(match["repo"], unquote(match["revision"]) if match["revision"] else None, path)


def repository(text: str, revision: str | None) -> Ref:
    """Return the reference of a text at `revision`, if any; raise `InvalidOption` where the text names one too."""
    ref = parse(text)
    if revision and ref.revision:
        raise InvalidOption(f"revision {revision}, but {text!r} names the revision {ref.revision} too")
    return replace(ref, revision=revision or ref.revision)


def is_plain(path: str) -> bool:
    """Tell whether a path from elsewhere is relative and stays inside the folder that it is put into."""
    parts = path.split("/")
    return not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\\0:]|[\x01-\x1f]", path)
