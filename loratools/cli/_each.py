"""A command that takes one path, run on many: in this process, or with -j in several, which share the files out.

One line an item on stdout, or with --json one document a line, in the order of the items. An item that fails is one
line of error, and the others go on. A command that takes one kind, adapters or models, passes over what is of the other
in a folder of --each: that is a document with --json, else they are counted at the end.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import click

from loratools.cli._batch import OUTPUT, Batch, Item
from loratools.cli._faults import Fault, fault_of
from loratools.cli._show import SCHEMA, Report, encode_line, exact
from loratools.cli._show import line as show_line
from loratools.cli._talk import Talk
from loratools.decisions import warnings_to
from loratools.errors import LoraToolsError, UnknownName
from loratools.storage import sources

_HINTS = 3
"""Hints that are told after all errors; of more, each is about one file only."""


_GARBAGE = 100_000
"""Objects between two looks for cycles of garbage: those of some twenty items."""


_OTHER = {"adapter": "model", "model": "adapter"}
"""What is passed over in a folder by a command whose argument is an adapter, or a model; others take both."""


class OneByOne(Protocol):
    """A command, as far as it is needed here."""

    name: str | None

    def report(self, context: click.Context, talk: Talk) -> Report | None:
        """Run it and return its report, with what it says in `talk`."""
        ...


Load = Callable[[], tuple[click.Command, OneByOne]]
"""Returns the group of all commands and one of them; it can be pickled."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item: lines for stdout and for stderr, and whether all was well.

    `hint` is the next step after an error; `usage` says that the command line itself is wrong; `passed` is the kind of
    an item that was passed over.
    """

    out: tuple[str, ...] = ()
    err: tuple[str, ...] = ()
    ok: bool = True
    hint: str | None = None
    usage: str | None = None
    passed: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """A command with the values of its options, to be run on an item; `apart` from the process that prints."""

    load: Load
    argument: str
    params: Mapping[str, Any]
    talk: Talk
    apart: bool

    def __call__(self, item: Item) -> Outcome:
        """Run the command on one item; nothing but a signal and a closed stdout is raised."""
        root, command = self.load()
        said: list[str] = []
        take = said.append if self.apart else None
        talk = replace(
            self.talk,
            warnings=[*self.talk.warnings],
            names={},
            _held=[],
            _known=set(),
            _first={},
            _alike={},
            about=item.path,
            take=take,
        )
        with click.Context(root, info_name=root.name, obj=talk) as above:
            assert isinstance(command, click.Command)
            context = click.Context(command, parent=above, info_name=command.name, obj=talk)
            output = {} if item.output is None else {OUTPUT: item.output}
            context.params = {**self.params, **output, self.argument: item.path}
            try:
                with sources.session(talk.fetching):  # what is read to know its kind is not read again
                    if item.listed and (other := _OTHER.get(self.argument)) and _is(other, item.path):
                        document = {"schema": SCHEMA, "path": item.path, "passed_over": other, "warnings": []}
                        return Outcome((talk.named(encode_line(document)),) if talk.json else (), passed=other)
                    if item.output is not None:
                        item.output.parent.mkdir(parents=True, exist_ok=True)
                    with context:
                        return _outcome(item, command.report(context, talk), talk, said)
            except BrokenPipeError:
                raise
            except Exception as error:
                usage = error.message if isinstance(error, click.UsageError | UnknownName) else None
                failed, late = _failed(item, fault_of(error), talk), list[str]()
                talk.take = late.append
                talk.count()
                return replace(failed, err=(*said, *failed.err, *late), usage=usage)


def run(work: Work, batch: Batch, context: click.Context) -> bool:
    """Run a command on all items and print what comes of them; return whether all was well."""
    folders = [folder for folder in batch.folders() if not folder.exists()]
    try:
        return _run(work, batch, context)
    finally:
        for folder in folders:
            with suppress(OSError):  # there is a result in it
                folder.rmdir()


def _run(work: Work, batch: Batch, context: click.Context) -> bool:
    talk, failed, passed, hints = work.talk, 0, 0, dict[str, None]()
    talk.release()
    for path, reason in batch.unread:
        _print(_failed(Item(str(path)), Fault("BadFile", f"{path}: cannot be listed: {reason}"), talk), talk)
    for number, outcome in enumerate(_outcomes(work, batch)):
        if number == 0 and outcome.usage:
            raise click.UsageError(outcome.usage, context)
        _print(outcome, talk)
        failed += not outcome.ok
        passed += bool(outcome.passed)
        if outcome.hint:
            hints[outcome.hint] = None
        if number == 0 and not gc.isenabled():  # which is off for a command on one path
            gc.freeze()  # what is imported stays
            gc.set_threshold(_GARBAGE)
            gc.enable()
    failed += len(batch.unread)
    if len(hints) <= _HINTS:
        talk.note(*(f"hint: {hint}" for hint in hints))
    other = _OTHER.get(work.argument, "")
    over = f", {exact(passed)} {other}{'s' if passed > 1 else ''} passed over" if passed else ""
    count = len(batch.items) + len(batch.unread)
    talk.note(f"{exact(count)} path{'' if count == 1 else 's'}, {exact(failed) if failed else 'none'} failed{over}")
    return not failed


def _is(kind: str, path: str) -> bool:
    """Tell whether an adapter, or a model that can be opened, lies at a path; what cannot be read is neither."""
    from loratools import dialects
    from loratools.storage.checkpoint import Checkpoint

    with warnings_to(lambda text: None):  # of which the command, if it takes the path, says what there is to say
        try:
            listing = dialects.Listing.of(path)
            adapter = dialects.is_adapter(listing) or bool(listing.factors)
            return adapter if kind == "adapter" else not adapter and bool(Checkpoint.open(path).specs)
        except LoraToolsError:
            return False


def _outcomes(work: Work, batch: Batch) -> Iterator[Outcome]:
    """Yield what becomes of each item, in order."""
    if batch.workers:
        yield from _on_workers(work, batch, batch.workers)
        return
    if batch.jobs == 1 or len(batch.items) < 2:
        yield from map(work, batch.items)
        return
    from loratools.cli._pool import in_order

    def lost(item: Item, code: int | None) -> Outcome:
        message = f"{item.path}: the process that worked on it ended with exit code {code}"
        hint = "-9 is how a system ends what takes more memory than there is; try a smaller -j."
        return _failed(item, Fault("ChildProcessError", message, (), hint), work.talk)

    yield from in_order(_apart(work, batch.jobs), batch.items, batch.jobs, batch.after, lost)


def _apart(work: Work, jobs: int | None) -> Work:
    """Return the work for a process that shares this machine with so many others, or, for None, has one of its own."""
    from loratools.parallel import cores

    params = dict(work.params)
    if jobs and params.get("threads", 1) is None:
        params["threads"] = max(1, cores() // jobs)
    return replace(work, params=params, talk=replace(work.talk, no_progress=True), apart=True)


def _on_workers(work: Work, batch: Batch, workers: str) -> Iterator[Outcome]:
    """Yield what becomes of each item, in order, from processes of this machine or of others."""
    from loratools.parallel import tasks
    from loratools.parallel.executors import opened

    def lost(item: Item, why: str) -> Outcome:
        message = f"{item.path}: {why}"
        return _failed(item, Fault("ChildProcessError", message, (), "See the logs of the workers."), work.talk)

    with opened(workers) as pool:
        apart = _apart(work, pool.count if pool.local else None)
        yield from tasks.in_order(pool, partial(_there, apart, str(Path.cwd())), batch.items, batch.after, lost)


def _there(work: Work, folder: str, item: Item) -> Outcome:
    """Run the command on one item in a worker, whose current folder becomes the caller's: paths are as given."""
    try:
        os.chdir(folder)
    except OSError as error:
        message = f"{folder}: the worker does not see the caller's current folder: {error.strerror}"
        hint = "Every worker has to see the same folders under the same names."
        return _failed(item, Fault("BadFile", message, (), hint), work.talk)
    return work(item)


