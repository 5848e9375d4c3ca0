"""What is pushed: an adapter's or a model's files, opened and checked before anything is sent."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.dialects._frame.places import table_of
from loratools.errors import BadFile
from loratools.format import manifest, validate
from loratools.format.peft_config import derive_config
from loratools.hub import files
from loratools.hub.refs import is_plain
from loratools.storage.beside.links import refuse_outside
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.pickles import SUFFIXES as PICKLED
from loratools.storage.sources import absent
from loratools.storage.strict_json import MAX_INDEX, read_json
from loratools.surgery.inspect import AdapterSummary, CheckpointSummary, describe_adapter, describe_checkpoint, inspect

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be pushed: name in the repository -> its file, or its bytes where they are made here.

    `base_model` is the base's name on the Hub, `base_given` tells whether the user gave it, and `base_path` is a path
    of this machine that a file had in its place.
    """

    path: Path
    kind: files.Kind
    content: Mapping[str, Path | bytes]
    summary: AdapterSummary | CheckpointSummary
    base_model: str | None
    base_given: bool
    base_path: str | None = None
    task: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def read(path: Path, base_model: str | None) -> Subject:
    """Open and check what is to be pushed; every fault of it is raised here, before anything is sent.

    A sealed adapter is held against every clause of the specification and its own digest, any other adapter is read by
    its dialect, a model's headers and index are compared. A sealed single file gets the names that PEFT looks for, and
    its `adapter_config.json`. Raises `BadFile`, `InvalidFormat`, `UnknownKind`, `UnsupportedAdapter`.
    """
    if not path.exists():
        raise absent(path, on_hub=False)
    if not path.is_dir():
        return _file(path, base_model)
    present = _walk(path)
    kind = files.kind_of(present)
    try:
        selection = files.select(present, kind, lambda name: read_json(present[name], most=MAX_INDEX))
    except BadFile as error:
        raise BadFile(f"{path}: {error.message}", error.problems, hint=error.hint) from None
    if kind == "adapter" and (inner := next((name for name in selection.weights if "/" in name), None)):
        raise BadFile(f"{path}: no adapter at the top of this folder", hint=f"Push {(path / inner).parent}.")
    pictures = [name for name in present if Path(name).suffix.lower() in files.PICTURES]
    chosen = sorted({*selection.paths, *pictures})
    content: dict[str, Path | bytes] = {name: present[name] for name in chosen}
    refuse_outside([present[name] for name in chosen], path)
    left_out = tuple(sorted(present.keys() - content.keys()))
    if kind == "checkpoint":
        return _model(path, content, describe_checkpoint(Checkpoint.open(path), path), left_out, base_model)
    return _adapter(path, content, left_out, base_model)


def _file(path: Path, base_model: str | None) -> Subject:
    """Return what is pushed of one file, an adapter or a whole model: which of the two its tensors tell."""
    summary = inspect(path)
    content: dict[str, Path | bytes] = {path.name: path}
    if isinstance(summary, CheckpointSummary):
        if path.suffix in PICKLED:
            hint = "Write it as safetensors, which `loratools merge` and `dequantize` do, and push that."
            raise BadFile(f"{path}: a pickle, which can run code where it is loaded, is not sent", hint=hint)
        return _model(path, content, summary, (), base_model)
    return _adapter(path, content, (), base_model)


def _model(
    path: Path, content: Mapping[str, Path | bytes], summary: CheckpointSummary, left_out: tuple[str, ...],
    base_model: str | None,
) -> Subject:  # fmt: skip
    record = summary.record or {}
    base = record.get("base")
    stated = (base.get("id") if isinstance(base, Mapping) else None) or _on_the_hub(summary.parent)
    name = _name(base_model or stated, path)
    return Subject(path, "checkpoint", content, summary, name, bool(base_model), record=record, left_out=left_out)


def _on_the_hub(address: object) -> str | None:
    """Return the name of a model of which a GGUF file states the address on the Hub; None for any other words."""
    match = re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?", str(address), re.ASCII)
    return match[1] if match else None


def _walk(folder: Path) -> dict[str, Path]:
    """Return relative path -> file of everything that is not hidden; linked folders are not entered."""
    present: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not is_plain(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            present |= {f"{path.name}/{name}": file for name, file in _walk(path).items()}
        elif path.is_file():
            present[path.name] = path
    return present


def _adapter(
    path: Path, content: dict[str, Path | bytes], left_out: tuple[str, ...], base_model: str | None
) -> Subject:
    adapter = dialects.open_adapter(path)
    if adapter.dialect == "loratools" and (problems := validate.validate(path)):
        raise validate.refusal(path, problems)
    stated = adapter.base.id if adapter.base else None
    base_path = stated if stated and manifest.is_path(stated) else None
    if base_path and not base_model:
        hint = "Name it as the Hub does: --base-model org/name"
        header = [place.key for place in table_of(adapter.dialect).get("base", ()) if place.where == "header"]
        where = header[0] if header else _CONFIG if _CONFIG in content else "the file"
        raise BadFile(f"{path}: {where} names the base model by a path of this machine, {base_path}", hint=hint)
    name = _name(base_model or stated, path)
    if not path.is_dir() and adapter.dialect == "loratools":
        config = json.dumps(derive_config(adapter), indent=2, sort_keys=True, ensure_ascii=False)
        content = {_WEIGHTS: path, _CONFIG: f"{config}\n".encode()}
    elif base_path and isinstance(config_file := content.get(_CONFIG), Path):
        config = json.dumps({**read_json(config_file), "base_model_name_or_path": name}, indent=2, ensure_ascii=False)
        content[_CONFIG] = f"{config}\n".encode()
    summary, task = describe_adapter(adapter, path, adapter.dialect), adapter.settings.get("task_type")
    return Subject(path, "adapter", content, summary, name, bool(base_model), base_path, task, left_out=left_out)


def _name(base_model: str | None, path: Path) -> str | None:
    """Return a base model's name on the Hub; raise `BadFile` for what cannot be one."""
    if base_model is None:
        return None
    if manifest.is_path(base_model) or not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", base_model, re.ASCII):
        hint = "Give it with --base-model org/name"
        raise BadFile(f"{path}: {base_model!r} is not the name of a model on the Hub", hint=hint)
    return base_model
