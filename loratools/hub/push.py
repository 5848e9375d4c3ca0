"""An adapter or a model becomes a repository: validated, with its card, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.adapter.identity import same_name
from loratools.errors import BadFile, LoraToolsError, counted
from loratools.format.manifest import is_path
from loratools.format.record import held
from loratools.hub import card as cards
from loratools.hub import files, section
from loratools.hub.client import Hub
from loratools.hub.refs import parse, repository
from loratools.hub.subject import Subject, read
from loratools.hub.upload import Committed, Target, Uploader, look
from loratools.options import Options
from loratools.parallel import Progress, no_progress
from loratools.storage.beside.cards import MAX_CARD, read_bytes
from loratools.storage.beside.paths import paths_in
from loratools.storage.sources import Location, as_path
from loratools.surgery.inspect import AdapterSummary

CARD = "README.md"


@dataclass(frozen=True, slots=True)
class Push:
    """A push that is decided: what is sent, what the repository has already, what it loses, and the card."""

    hub: Hub
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


def push(
    path: Location,
    repo: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    private: bool = False,
    message: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    card: cards.Side | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Committed:
    """Send an adapter or a model to the Hub, in one commit or none.

    It is validated first; a file that the repository has already is not sent again. The model card keeps what a person
    wrote in it. Training state and paths of this machine are not sent.

    Args:
        path: The adapter or the model: a folder, or a single file.
        repo: `org/name`, perhaps with `@branch`; it is made where it does not exist.
        revision: The branch to commit to; it is made where it does not exist. Default: `main`.
        create_pr: Open a pull request instead of changing the branch.
        private: Make a new repository private.
        message: The title of the commit. Default: what was pushed.
        base_model: The base model's name on the Hub, `org/name`. Default: as the files say.
        license: The licence for the card, such as `apache-2.0`. Default: README.md's, or the base model's.
        card: Where the folder's and the Hub's README.md have both been changed: whose stays, `"local"` or `"hub"`.
            Default: that is an error.
        token: Default: that of `hf auth login`, or HF_TOKEN.
        progress: Called with the bytes that were sent since its last call.

    Returns:
        The commit and its address. `notes` say what the card lacks, and what stayed here.

    Raises:
        InvalidOption: `repo` is no `org/name`, or names another branch than `revision`.
        BadFile, InvalidFormat, UnknownKind, UnsupportedAdapter: It is not sound.
        HubError: The Hub said no, could not be reached, or the branch moved meanwhile.

    Example:
        >>> push("sealed", "lab/adapter", license="mit").url  # doctest: +SKIP
        'https://huggingface.co/lab/adapter/commit/…'
    """
    Options().flag("private", private).text("message", message).done()
    prepared = prepare(
        path, repo, revision=revision, create_pr=create_pr, base_model=base_model, license=license, card=card,
        token=token,
    )  # fmt: skip
    return send(prepared, message=message, private=private, progress=progress)


def prepare(
    path: Location, repo: str, *, revision: str | None = None, create_pr: bool = False, base_model: str | None = None,
    license: str | None = None, card: cards.Side | None = None, token: str | None = None,
) -> Push:  # fmt: skip
    """Decide a push and send nothing; parameters and errors are those of `push`."""
    checked = Options().flag("create_pr", create_pr).text("revision", revision).text("base_model", base_model)
    checked.text("license", license).text("token", token).done()
    ref = repository(repo, revision)
    if ref.path:
        checked.problems.append(f"expected org/name, found {repo!r}")
    if card is not None:
        checked.word("card", card, cards.Side)
    checked.done()
    subject, hub = read(as_path(path), base_model), Hub(token=token)
    target = look(hub, ref.repo, revision=ref.revision, create_pr=create_pr)
    text, notes = card_for(hub, subject, target, license, card)
    if subject.kind == "adapter" and not subject.task:
        notes.append("the adapter states no task_type, so the Hub shows no code to load it")
    if isinstance(subject.summary, AdapterSummary) and (private := _private(subject.summary.entries)):
        shown = ", ".join(private[:8]) + (" …" if len(private) > 8 else "")
        notes.append(f"the header names paths of a machine ({shown}): loratools edit {path} --strip takes them out")
    if subject.left_out:
        shown = ", ".join(subject.left_out[:8]) + (" …" if len(subject.left_out) > 8 else "")
        stay = counted(len(subject.left_out), "file") + (" is" if len(subject.left_out) == 1 else " are")
        notes.append(f"{stay} no part of it and left here: {shown}")
    content = {**subject.content, CARD: text.encode()}
    unchanged = tuple(name for name, data in content.items() if target.has(name, data))
    sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in content.items()}
    new = {name: size for name, size in sizes.items() if name not in unchanged}
    return Push(hub, subject, target, new, unchanged, files.stale(target.tree, subject.content), text, tuple(notes))


def send(
    prepared: Push, *, message: str | None = None, private: bool = False, progress: Progress | None = None
) -> Committed:
    """Send a prepared push in one commit; where the repository has everything already, make none.

    Raises `HubError`: the card is refused, the branch moved, no permission, …
    """
    hub, target, progress = prepared.hub, prepared.target, progress or no_progress
    if not prepared.send and not prepared.remove:
        return Committed(target.head, f"{hub.endpoint}/{target.repo}", new=False, notes=prepared.notes)
    if CARD in prepared.send:  # before a single file is sent
        hub.validate_card(target.repo, prepared.card)
    uploader = Uploader(hub, target, private=private)
    content = {**prepared.subject.content, CARD: prepared.card.encode()}
    for name, size in prepared.send.items():
        uploader.send(name, content[name])
        progress(size)
    for name in prepared.remove:
        uploader.remove(name)
    committed = uploader.commit(message or f"Push {prepared.subject.kind} with loratools")
    return replace(committed, notes=prepared.notes)


def card_for(
    hub: Hub, subject: Subject, target: Target, license: str | None, keep: cards.Side | None
) -> tuple[str, list[str]]:
    """Return the model card to push, and what should be said about it; see `card.merged`.

    Raises `HubError` where folder and Hub have two different texts and `keep` does not say which one stays.
    """
    notes: list[str] = []
    base_card = _base_card(hub, subject.base_model, notes)
    own = subject.content.get(CARD)
    local = _text(read_bytes(own), str(own)) if isinstance(own, Path) else None
    if local is not None and subject.base_path and subject.base_model:
        local = local.replace(subject.base_path, subject.base_model)  # PEFT and TRL write it there
    there = target.tree.get(CARD)
    remote = None
    if there and target.head:
        remote = _text(hub.small(target.repo, target.head, there, MAX_CARD), f"hf://{target.repo}/{CARD}")
    summary = subject.summary
    if isinstance(summary, AdapterSummary):
        facts = section.adapter_facts(subject.base_model, subject.task, base_card)
        text = section.adapter_section(summary, target.repo, subject.base_model, subject.task)
    else:
        facts = section.checkpoint_facts(summary, subject.base_model, subject.record, base_card)
        file = subject.path.name if subject.path.is_file() else None
        text = section.checkpoint_section(summary, target.repo, subject.base_model, file)
    stated = [cards.parse(readme).data() for readme in (local, remote) if readme]
    force: dict[str, Any] = {"license": license} if license else {}
    force |= _of_base(subject, stated, notes)
    if local is not None and (public := cards.public(local)) != local:
        notes.append("README.md names paths of a machine; the card has the names that they end with")
        local = public
    if license or any(front.get("license") for front in stated):
        facts = {name: value for name, value in facts.items() if not name.startswith("license")}
    written = cards.merged(local, remote, facts, text, force=force, keep=keep)
    if not any(line.startswith("license:") for line in cards.parse(written).front):
        notes.append("the card states no licence: neither the base model nor README.md has one; give it with --license")
    return written, notes


def _private(entries: Mapping[str, str]) -> list[str]:
    """Return the entries of a header that hold local paths."""
    return [name for name, value in sorted(entries.items()) if paths_in(value)]


def _of_base(subject: Subject, stated: list[dict[str, Any]], notes: list[str]) -> dict[str, Any]:
    """Return the base model that the card has whatever a person's text says: that of the files, and never a path."""
    fields = [front.get("base_model") for front in stated]
    told = {str(name) for field in fields for name in (field if isinstance(field, list) else [field]) if name}
    if subject.base_model is None:
        return {"base_model": None, "base_model_relation": None} if any(map(is_path, told)) else {}
    others = sorted(name for name in told if same_name(name, subject.base_model) is False)
    if others and not subject.base_given and not any(map(is_path, others)):
        notes.append(f"README.md names the base model {', '.join(others)}; the files say {subject.base_model}")
    wrong = told != {subject.base_model} if subject.kind == "adapter" else others and held(subject.record)
    forced = subject.base_given or any(map(is_path, told)) or (told and wrong)
    return {"base_model": subject.base_model} if forced else {}


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


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadFile(f"{where}: not UTF-8 text") from None
