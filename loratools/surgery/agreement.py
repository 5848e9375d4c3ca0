"""Whether adapters belong to one base model: by hash where they record one, else by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from loratools.adapter.model import BaseIdentity
from loratools.errors import WrongBase
from loratools.storage import digest


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
