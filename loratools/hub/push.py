"""An adapter or a model becomes a repository: validated, with its card, in one commit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.errors import BadFile, LoraToolsError
from loratools.format import manifest, validate
from loratools.format.peft_config import derive_config
from loratools.hub import card, files, section
from loratools.hub.client import Hub
from loratools.hub.refs import Ref, is_plain, parse
from loratools.hub.upload import Committed, Target, Uploader, look
from loratools.parallel import Progress
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.strict_json import read_json
from loratools.surgery.inspect import AdapterSummary, CheckpointSummary, describe_adapter, describe_checkpoint

CARD, _CONFIG, _WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"
_MAX_CARD = 10_000_000


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be pushed: name in the repository -> its file, or its bytes where they are made here.

    `base_model` is the base's name on the Hub, `base_path` a path of this machine that a file had in its place.
    """

    path: Path
    kind: files.Kind
    content: Mapping[str, Path | bytes]
    summary: AdapterSummary | CheckpointSummary
    base_model: str | None
    base_path: str | None
    task: str | None
    record: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Push:
    """A push that is decided: what is sent, what the repository has already, what it loses, and the card."""

    subject: Subject
    target: Target
    send: Mapping[str, int]
    unchanged: tuple[str, ...]
    remove: tuple[str, ...]
    card: str
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to send."""
        return sum(self.send.values())


def read(path: Path, *, base_model: str | None = None) -> Subject:
    """Open and check what is to be pushed; every fault of it is raised here, before anything is sent.

    A sealed adapter is held against every clause of the specification and its own digest, any other adapter is read by
    its dialect, a model's headers and index are compared. A sealed single file gets the names that PEFT looks for, and
    its `adapter_config.json`. Raises `BadFile`, `InvalidFormat`, `UnknownKind`, `UnsupportedAdapter`.
    """
    if not path.exists():
        raise BadFile(f"{path}: no such file or folder")
    present = _walk(path) if path.is_dir() else {path.name: path}
    kind = files.kind_of(present) if path.is_dir() else "adapter"
    if path.is_dir():
        try:
            selection = files.select(present, kind, lambda name: read_json(present[name]))
        except BadFile as error:
            raise BadFile(f"{path}: {error.message}", error.problems, hint=error.hint) from None
        pictures = [name for name in present if Path(name).suffix.lower() in files.PICTURES]
        chosen = sorted({*selection.paths, *pictures})
    else:
        chosen = [path.name]
    content: dict[str, Path | bytes] = {name: present[name] for name in chosen}
    left_out = tuple(sorted(present.keys() - content.keys()))
    if kind == "checkpoint":
        from loratools.storage.companions import RECORD

        record = read_json(present[RECORD]) if RECORD in present else {}
        stated = record.get("base")
        stated_name = base_model or (stated.get("id") if isinstance(stated, Mapping) else None)
        summary = describe_checkpoint(Checkpoint.open(path), path)
        return Subject(path, kind, content, summary, _name(stated_name, path), None, None, record, left_out)
    return _adapter(path, content, left_out, base_model)


def prepare(
    hub: Hub,
    subject: Subject,
    ref: Ref,
    *,
    create_pr: bool = False,
    license: str | None = None,
    keep_card: card.Side | None = None,
    base_model_given: bool = False,
) -> Push:
    """Compare what is to be pushed with what the repository has, and write the card; send nothing.

    Raises `HubError`, and `BadFile` for a README.md whose front matter cannot be read.
    """
    target = look(hub, ref.repo, revision=ref.revision, create_pr=create_pr)
    text, notes = card_for(
        hub, subject, target, license=license, keep_card=keep_card, base_model_given=base_model_given
    )
    if subject.kind == "adapter" and not subject.task:
        notes.append("the adapter states no task_type, so the Hub shows no code to load it")
    if subject.left_out:
        shown = ", ".join(subject.left_out[:8]) + (" …" if len(subject.left_out) > 8 else "")
        notes.append(f"{len(subject.left_out)} file(s) are no part of it and stay here: {shown}")
    send, unchanged = {}, []
    for name, content in {**subject.content, CARD: text.encode()}.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if _same(target, name, content):
            unchanged.append(name)
        else:
            send[name] = size
    remove = files.stale(target.tree, subject.content)
    return Push(subject, target, send, tuple(unchanged), remove, text, tuple(notes))


def push(
    hub: Hub, prepared: Push, *, message: str | None = None, private: bool = False,
    progress: Progress | None = None,
) -> Committed:  # fmt: skip
    """Send a prepared push in one commit; where the repository has everything already, make none.

    Raises `HubError`: the card is refused, the branch moved, no permission, …
    """
    if not prepared.send and not prepared.remove:
        return Committed(prepared.target.head, f"{hub.endpoint}/{prepared.target.repo}", new=False)
    if CARD in prepared.send:  # before a single file is sent
        hub.validate_card(prepared.target.repo, prepared.card)
    advance = progress or (lambda count: None)
    uploader = Uploader(hub, prepared.target, private=private)
    content = {**prepared.subject.content, CARD: prepared.card.encode()}
    for name, size in prepared.send.items():
        data = content[name]
        if isinstance(data, bytes):
            uploader.write(name, data)
        else:
            uploader.send(name, data)
        advance(size)
    for name in prepared.remove:
        uploader.remove(name)
    return uploader.commit(message or f"Push {prepared.subject.kind} with loratools")


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
        raise BadFile(
            f"{path}: {_CONFIG} names the base model by a path of this machine, {base_path}",
            hint="Name it as the Hub does: --base-model org/name",
        )
    name = _name(base_model or stated, path)
    if not path.is_dir() and adapter.dialect == "loratools":
        config = json.dumps(derive_config(adapter), indent=2, sort_keys=True, ensure_ascii=False)
        content = {_WEIGHTS: path, _CONFIG: f"{config}\n".encode()}
    elif base_path and isinstance(config_file := content.get(_CONFIG), Path):
        config = json.dumps({**read_json(config_file), "base_model_name_or_path": name}, indent=2, ensure_ascii=False)
        content[_CONFIG] = f"{config}\n".encode()
    summary = describe_adapter(adapter, path, adapter.dialect)
    task = adapter.settings.get("task_type")
    return Subject(path, "adapter", content, summary, name, base_path, task, left_out=left_out)


def _name(base_model: str | None, path: Path) -> str | None:
    """Return a base model's name on the Hub; raise `BadFile` for what cannot be one."""
    if base_model is None:
        return None
    parts = base_model.split("/")
    if manifest.is_path(base_model) or len(parts) > 2 or not is_plain(base_model):
        raise BadFile(
            f"{path}: {base_model!r} is not the name of a model on the Hub", hint="Give it with --base-model org/name"
        )
    return base_model


