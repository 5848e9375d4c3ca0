"""Validate an adapter against the specification, and its base hash against a base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter.model import BaseIdentity
from loratools.format import reader
from loratools.format import validate as rules
from loratools.options import Options
from loratools.parallel import Progress
from loratools.storage.sources import Location, local, session

if TYPE_CHECKING:
    from loratools.storage.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Validation:
    """The report on every clause and, where a base was given, how it differs from the sealed one.

    `sealed` tells whether a valid adapter has a base hash, by which a wrong base is noticed.
    """

    report: rules.Report
    differences: tuple[str, ...] | None = None
    sealed: bool = False

    @property
    def valid(self) -> bool:
        """Whether no clause is broken and the base, if there was one, is the right one."""
        return not self.report.problems and not self.differences


@session()
def validate(
    path: Location,
    base: Location | Checkpoint | None = None,
    *,
    data: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Check an adapter against every clause of the specification, and a base against the hash that it was sealed with.

    Args:
        path: The adapter: a safetensors file, a folder that holds one, or an `hf://` reference.
        base: The base model: a path, an `hf://` reference, or an open `Checkpoint`. It is compared in every tier of the
            base hash that the adapter states, if the adapter itself is valid. Default: no base is compared.
        data: Whether to read the adapter's tensors and compare them with its digest; all else comes from the header.
            Default: yes.
        threads: Threads that read the base. Default: one per core.
        progress: Called with the bytes of the base read since the last call, from any thread. Default: nobody is told.

    Returns:
        The report on the clauses, and the differences of the base, a sentence each.

    Raises:
        BadFile: There is nothing to read.
        InvalidOption: `data` or `threads` cannot be, or `path` is an opened value: what is validated is a file.

    Example:
        >>> validate("sealed", "base").valid
        True
    """
    Options().flag("data", data).threads(threads).done()
    path = local(path, "adapter" if data else "header")
    subject = rules.open_subject(path)
    report = rules.report_of(subject, digest=data)
    if report.problems or isinstance(subject, rules.Problem):
        return Validation(report)
    identity = reader.adapter_of(path, subject).base or BaseIdentity()
    if base is None:
        return Validation(report, sealed=identity.sealed)
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.base import differences

    checkpoint = base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    differing = differences(identity, checkpoint, threads=threads, progress=progress)
    return Validation(report, tuple(differing), identity.sealed)
