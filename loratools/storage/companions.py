"""The files beside a model's weights: which of them come along, and what we put there ourselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.decisions import decided, warned
from loratools.errors import IncompatibleAdapter
from loratools.storage.atomic.inputs import see
from loratools.storage.beside import along, templates
from loratools.storage.beside.links import refuse_outside, walk
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.strict_json import read_json

RECORD = "loratools.json"
"""What was done, beside the shards of a model that loratools wrote."""

RESIDUAL = along.RESIDUAL
"""What rounding destroyed."""

TOKENIZER_FILES = frozenset({
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "tiktoken.model", "vocab.bpe", "source.spm", "target.spm",
})  # fmt: skip
"""An adapter that was trained with its own tokenizer brings it; it wins over the base's. So do chat templates."""

_BESIDE_VOCABULARY = ("added_tokens.json", "special_tokens_map.json")
_VOCABULARIES = TOKENIZER_FILES - {"tokenizer_config.json", "merges.txt", *_BESIDE_VOCABULARY}
_ADAPTER = "adapter_config.json"


@dataclass(frozen=True, slots=True, eq=False)
class Companions:
    """What lies beside the weights of a model that is to be written.

    `sources`   relative path -> the file that is copied there
    `texts`     relative path -> what is written there, in the place of a file of that name
    `left`      files of the base, by their relative paths, that stay behind
    `brought`   what came with an adapter and is not the base's: names of files, or "chat template"
    """

    sources: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    brought: tuple[str, ...] = ()


def companions(base: Checkpoint, adapter_paths: Iterable[Path | None]) -> Companions:
    """Decide what comes along with a model: texts, code, tokenizers and pictures, but nothing that may be weights.

    What stays behind is warned of. Of adapters come their tokenizers and chat templates, which win over the base's.

    Raises `IncompatibleAdapter` when two adapters bring different ones, and `BadFile` for links that lead elsewhere.
    """
    of_base, left = _of_base(base) if base.path.is_dir() or base.indexes else ({}, ())
    folders = [path for path in adapter_paths if path is not None and path.is_dir()]
    of_adapters: dict[str, Path] = {}
    template: dict[str, str] = {}
    problems = []
    for folder in folders:
        for path in tokenizer_files(folder):
            other = of_adapters.setdefault(path.name, path)
            if other.read_bytes() != path.read_bytes():
                problems.append(f"{path.name}: {other} and {path} differ")
        own = templates.read(folder)
        if own and template and own != template:
            problems.append(f"{folder}: its chat template differs from that of another adapter")
        template = own or template
    if problems:
        raise IncompatibleAdapter("the adapters bring different tokenizers; merge them one at a time", problems)
    sources = of_base | of_adapters
    if of_adapters.keys() & _VOCABULARIES:  # tokens of one vocabulary say nothing of another
        stale = [name for name in _BESIDE_VOCABULARY if name in of_base and name not in of_adapters]
        sources = {name: path for name, path in sources.items() if name not in stale}
        left = (*left, *stale)
    texts: dict[str, str] = {}
    if template:
        texts = _with_template(sources, template)
    elif of_base and templates.CONFIG in of_adapters and (kept := templates.read(base.root)):
        decided("%s: no adapter brings a chat template, so the base's stays", base.path)
        texts = _with_template(sources, kept)
    if left:
        shown = ", ".join(left[:12]) + (f" and {len(left) - 12} more" if len(left) > 12 else "")
        files = "1 file stays" if len(left) == 1 else f"{len(left)} files stay"
        warned("%s: %s behind, as perhaps weights without the adapter: %s", base.path, files, shown)
    brought = sorted(name for name, path in of_adapters.items() if not _is_same(path, of_base.get(name)))
    if template and template != (templates.read(base.root) if of_base else {}):
        brought.append("chat template")
    return Companions(sources, texts, tuple(left), tuple(brought))


def beside_base(base: Checkpoint) -> tuple[str, ...]:
    """Return all files beside the weights of a base, by their relative paths: () for one that is a single file."""
    coming, left = _of_base(base) if base.path.is_dir() or base.indexes else ({}, ())
    return tuple(sorted((*coming, *left)))


def _is_same(path: Path, other: Path | None) -> bool:
    return other is not None and path.read_bytes() == other.read_bytes()


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the tokenizer's files in an adapter's folder; raise `BadFile` for links that lead elsewhere."""
    files = sorted(path for path in folder.iterdir() if _is_tokenizer(path.name) and path.is_file())
    refuse_outside(files, folder)
    return files


def _is_tokenizer(name: str) -> bool:
    return name in TOKENIZER_FILES or name.startswith("tokenizer.model.v") or name.endswith(".tiktoken")


def _of_base(base: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Return what comes along of the base's folder, and what does not."""
    coming: dict[str, Path] = {}
    left: list[str] = []
    written = {shard.path for shard in base.shards} | set(base.indexes)
    for path in walk(base.root):
        name = path.relative_to(base.root).as_posix()
        if name == _ADAPTER:
            warned("%s: the base's folder holds an adapter too, with which transformers would load it", path)
        if name in (RECORD, RESIDUAL) or path in written:
            continue
        if along.may_come(name) and name != _ADAPTER:
            coming[name] = path
        else:
            left.append(name)
    refuse_outside(coming.values(), base.root)
    return coming, tuple(left)


def _with_template(sources: dict[str, Path], template: Mapping[str, str]) -> dict[str, str]:
    """Take every other template out of `sources`, and return the texts that make this one win in every loader."""
    files = [name for name in sources if templates.is_template(name)]
    for name in files:
        del sources[name]
    config = sources.get(templates.CONFIG)
    stated = templates.inline(config) if config else {}
    return templates.files_of(template) if files or dict(template) != stated else {}


def own_config(adapter: Path | None) -> dict[str, Any] | None:
    """Return the config.json that an adapter's folder brings, if it brings one."""
    path = adapter and adapter / "config.json"
    if not path or not path.is_file():
        return None
    refuse_outside([path], path.parent)
    return read_json(path)


def copy_companions(beside: Companions, folder: Path, texts: Mapping[str, str | None]) -> None:
    """Copy files into `folder` under their relative paths; one with a text in `texts` gets that, or None: is left out.

    A name that is in `texts` alone is written too.
    """
    from loratools.storage import files  # what only reads copies nothing

    written = {**beside.texts, **texts}
    for name in dict.fromkeys([*beside.sources, *written]):
        target, text = folder / name, written.get(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            target.write_text(text, encoding="utf-8", newline="\n")
        elif name not in written:
            see(beside.sources[name])
            files.copy_file(beside.sources[name], target)


def json_text(document: Mapping[str, Any]) -> str:
    """Return a JSON document as the files beside a model have it: indented, readable, with a final newline."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
