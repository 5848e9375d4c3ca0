"""Is it this base? One comparison of two `BaseIdentity` values, tier by tier, for every verb and for live models.

Two digests can be compared where both sides state one, of one algorithm; a digest on one side alone tells nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from loratools.adapter.model import BaseIdentity
from loratools.storage import digest

Tier = Literal["schema", "tensors", "root"]


@dataclass(frozen=True, slots=True)
class Pair:
    """The digests that two identities state for one thing: the schema, one tensor by its `name`, or the root."""

    tier: Tier
    first: str | None
    second: str | None
    name: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two identities say of each other: which digests agree, which differ, and which cannot be compared.

    `by_name` tells whether both state one model's id; None where either states none.
    """

    agreeing: tuple[Pair, ...]
    differing: tuple[Pair, ...]
    unknown: tuple[Pair, ...]
    by_name: bool | None

    @property
    def by_digest(self) -> bool | None:
        """Whether both are of one base as far as digests tell: False if any differs, None if none can be compared."""
        return False if self.differing else True if self.agreeing else None


def compare(first: BaseIdentity, second: BaseIdentity, *, complete: bool = False) -> Comparison:
    """Compare two identities of a base, digest by digest: schema, tensors by name, root.

    With `complete` the second lists every tensor of its base, so that one which it lacks differs; otherwise a tensor
    that only one of them lists is unknown, as an adapter lists those that it changes.
    """
    agreeing: list[Pair] = []
    differing: list[Pair] = []
    unknown: list[Pair] = []
    for pair in _pairs(first, second):
        if complete and pair.tier == "tensors" and pair.second is None:
            differing.append(pair)
        elif not _comparable(pair):
            unknown.append(pair)
        else:
            (agreeing if pair.first == pair.second else differing).append(pair)
    by_name = None if first.id is None or second.id is None else first.id == second.id
    return Comparison(tuple(agreeing), tuple(differing), tuple(unknown), by_name)


def _pairs(first: BaseIdentity, second: BaseIdentity) -> Iterator[Pair]:
    if first.schema or second.schema:
        yield Pair("schema", first.schema or None, second.schema or None)
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        yield Pair("tensors", first.tensors.get(name), second.tensors.get(name), name)
    if first.root or second.root:
        yield Pair("root", first.root or None, second.root or None)


def _comparable(pair: Pair) -> bool:
    if pair.first is None or pair.second is None:
        return False
    return digest.algorithm_of(pair.first) == digest.algorithm_of(pair.second)
