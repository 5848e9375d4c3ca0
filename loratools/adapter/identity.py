"""Is it this base? One comparison of two `BaseIdentity` values, tier by tier, for every verb and for live models.

Two digests can be compared where both sides state one, of one algorithm; a digest on one side alone tells nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loratools.adapter.model import BaseIdentity
from loratools.storage import digest

Tier = Literal["schema", "tensors", "root"]
"""A part of the base hash: of names, dtypes and shapes; of each tensor; of all tensors."""


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

    `by_name` tells whether both state one model's id, `by_type` whether both state one `model_type`, which decides how
    weights lie; None where either states none.
    """

    agreeing: tuple[Pair, ...]
    differing: tuple[Pair, ...]
    unknown: tuple[Pair, ...]
    by_name: bool | None
    by_type: bool | None


def compare(first: BaseIdentity, second: BaseIdentity, *, complete: bool = False) -> Comparison:
    """Compare two identities of a base, digest by digest: schema, tensors by name, root.

    With `complete` the second lists every tensor of its base, so that one which it lacks differs; otherwise a tensor
    that only one of them lists is unknown, as an adapter lists those that it changes.
    """
    schema = Pair("schema", first.schema or None, second.schema or None)
    root = Pair("root", first.root or None, second.root or None)
    names = sorted(first.tensors.keys() | second.tensors.keys())
    tensors = [Pair("tensors", first.tensors.get(name), second.tensors.get(name), name) for name in names]

    def agree(pair: Pair) -> bool | None:
        if pair.first is None or pair.second is None:
            return False if complete and pair.tier == "tensors" and pair.second is None else None
        same_algorithm = digest.algorithm_of(pair.first) == digest.algorithm_of(pair.second)
        return pair.first == pair.second if same_algorithm else None

    stated = [(pair, agree(pair)) for pair in (schema, *tensors, root) if pair.first or pair.second]
    agreeing, differing, unknown = ([pair for pair, own in stated if own is group] for group in (True, False, None))
    by_name = None if first.id is None or second.id is None else first.id == second.id
    types = first.model_type, second.model_type
    by_type = None if None in types else types[0] == types[1]
    return Comparison(tuple(agreeing), tuple(differing), tuple(unknown), by_name, by_type)
