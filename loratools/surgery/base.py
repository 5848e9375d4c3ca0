"""Is it this base? Verbs ask it of adapters among themselves, of a checkpoint, and of what `unmerge` writes.

All of them put the question to `adapter/identity.py`, which compares two identities; here is what each makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from loratools.adapter.identity import Comparison, Pair, compare
from loratools.adapter.model import BaseIdentity
from loratools.errors import WrongBase
from loratools.format import record as records
from loratools.options import CheckBase, Options
from loratools.parallel import Progress
from loratools.storage import digest
from loratools.storage.checkpoint import Checkpoint
from loratools.surgery.hash import hash_tensors


@dataclass(frozen=True, slots=True)
class Agreement:
    """The base that all adapters have in common, as far as they say, and what could not be checked."""

    base: BaseIdentity | None
    warnings: tuple[str, ...] = ()


def agree(names: Sequence[str], bases: Sequence[BaseIdentity | None], check: CheckBase = "strict") -> Agreement:
    """Compare the bases of adapters, pair by pair.

    Digests decide wherever two adapters state comparable ones: a root, a schema, or digests of the same tensors. Else
    names do, and a warning says so. `check` is `strict`, `warn` (differences are warnings) or `off`. Raises `WrongBase`
    with every pair that differs.
    """
    options = Options()
    options.word("check_base", check, CheckBase)
    options.done()
    differing, uncertain = [], []
    for (name, base), (other_name, other) in combinations(zip(names, bases, strict=True), 2):
        first, second = base or BaseIdentity(), other or BaseIdentity()
        comparison = compare(first, second)
        if comparison.differing:
            differing.append(f"{name} and {other_name}: {_first_difference(comparison)}")
        elif comparison.by_digest is None and comparison.by_name is None:
            nameless = " and ".join(n for n, one in ((name, first), (other_name, second)) if one.id is None)
            uncertain.append(f"{nameless} does not say which base it belongs to, so it cannot be compared")
        elif comparison.by_digest is None and comparison.by_name is False:
            differing.append(f"{name} belongs to {first.id}, {other_name} to {second.id}")
        elif comparison.by_digest is None:
            uncertain.append(f"{name} and {other_name}: the base models are compared by name only, {first.id}")
    if differing and check == "strict":
        raise WrongBase(
            "these adapters belong to different base models, so their changes cannot be added up",
            differing,
            hint="Use adapters of one base, or --check-base off if you know that the bases are the same.",
        )
    return Agreement(_common(bases), () if check == "off" else tuple(dict.fromkeys([*differing, *uncertain])))


def _first_difference(comparison: Comparison) -> str:
    pair = comparison.differing[0]
    if pair.tier == "tensors":
        return f"{pair.name} differs in their bases, {pair.first} and {pair.second}"
    return f"the {pair.tier} hashes of their bases differ, {pair.first} and {pair.second}"


def _common(bases: Sequence[BaseIdentity | None]) -> BaseIdentity | None:
    """Return what can be said of the one base: what some adapter states and none contradicts.

    Digests of tensors must cover all that the result touches, so they are kept only where every adapter has them.
    """
    known = [base for base in bases if base is not None]

    def single(values: list[str | None]) -> str | None:
        stated = {value for value in values if value}
        return stated.pop() if len(stated) == 1 else None

    tensors: dict[str, str] = {}
    if len(known) == len(bases) and all(base.tensors for base in known):
        stated = {(name, value) for base in known for name, value in base.tensors.items()}
        tensors = dict(sorted(stated)) if len(dict(stated)) == len(stated) else {}
    identity = BaseIdentity(
        single([base.id for base in known]), single([base.revision for base in known]),
        single([base.schema for base in known]), tensors, single([base.root for base in known]),
    )  # fmt: skip
    return identity if identity != BaseIdentity() else None


def of_headers(base: Checkpoint, identity: BaseIdentity) -> BaseIdentity:
    """Return the schema of a checkpoint, made with the algorithm of another identity's; no tensor is read."""
    return BaseIdentity(schema=base.schema(digest.algorithm_of(identity.schema)) if identity.schema else None)


def identity_like(
    identity: BaseIdentity, base: Checkpoint, *, threads: int | None = None, progress: Progress | None = None
) -> BaseIdentity:
    """Return the identity of a checkpoint in the tiers that another states, each with the algorithm of that one.

    Tensors are read only where the other states their digests, or the root of all.
    """
    wanted: dict[str, set[str]] = {}
    for name in identity.tensors.keys() & base.specs.keys():
        wanted.setdefault(digest.algorithm_of(identity.tensors[name]), set()).add(name)
    if identity.root:
        wanted.setdefault(digest.algorithm_of(identity.root), set()).update(base.specs)
    digests = {
        algorithm: hash_tensors({name: base.specs[name] for name in names}, algorithm, threads, progress)
        for algorithm, names in wanted.items()
    }
    of_root = digest.algorithm_of(identity.root) if identity.root else None
    return BaseIdentity(
        schema=of_headers(base, identity).schema,
        tensors={
            name: digests[digest.algorithm_of(value)][name]
            for name, value in identity.tensors.items()
            if name in base.specs
        },
        root=digest.root(digests[of_root], of_root) if of_root else None,
    )


def differences(
    identity: BaseIdentity, base: Checkpoint, *, threads: int | None = None, progress: Progress | None = None
) -> list[str]:
    """Return in what a base differs from the one an adapter was sealed with, a sentence each; none if it is that base.

    An identity without any digest is itself a difference: nothing can be proved. `threads` is by default one per core;
    `progress` takes the bytes read.
    """
    if not identity.sealed:
        return ["the adapter states no base hash, so nothing can be compared"]
    actual = identity_like(identity, base, threads=threads, progress=progress)
    return [_difference(pair) for pair in compare(identity, actual, complete=True).differing]


def _difference(pair: Pair) -> str:
    if pair.tier == "schema":
        return "schema: other names, dtypes or shapes than the sealed base has"
    if pair.tier == "root":
        return "root: some tensor is not that of the sealed base"
    return f"{pair.name}: {'its bytes are not those of the sealed base' if pair.second else 'not in this base'}"


def prove(record: Mapping[str, Any], digests: Mapping[str, str], where: str | Path) -> str | None:
    """Compare digests of all tensors with what a merge recorded of its base; return the root if it was recorded.

    Raises `WrongBase` that lists the tensors that differ; and where the record says nothing that could prove anything.
    """
    recorded = records.base_of(record)
    if not recorded.sealed:
        raise WrongBase(f"{where}: the merge recorded no digest of its base, so nothing can be proved")
    root = digest.root(digests, digest.algorithm_of(recorded.root)) if recorded.root else None
    comparison = compare(recorded, BaseIdentity(tensors=digests, root=root), complete=True)
    # What cannot be compared, for it was recorded with another algorithm, is not proved either.
    unproved = [pair for pair in (*comparison.differing, *comparison.unknown) if pair.first is not None]
    if unproved:
        wrong = [pair for pair in unproved if pair.tier == "tensors"]
        raise WrongBase(
            f"{where}: this is not the base model that was merged; {len(wrong)} changed tensor(s) differ",
            [f"{pair.name}: digest {pair.second or 'of no tensor'}, recorded {pair.first}" for pair in wrong[:20]],
            hint="One of the files was changed since, or the residual belongs to another merge.",
        )
    return recorded.root
