"""What is said of an exception: its kind, one sentence, every problem, the next step, and the exit code."""

from __future__ import annotations

import re
from typing import NamedTuple

import click

from loratools.cli._spelling import is_on
from loratools.errors import InvalidOption, LoraToolsError, printable


class Fault(NamedTuple):
    """What went wrong: the name of the exception, a sentence, all problems, a hint or None, and the exit code."""

    kind: str
    message: str
    problems: tuple[str, ...] = ()
    hint: str | None = None
    code: int = 1


def fault_of(error: Exception) -> Fault:
    """Return what is said of an exception; with LORATOOLS_DEBUG its traceback goes to stderr."""
    if is_on("LORATOOLS_DEBUG"):
        import traceback

        for text in "".join(traceback.format_exception(error)).splitlines():
            click.echo(printable(text), err=True)
    kind = type(error).__name__
    if isinstance(error, LoraToolsError):
        code = 2 if isinstance(error, InvalidOption) else 1
        return Fault(kind, error.message, error.problems, error.hint, code)
    if isinstance(error, click.ClickException):
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f"{context.command_path} --help explains it." if context else None
        return Fault(kind, sentence(error.format_message()), (), hint, error.exit_code)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return Fault(kind, where + (error.strerror or str(error)).lower())
    if isinstance(error, MemoryError):
        return Fault(kind, "not enough memory")
    hint = "This is a bug in loratools. Run it again with LORATOOLS_DEBUG=1 to see where, and please report it."
    return Fault(kind, f"internal error: {kind}: {error}".rstrip(": "), (), hint)


_NO_VALUE = {
    r"is not a valid integer( range)?": "is no whole number",
    r"is not a valid float( range)?": "is no number",
    r"is not a valid boolean\. Recognized values: .*": "is neither yes nor no; write 1 or 0",
}  # fmt: skip
"""What click says of a value, in its own terms; and what is said here."""


def sentence(text: str) -> str:
    """Return a text as the message of an error: on one line, its first letter small, without a full stop."""
    text = " ".join(text.split())
    for theirs, ours in _NO_VALUE.items():
        text = re.sub(theirs, ours, text)
    return text[:1].lower() + text[1:].rstrip(".")
