"""Validate an adapter against the specification, and its base hash against a base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loratools.adapter.model import BaseIdentity
from loratools.format import reader, rules
from loratools.storage import digest
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.hash import hash_tensors


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
    progress: Callable[[int], None] | None = None,
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


def differences(
    identity: BaseIdentity,
    base: Checkpoint,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return in what a base differs from the one an adapter was sealed with, a sentence each; none if it is that base.

    Each tier is compared with the algorithm it was written with. Tensors are read only where the adapter states their
    digests, or the `root` of all. An identity without any digest is itself a difference: nothing can be proved.
    """
    if not identity.sealed:
        return ["the adapter states no base hash, so nothing can be compared"]
    found = []
    if identity.schema and base.schema(digest.algorithm_of(identity.schema)) != identity.schema:
        found.append("schema: other names, dtypes or shapes than the sealed base has")
    found += [f"{name}: not in this base" for name in sorted(identity.tensors.keys() - base.specs.keys())]
    wanted: dict[str, set[str]] = {}
    for name in identity.tensors.keys() & base.specs.keys():
        wanted.setdefault(digest.algorithm_of(identity.tensors[name]), set()).add(name)
    if identity.root:
        wanted.setdefault(digest.algorithm_of(identity.root), set()).update(base.specs)
    for algorithm, names in wanted.items():
        digests = hash_tensors({name: base.specs[name] for name in names}, algorithm, threads, progress)
        found += [
            f"{name}: its bytes are not those of the sealed base"
            for name in sorted(names & identity.tensors.keys())
            if identity.tensors[name].startswith(algorithm) and digests[name] != identity.tensors[name]
        ]
        if identity.root and identity.root.startswith(algorithm) and digest.root(digests, algorithm) != identity.root:
            found.append("root: some tensor is not that of the sealed base")
    return found
