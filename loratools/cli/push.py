"""loratools push"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk
from loratools.errors import counted

if TYPE_CHECKING:
    from loratools.hub.push import Push
    from loratools.hub.upload import Committed


@make(section="Share")
@click.argument("path", type=options.PATH)
@click.argument("repo", metavar="REPO")
@options.option("--revision", type=str, more="A branch that is not there is made.")
@options.option("--create-pr", is_flag=True)
@options.option("--private", is_flag=True)
@options.option("-m", "--message", type=str)
@options.option("--base-model", type=str, more="[default: as the files say]")
@options.option("--license", type=str, more="[default: README.md's, or the base model's]")
@options.option("--card", type=options.Words("loratools.hub.card", "Side"))
@options.dry_run_option
@pass_talk
def command(
    talk: Talk, path: Path, repo: str, revision: str | None, create_pr: bool, private: bool, message: str | None,
    base_model: str | None, license: str | None, card: Any, dry_run: bool,
) -> show.Report:  # fmt: skip
    """Send an adapter or a model to the Hub, in one commit.

    PATH, a folder or one file, is validated first. REPO is org/name; it is made if it is not there. The model card
    keeps what a person wrote: missing fields of its front matter are added, and one section on the adapter is written
    anew. Training state (optimizer, training_args.bin) stays here, and so does every path of this machine. What the
    repository has already is not sent again. If the branch moves meanwhile nothing is committed. Log in with `hf auth
    login`, or set HF_TOKEN.

    \b
    Examples:
      loratools push adapter lab/adapter --base-model lab/base
      loratools push adapter lab/adapter --create-pr -m 'Trained for longer'
      loratools push merged lab/merged --license apache-2.0 --dry-run
    """
    from loratools.hub import push

    prepared = push.prepare(
        path, repo, revision=revision, create_pr=create_pr, base_model=base_model, license=license, card=card
    )
    talk.warn(*prepared.notes)
    if dry_run:
        return show.Report({"dry_run": True, **_document(prepared)}, _plan(prepared))
    with talk.progress("pushing", prepared.nbytes) as advance:
        done = push.send(prepared, message=message, private=private, progress=advance)
    return show.Report({"dry_run": False, **_document(prepared), **show.plain(done)}, _report(prepared, done))


def _document(prepared: Push) -> dict[str, Any]:
    subject, target = prepared.subject, prepared.target
    return {
        "path": subject.path, "type": subject.kind, "repo": target.repo, "revision": target.revision,
        "creates_repo": not target.exists, "parent": target.head, "send": prepared.send, "bytes": prepared.nbytes,
        "already_there": prepared.unchanged, "remove": prepared.remove,
    }  # fmt: skip


def _plan(prepared: Push) -> Iterator[str]:
    new = "" if prepared.target.exists else ", which is made"
    yield f"would push {prepared.subject.path} to {prepared.target.repo}{new}:"
    yield from show.table(
        ("file", "size", ""),
        [
            *((name, show.size(size), "send") for name, size in prepared.send.items()),
            *((name, "", "already there") for name in prepared.unchanged),
            *((name, "", "remove") for name in prepared.remove),
        ],
        right=(1,),
    )
    yield f"{show.size(prepared.nbytes)} to send"


def _report(prepared: Push, done: Committed) -> Iterator[str]:
    if not done.new:
        yield f"{done.url}: everything is there already; no commit was made"
        return
    yield from show.fields(
        ("pushed", f"{counted(len(prepared.send), 'file')}, {show.size(prepared.nbytes)}"),
        ("already there", counted(len(prepared.unchanged), "file")),
        ("commit", f"{done.commit}"),
        ("at", done.pull_request or done.url),
    )
