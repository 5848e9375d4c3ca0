"""loratools pull"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._talk import Talk, pass_talk

if TYPE_CHECKING:
    from loratools.hub.pull import Pull, Pulled
    from loratools.options import CheckBase


@make(section="Share")
@click.argument("repo", metavar="REPO")
@options.output_option
@options.option("--revision", type=str, more="[default: main]")
@options.word_option("--check-base", "CheckBase", "warn", "The base model on the Hub is compared.")
@options.dry_run_option
@options.force_option
@options.durable_option
@pass_talk
def command(
    talk: Talk, repo: str, output: Path, revision: str | None, check_base: CheckBase, dry_run: bool, force: bool,
    durable: bool,
) -> show.Report:  # fmt: skip
    """Fetch an adapter or a model from the Hub into a new folder.

    REPO is org/name, with @revision or /file if you like. The revision is resolved to a commit once. Only what the
    adapter or the model is made of is fetched. Every file is compared with the Hub's digest, a sealed adapter with its
    own too, and the folder appears when all of it is right. After an interruption the same command goes on where it
    was. Where the files came from is noted in .loratools/pulled.json.

    \b
    Examples:
      loratools pull lab/adapter -o pulled
      loratools pull lab/base@main -o pulled --dry-run
    """
    from loratools.hub import pull

    prepared = pull.prepare(repo, output, revision=revision, force=force)
    if dry_run:
        return show.Report({"dry_run": True, **_document(prepared)}, _plan(prepared, output))
    with talk.progress("pulling", prepared.nbytes) as advance:
        done = pull.fetch(prepared, output, force=force, durable=durable, check_base=check_base, progress=advance)
    talk.warn(*done.notes)
    document = {"dry_run": False, **_document(prepared), **show.plain(done), "files": _document(prepared)["files"]}
    return show.Report(document, _report(done))


def _document(prepared: Pull) -> dict[str, Any]:
    return {
        "repo": prepared.ref.repo, "revision": prepared.ref.revision, "commit": prepared.commit, "type": prepared.kind,
        "files": {name: file.size for name, file in prepared.files.items()}, "bytes": prepared.nbytes,
    }  # fmt: skip


def _plan(prepared: Pull, output: Path) -> Iterator[str]:
    yield f"would pull {prepared.ref} at commit {prepared.commit} to {output}:"
    rows = [(name, show.size(file.size)) for name, file in prepared.files.items()]
    yield from show.table(("file", "size"), rows, right=(1,))
    yield f"{show.size(prepared.nbytes)} to fetch"


def _report(done: Pulled) -> Iterator[str]:
    yield from show.fields(
        ("pulled", f"{done.output}"),
        ("from", f"hf://{done.repo} at commit {done.commit}"),
        ("files", f"{done.files}, {show.size(done.nbytes)}, all as the Hub lists them"),
        ("digest", f"{done.digest}, verified" if done.digest else None),
        ("base model", f"{done.base.id}: {done.base.reason}" if done.base else None),
    )
