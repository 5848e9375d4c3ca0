"""Whether adapters belong to one base model: by hash where they record one, else by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from loratools.adapter.model import Adapter, BaseIdentity
from loratools.adapter.naming.wrappers import normalized
from loratools.adapter.placement.resolve import Placement
from loratools.errors import WrongBase
from loratools.parallel import Progress
from loratools.storage import digest
from loratools.storage.checkpoint import Checkpoint
from loratools.storage.header import TensorSpec
from loratools.surgery.hash import hash_tensors


@dataclass(frozen=True, slots=True)
class Agreement:
    """The base that all adapters have in common, as far as they say, and what could not be checked."""

    base: BaseIdentity | None
    warnings: tuple[str, ...] = ()


def agree(names: Sequence[str], bases: Sequence[BaseIdentity | None], check: str = "strict") -> Agreement:
    """Compare the bases of adapters, pair by pair.

    Hashes decide wherever two adapters record comparable ones: a root, a schema, or digests of the same tensors. Else
    names do, and a warning says so. `check` is `strict`, `warn` (differences are warnings) or `off`. Raises `WrongBase`
    with every pair that differs.
    """
    if check not in ("strict", "warn", "off"):
        raise ValueError(f"unknown check {check!r} of the base; one of strict, warn, off")
    differing, uncertain = [], []
    for (name, base), (other_name, other) in combinations(zip(names, bases, strict=True), 2):
        by_hash = _by_hash(base, other)
        if by_hash:
            differing.append(f"{name} and {other_name}: {by_hash}")
        elif by_hash is None:
            ids = [one.id if one else None for one in (base, other)]
            if None in ids:
                nameless = " and ".join(n for n, one in zip((name, other_name), ids, strict=True) if one is None)
                uncertain.append(f"{nameless} does not say which base it belongs to, so it cannot be compared")
            elif ids[0] != ids[1]:
                differing.append(f"{name} belongs to {ids[0]}, {other_name} to {ids[1]}")
            else:
                uncertain.append(f"{name} and {other_name}: the base models are compared by name only, {ids[0]}")
    if differing and check == "strict":
        raise WrongBase(
            "these adapters belong to different base models, so their changes cannot be added up",
            differing,
            hint="Use adapters of one base, or --check-base off if you know that the bases are the same.",
        )
    return Agreement(_common(bases), () if check == "off" else tuple(dict.fromkeys([*differing, *uncertain])))


def _by_hash(one: BaseIdentity | None, other: BaseIdentity | None) -> str | None:
    """Return how the hashes of two bases differ, "" where they agree, None where nothing is comparable."""
    if one is None or other is None:
        return None
    compared = False
    for tier, first, second in (("root", one.root, other.root), ("schema", one.schema, other.schema)):
        if first and second and digest.algorithm_of(first) == digest.algorithm_of(second):
            if first != second:
                return f"the {tier} hashes of their bases differ, {first} and {second}"
            compared = True
    for name in sorted(one.tensors.keys() & other.tensors.keys()):
        first, second = one.tensors[name], other.tensors[name]
        if digest.algorithm_of(first) == digest.algorithm_of(second):
            if first != second:
                return f"{name} differs in their bases, {first} and {second}"
            compared = True
    return "" if compared else None


def _common(bases: Sequence[BaseIdentity | None]) -> BaseIdentity | None:
    """Return what can be said of the one base: what some state and none contradicts.

    Digests of tensors must cover all that the result touches, so they are kept only where every adapter has them.
    """
    known = [base for base in bases if base is not None]
    if not known:
        return None

    def single(values: list[str | None]) -> str | None:
        found = {value for value in values if value}
        return found.pop() if len(found) == 1 else None

    every = all(base is not None and base.tensors for base in bases)
    tensors: dict[str, str] = {}
    if every:
        for base in known:
            if any(tensors.get(name, value) != value for name, value in base.tensors.items()):
                tensors = {}
                break
            tensors |= base.tensors
    identity = BaseIdentity(
        single([base.id for base in known]), single([base.revision for base in known]),
        single([base.schema for base in known]), tensors, single([base.root for base in known]),
    )  # fmt: skip
    return identity if identity != BaseIdentity() else None


def _expected(
    adapters: Sequence[Adapter],
    specs: Mapping[str, TensorSpec],
    placements: Mapping[str, list[tuple[int, Placement]]],
    base: Checkpoint,
    check_base: str,
) -> tuple[dict[str, list[tuple[int, str]]], list[str]]:
    """Collect the digests that adapters recorded for the tensors they touch."""
    expected: dict[str, list[tuple[int, str]]] = {}
    notes: list[str] = []
    problems: list[str] = []
    for i, adapter in enumerate(adapters):
        identity = adapter.base
        if check_base == "off":
            notes.append(f"adapter {i + 1}: base model not checked (--check-base off)")
            continue
        if identity is None or not identity.sealed:
            notes.append(f"adapter {i + 1}: carries no base hash, so the base model cannot be checked")
            continue
        if not identity.tensors:
            if identity.schema is None:
                notes.append(f"adapter {i + 1}: has a root hash only; compare it with `loratools hash`")
                continue
            algorithm = digest.algorithm_of(identity.schema)
            if base.schema(algorithm) != identity.schema:
                problems.append(
                    f"adapter {i + 1}: names, dtypes or shapes of the base differ from those it was sealed with"
                )
            continue
        known = {normalized(name): value for name, value in identity.tensors.items()} | dict(identity.tensors)
        for name in sorted(name for name, here in placements.items() if any(j == i for j, _ in here)):
            if value := known.get(base.origin(name)) or known.get(normalized(base.origin(name))):
                expected.setdefault(name, []).append((i, value))
            elif name in base.specs:
                problems.append(f"adapter {i + 1}: changes {name}, which its recorded base does not list")
    if problems and check_base == "strict":
        raise WrongBase(
            f"{base.path} is not the base model that was recorded",
            problems,
            hint="Use the right base, or --check-base warn if you know better.",
        )
    return expected, notes + problems


def prove(record: Mapping[str, Any], digests: Mapping[str, str], where: str | Path) -> str | None:
    """Hold digests of all tensors against what a merge recorded of its base; return the root if it was recorded.

    Raises `WrongBase` that lists the tensors that differ; and where the record says nothing that could prove anything.
    """
    base: Any = record.get("base")
    base = base if isinstance(base, Mapping) else {}
    recorded, root = base.get("tensors") or {}, base.get("root")
    if not recorded and not root:
        raise WrongBase(f"{where}: the merge recorded no digest of its base, so nothing can be proved")
    wrong = [
        f"{name}: digest {digests.get(name, 'of no tensor')}, recorded {value}"
        for name, value in recorded.items()
        if digests.get(name) != value
    ]
    if wrong or (root and digest.root(digests, digest.algorithm_of(root)) != root):
        raise WrongBase(
            f"{where}: this is not the base model that was merged; {len(wrong)} changed tensor(s) differ",
            wrong[:20],
            hint="One of the files was changed since, or the residual belongs to another merge.",
        )
    return root if isinstance(root, str) else None


def differences(
    identity: BaseIdentity,
    base: Checkpoint,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
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
