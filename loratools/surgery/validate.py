"""Validate an adapter against the specification, and its base hash against a base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratools.adapter.model import BaseIdentity
from loratools.format import reader
from loratools.format import validate as rules
from loratools.parallel import Progress
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.base import differences


@dataclass(frozen=True, slots=True)
class Validation:
    """What `validate` found: the clause report, and where a base was given, how it differs from the sealed one."""

    report: rules.Report
    differences: tuple[str, ...] | None = None

    @property
    def valid(self) -> bool:
        """Whether no clause is broken and the base, if there was one, is the right one."""
        return not self.report.problems and not self.differences


def validate(
    path: str | Path,
    base: Checkpoint | None = None,
    *,
    data: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Check every clause of the specification, and with `base` every tier of the base hash that the adapter states.

    `data` also reads the adapter's tensors and compares them with its digest; all else comes from the header. The base
    is compared only when the adapter itself is valid. Raises `BadFile` where there is nothing to read.
    """
    report = rules.report(Path(path), digest=data)
    if report.problems or base is None:
        return Validation(report)
    identity = reader.read(Path(path)).base or BaseIdentity()
    return Validation(report, tuple(differences(identity, base, threads=threads, progress=progress)))
