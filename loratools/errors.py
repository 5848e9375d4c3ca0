"""Every deliberate exception of loratools, all `LoraToolsError`: a sentence with an address, all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def printable(text: str) -> str:
    """Return one line of text in which everything can be seen: what a terminal or a page would obey is escaped.

    That is every character without a glyph: controls, ends of lines, marks of direction and width, private ones. Names
    and metadata come from strangers; none may drive a terminal, begin a line of its own, or read otherwise than it is.

    Example:
        >>> printable("q_proj\\n\\x1b[2J")
        'q_proj\\\\n\\\\x1b[2J'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else ascii(c)[1:-1] for c in text)


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """Return a count with its noun, which is `nouns` for any but one; by default it takes an s there.

    Example:
        >>> counted(1, "problem"), counted(3, "problem"), counted(2, "name is", "names are")
        ('1 problem', '3 problems', '2 names are')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {nouns or f'{noun}s'}"


class LoraToolsError(Exception):
    """Report what was found, what was expected, and what to do, in plain words.

    `message` is one sentence with an address (file, tensor); `problems` lists every fault found, one line
    each; `hint` is the next step for the user.
    """

    def __init__(self, message: str, problems: Sequence[str] = (), *, hint: str | None = None) -> None:
        self.message = message
        self.problems = tuple(problems)
        self.hint = hint
        super().__init__(message)

    def reword(self, change: Callable[[str], str]) -> None:
        """Pass every text of the error through a function, which may know better names for what it speaks of."""
        self.message, self.hint = change(self.message), self.hint and change(self.hint)
        self.problems = tuple(map(change, self.problems))
        self.args = (self.message,)

    def __str__(self) -> str:
        lines = [self.message, *(f"  {problem}" for problem in self.problems), *filter(None, [self.hint])]
        return "\n".join(map(printable, lines))

    @property
    def line(self) -> str:
        """The message and all problems in one line, for the list of another error."""
        return "; ".join([self.message, *self.problems])


class BadFile(LoraToolsError):
    """A file is missing, truncated, damaged, or not what it claims to be."""


class InvalidFormat(BadFile):
    """An adapter breaks a numbered clause of the specification."""


class UnknownKind(LoraToolsError):
    """No dialect, update or command has that name, or none of them knows the file."""


class InvalidOption(LoraToolsError, ValueError):
    """An option has a value that it cannot have; the message lists those that it can have."""


class UnknownName(UnknownKind, InvalidOption):
    """There is no dialect, method or profile of the name that a call gives; the message lists those that exist."""


class UnsupportedAdapter(LoraToolsError):
    """A sound adapter carries something that loratools does not do, named."""


class IncompatibleAdapter(LoraToolsError):
    """Adapter and base model do not fit each other: names or shapes."""


class WrongBase(LoraToolsError):
    """The base model is not the one that the adapter was sealed with."""


class LossyConversion(LoraToolsError):
    """The destination dialect cannot say what the source says."""


class OutputRefused(LoraToolsError):
    """The output exists already, is also an input, or already is the result."""


class NoSpace(LoraToolsError):
    """The disk is full, or a quota or file-size limit was reached; nothing was left behind."""


class MissingExtra(LoraToolsError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class NoDevice(LoraToolsError):
    """The machine has no such device to compute on, or torch cannot use it."""


class HubError(LoraToolsError):
    """The Hub said no, or could not be reached."""


class StoreError(LoraToolsError):
    """An object store or a server said no, sent something else, or could not be reached."""
