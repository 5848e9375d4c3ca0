"""Everything on stderr: notes, warnings, progress and errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import click

from loratools.cli._show import SCHEMA, alike, counted, encode, encode_text, line

if TYPE_CHECKING:
    from loratools.parallel import Progress

PATIENCE = 0.5
"""Seconds of work before a progress bar appears."""


MOST_PROBLEMS = 1_000
"""Problems of one error that are printed; with --json all of them are."""
MOST_WARNINGS = 1_000
"""Warnings in one JSON document; a line says that there were more."""
_MORE = f"more than {MOST_WARNINGS} warnings; the others are left out"
_SAYING = Lock()  # of this process: what a warning is like is looked up by any thread
_BEGINNING = 60  # characters of a text that tell which one it is


@dataclass(slots=True, eq=False, repr=False)
class Talk:
    """How one run talks: set by -q, -v, --no-progress and --json, wherever they stand.

    With --json nothing goes to stderr: the result or the error is one document on stdout, with the warnings in it.
    `names` maps paths that are only known to this process to what the user called them. `about` is the path that all of
    it is about, where a run has several; `take` takes the lines that would go to stderr. Notes and warnings wait
    until the work begins, so that an error that keeps it from beginning comes first.
    """

    json: bool = False
    quiet: bool = False
    verbose: int = 0
    no_progress: bool = False
    color: bool | None = None
    warnings: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    about: str = ""
    take: Callable[[str], object] | None = None
    _held: list[tuple[str, str, str]] | None = field(default_factory=list)
    _known: set[str] = field(default_factory=set)
    _first: dict[tuple[str, str], str] = field(default_factory=dict)
    _alike: dict[tuple[str, str], int] = field(default_factory=dict)

    def note(self, *texts: str) -> None:
        """Say something that -q silences, unless it was said before."""
        for text in () if self.quiet or self.json else texts:
            if text not in self._known:
                self._known.add(text)
                self._later(text)

    def tell(self, *texts: str) -> None:
        """Say what was done, line by line as it is: of two steps that did the same each says so. -q silences it."""
        for text in () if self.quiet or self.json else texts:
            self.release()
            self._say(text)

    def warn(self, *texts: str) -> None:
        """Warn, of the same thing once: -q does not silence it, and with --json it is part of the document."""
        for text in texts:
            if text in self._known:
                continue
            self._known.add(text)
            if len(self.warnings) < MOST_WARNINGS:
                self.warnings.append(text)
            elif self.warnings[-1] != _MORE:
                self.warnings.append(_MORE)
            if not self.json:
                self._later(text, "warning", "yellow")

    def release(self) -> None:
        """Say what was held back: the work has begun, or has ended, or an error was told before it."""
        with _SAYING:
            held, self._held = self._held, None
        for text, prefix, color in held or ():
            self._once(text, prefix, color)

    def count(self) -> None:
        """Say how often what was said once could have been said, of other modules or layers."""
        self.release()
        for (prefix, first), more in self._alike.items():
            if more:
                start = first if len(first) <= _BEGINNING else f"{first[:_BEGINNING]}…"
                self._say(f"{more} more like this one, of other modules or layers: {start}", prefix, "yellow")
        self._alike.clear()

    def _later(self, text: str, prefix: str = "", color: str = "") -> None:
        """Say a text once it is known whether there is an error before the work begins, which is told first."""
        if self._held is None or self.verbose:
            self._once(text, prefix, color)
        else:
            self._held.append((text, prefix, color))

    def _once(self, text: str, prefix: str = "", color: str = "") -> None:
        """Say a text unless one was said that differs in numbers of modules and layers alone; count it then."""
        with _SAYING:
            key = (prefix, alike(text))
            first = self._first.setdefault(key, text)
            new = (prefix, first) not in self._alike
            self._alike[prefix, first] = 0 if new else self._alike[prefix, first] + 1
        if new:
            self._say(text, prefix, color)

    def error(
        self, kind: str, message: str, problems: tuple[str, ...] = (), hint: str | None = None, *, lost: bool = False
    ) -> None:
        """Say what failed: one sentence, every problem, and the next step.

        With --json it is the document on stdout, or on stderr where stdout is `lost`.
        """
        if self.json:
            document = {"type": kind, "message": message, "problems": problems, "hint": hint}
            text = encode({"schema": SCHEMA, "error": document, "warnings": self.warnings})
            click.echo(self.named(text), err=lost)
            return
        self._say(message, "error", "red")
        lines = counted(problems)
        for problem in lines[:MOST_PROBLEMS]:
            self._say(f"  {problem}")
        if len(lines) > MOST_PROBLEMS:
            self._say(f"  … and {len(lines) - MOST_PROBLEMS} more; --json lists all")
        if hint:
            self._say(hint, "hint", "cyan")
        self.count()

    @contextmanager
    def decisions(self) -> Iterator[None]:
        """With -v, say what the library decides while the block runs, and why; with -vv, of every tensor."""
        if not self.verbose or self.json:
            yield
            return
        import logging

        note, say, level = self.note, self._say, logging.DEBUG if self.verbose > 1 else logging.INFO

        class Told(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                (say if record.levelno < logging.INFO else note)(record.getMessage())

        logger, told = logging.getLogger("loratools"), Told(level)
        before = logger.level
        logger.addHandler(told)
        logger.setLevel(level)
        try:
            yield
        finally:
            logger.removeHandler(told)
            logger.setLevel(before)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Progress]:
        """Yield a function that takes the bytes done since the last call, from any thread.

        On a terminal it draws a bar once the work has taken `PATIENCE`. Elsewhere, and with -q, --json or
        --no-progress, it draws nothing. The first call says what was held back, for the work has begun.
        """
        if self.quiet or self.json or self.no_progress or sys.stderr is None or not sys.stderr.isatty():
            yield lambda count: self.release()
            return
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no extra thread
        lock = Lock()
        with tqdm(
            total=total, desc=label, unit="B", unit_scale=True, leave=False, delay=PATIENCE, dynamic_ncols=True
        ) as bar:

            def advance(count: int) -> None:
                with lock:
                    self.release()
                    bar.update(count)

            yield advance

    def fetching(self, reference: str, total: int) -> AbstractContextManager[Progress]:
        """Show how far the download of a reference is."""
        return self.progress(f"fetching {reference}", total)

    def named(self, text: str) -> str:
        """Return a text, JSON too, with what the user called a path in the place of the path."""
        for path, name in self.names.items():
            text = text.replace(encode_text(path), encode_text(name)).replace(path, name)
        return text

    def worded(self, text: str, prefix: str = "", color: str = "") -> str:
        """Return a line as it is printed on stderr."""
        start = click.style(f"{prefix}: ", fg=color, bold=True) if prefix else ""
        named = self.named(text)
        return start + line(named if self.about in named else f"{self.about}: {named}")

    def _say(self, text: str, prefix: str = "", color: str = "") -> None:
        shown = self.worded(text, prefix, color)
        if self.take:
            self.take(shown)
        else:
            click.echo(shown, err=True, color=self.color)


pass_talk = click.make_pass_decorator(Talk, ensure=True)