def _outcome(item: Item, report: Report | None, talk: Talk, said: Sequence[str]) -> Outcome:
    if report is None:
        return Outcome((), tuple(said))
    if talk.json:
        document = {"schema": SCHEMA, "path": item.path, **report.document, "warnings": talk.warnings}
        return Outcome((talk.named(encode_line(document)),), tuple(said), report.ok)
    text = [report.text] if isinstance(report.text, str) else report.text
    lines = [f"{item.path}:", *text, ""] if report.line is None else [f"{item.path}: {report.line}"]
    out = tuple([show_line(talk.named(line)) for line in lines])
    return Outcome(out, tuple(said), report.ok)


def _failed(item: Item, fault: Fault, talk: Talk) -> Outcome:
    if talk.json:
        error = {"type": fault.kind, "message": fault.message, "problems": fault.problems, "hint": fault.hint}
        document = {"schema": SCHEMA, "path": item.path, "error": error, "warnings": talk.warnings}
        return Outcome((talk.named(encode_line(document)),), ok=False)
    first = f": {fault.problems[0]}" if fault.problems else ""
    more = f" (and {len(fault.problems) - 1} more)" if len(fault.problems) > 1 else ""
    named = "" if item.path in fault.message else f"{item.path}: "
    text = talk.worded(f"{named}{fault.message}{first}{more}", "error", "red")
    return Outcome((), (text,), ok=False, hint=fault.hint and talk.named(fault.hint))


def _print(outcome: Outcome, talk: Talk) -> None:
    for text in outcome.err:
        click.echo(text, err=True, color=talk.color)
    for text in outcome.out:
        click.echo(text)