def _base_card(hub: Hub, base_model: str | None, notes: list[str]) -> Mapping[str, Any]:
    """Return the front matter of the base model's card, for its licence and task; empty where it cannot be read."""
    if base_model is None:
        return {}
    try:
        data = hub.info(parse(base_model).repo).card_data
    except LoraToolsError as error:
        notes.append(f"nothing is taken over from the card of the base model {base_model}: {error.message}")
        return {}
    return data.to_dict() if data else {}


def card_for(
    hub: Hub,
    subject: Subject,
    target: Target,
    *,
    license: str | None = None,
    keep_card: card.Side | None = None,
    base_model_given: bool = False,
) -> tuple[str, list[str]]:
    """Return the model card to push, and what should be said about it; see `card.merged`.

    Raises `HubError` where folder and Hub have two different texts and `keep_card` does not say which one stays.
    """
    notes: list[str] = []
    base_card = _base_card(hub, subject.base_model, notes)
    own = subject.content.get(CARD)
    local = _text(own.read_bytes(), str(own)) if isinstance(own, Path) else None
    if local is not None and subject.base_path and subject.base_model:
        local = local.replace(subject.base_path, subject.base_model)  # PEFT and TRL write it there
    there = target.tree.get(CARD)
    remote = None
    if there and target.head:
        remote = _text(hub.small(target.repo, target.head, there, _MAX_CARD), f"hf://{target.repo}/{CARD}")
    summary = subject.summary
    if isinstance(summary, AdapterSummary):
        facts = section.adapter_facts(summary, subject.base_model, subject.task, base_card)
        text = section.adapter_section(summary, target.repo, subject.base_model, subject.task)
    else:
        facts = section.checkpoint_facts(summary, subject.base_model, subject.record, base_card)
        text = section.checkpoint_section(summary, target.repo, subject.base_model)
    stated = [card.parse(readme).data() for readme in (local, remote) if readme]
    force: dict[str, Any] = {"license": license} if license else {}
    if subject.base_model and (
        base_model_given or any(manifest.is_path(str(front.get("base_model", ""))) for front in stated)
    ):
        force["base_model"] = subject.base_model
    if license or any(front.get("license") for front in stated):
        facts = {name: value for name, value in facts.items() if not name.startswith("license")}
    written = card.merged(local, remote, facts, text, force=force, keep=keep_card)
    if not any(line.startswith("license:") for line in card.parse(written).front):
        notes.append("the card states no licence: neither the base model nor README.md has one; give it with --license")
    return written, notes


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadFile(f"{where}: not UTF-8 text") from None


def _same(target: Target, name: str, content: Path | bytes) -> bool:
    if isinstance(content, Path):
        return target.same(name, content)
    return name in target.tree and target.tree[name].is_bytes(iter([content]))
