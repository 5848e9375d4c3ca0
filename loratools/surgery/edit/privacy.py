"""What metadata say of people and machines: local paths, names, prompts, captions, mail addresses, session ids.

Entries that are private by what they are go whole; of the others the private parts go: a path keeps its last part, as
the name of a file or a model. What decides the result (ranks, alphas, module names) is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.storage.beside.paths import last_part, without_paths
from loratools.surgery.edit.pictures import bare_uri

_WHOLE: Mapping[str, str] = {
    r"(ss_|ot_)?session_id": "a session id",
    r"(ss_)?(reg_)?dataset_dirs|ss_datasets|(ss_)?datasets?(_config)?|folder_path|image_(dir|folder)s?": (
        "names of dataset folders"
    ),
    r"ss_tag_frequency|captions?|ss_captions?": "captions, and names of dataset folders",
    r"(ss_)?(sample_|instance_|class_|validation_|negative_|positive_)?prompts?(_?\d+)?": "prompts",
    r"parameters|workflow|extra_pnginfo": "prompts",
    r"ot_config|(ss_|training_|train_|job_)?config(_file|_json|uration)?|process": "the whole configuration of the run",
    r"(ss_)?training_comment|comments?|notes?|invocation|ss_command(_line)?|command(_line)?|argv": "a comment",
    r"(ss_|ssmd_|modelspec\.)?(authors?|creators?|users?|user_?names?|owners?|artists?|trained_by|made_by)": "a name",
    r"(ss_)?(host|host_?name|machine|machine_name|node|computer)": "the name of a machine",
    r"(ss_|author_)?e?_?mail": "a mail address",
    r"(ss_)?(wandb|huggingface|hf|hub)_?(run|run_name|api_key|token|entity|project|repo_id|user|path_in_repo)?": (
        "names of accounts and runs"
    ),
    r".*(api_?key|secret|password|access_token|auth_token)": "a secret",
    r"ssmd_cover_images": "pictures, with what they say of their making",
    r"(ss_)?(train_data|reg_data|output|logging|log|cache|save|data|work|root)_?(dir|root|path|folder)": "a path",
    r"(.*\.)?ip(_address)?": "an address",
    r"(loratools\.)?recipe": "how the file was made, with every option that was given",
}  # fmt: skip
_PATTERNS = tuple((re.compile(pattern, re.IGNORECASE), reason) for pattern, reason in _WHOLE.items())

DECISIVE_FIELDS = frozenset({
    "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "layers_to_transform",
    "target_parameters", "modules_to_save", "trainable_token_indices", "layer_replication", "auto_mapping", "peft_type",
    "modules", "replacements", "meaning", "digest", "format_version", "extensions", "bias", "init_lora_weights", "hash",
    "provenance",
})  # fmt: skip
"""Fields of configs and manifests that say what the tensors are; some are patterns, and look like paths."""

_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,8}\.[A-Za-z]{2,24}\b")
_STORE = re.compile(r"\b(?:s3a?|gs|gcs|az|abfss?|wasbs?|oss|hdfs|r2)://[^\s\"'<>|`;,)(\]\[}{]+")
_HOME = re.compile(r"(?:/home/|/Users/|[A-Za-z]:\\Users\\|[A-Za-z]:/Users/)([^/\\\s\"':;,]+)")
_NOBODY = frozenset(
    {"root", "user", "users", "ubuntu", "admin", "runner", "public", "default", "shared", "name", "app"}
)
_LEAST = 3  # letters of a name that is looked for elsewhere


@dataclass(frozen=True, slots=True)
class Found:
    """What is private in a value: why, and what stays of it, None where nothing does."""

    reason: str
    value: Any


def names_in(texts: Iterator[str]) -> frozenset[str]:
    """Return the names of people that home folders in texts are called by."""
    names = {match[1] for text in texts for match in _HOME.finditer(text)}
    return frozenset(name for name in names if len(name) >= _LEAST and name.lower() not in _NOBODY)


def strings_in(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value, and in texts that hold JSON."""
    if isinstance(value, str):
        inside = _json(value)
        yield from [value] if inside is None else strings_in(inside)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)
            yield from strings_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings_in(each)


def private(key: str, value: Any, names: frozenset[str], published: frozenset[str]) -> Found | None:
    """Return what is private in an entry or a field; None where nothing is.

    Args:
        key: Its name.
        value: A text, or a JSON value.
        names: Names of people, which are private wherever they stand.
        published: Keys of what is written for the public, such as trigger words: they do not go whole.
    """
    if key not in published and value not in (None, "", [], {}) and (reason := _whole(key)):
        return Found(reason, None)
    reasons: list[str] = []
    cleaned = _cleaned(value, names, reasons)
    return Found(" and ".join(dict.fromkeys(reasons)), cleaned) if cleaned != value else None


def text_without(text: str, names: frozenset[str]) -> tuple[str, list[str]]:
    """Return a text without what is private in it, and what that was."""
    reasons: list[str] = []
    return _scrubbed(text, names, reasons), list(dict.fromkeys(reasons))


def _whole(key: str) -> str | None:
    return next((reason for pattern, reason in _PATTERNS if pattern.fullmatch(key)), None)


def _cleaned(value: Any, names: frozenset[str], reasons: list[str]) -> Any:
    """Return a value without what is private in it; `reasons` are added to."""
    if isinstance(value, str):
        inside = _json(value)
        if inside is None:
            return _scrubbed(value, names, reasons)
        cleaned = _cleaned(inside, names, reasons)
        return value if cleaned == inside else json.dumps(cleaned, ensure_ascii=False)
    if isinstance(value, Mapping):
        kept = {}
        for key, each in value.items():
            if key in DECISIVE_FIELDS:
                kept[key] = each
            elif isinstance(each, str | list | dict) and each and (reason := _whole(str(key))):
                reasons.append(reason)
            else:
                kept[_scrubbed(str(key), names, reasons)] = _cleaned(each, names, reasons)
        return kept
    if isinstance(value, list | tuple):
        return [_cleaned(each, names, reasons) for each in value]
    return value


def _scrubbed(text: str, names: frozenset[str], reasons: list[str]) -> str:
    if text.startswith("data:"):
        bare = bare_uri(text)
        reasons += ["what a picture says of its making"] if bare != text else []
        return bare

    def gone(match: re.Match[str]) -> str:
        reasons.append("a mail address" if "@" in match[0] else "a name")
        return ""

    if (public := _STORE.sub(lambda match: last_part(match[0].partition("://")[2]), text)) != text:
        reasons.append("the address of a store")
        text = public
    if (public := without_paths(text)) != text:
        reasons.append("a local path")
        text = public
    text = _MAIL.sub(gone, text)
    if names:
        called = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        text = re.sub(rf"(?:[ _]+(?:made |trained )?by[ _]+)?(?<![A-Za-z0-9])(?:{called})(?![A-Za-z0-9])", gone, text)
    return text


def tidy(title: str) -> str:
    """Return a title that names were taken out of, without what joined them; empty where only that is left.

    >>> tidy("dog ()  - "), tidy(" + ")
    ('dog', '')
    """
    return re.sub(r"[(\[]\s*[)\]]", "", re.sub(r" {2,}", " ", title)).strip(" -+,|_·–")


def _json(text: str) -> Any:
    """Return the object or the list of JSON that a text is; None where it is neither."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None
