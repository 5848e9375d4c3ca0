"""Is it this base? One comparison of two `BaseIdentity` values, tier by tier, for every verb and for live models.

Two digests can be compared where both sides state one, of one algorithm; a digest on one side alone tells nothing.
Names are compared as what they are: `org/name` on the Hub in any spelling (`hf://`, an address, a folder of the Hub's
cache), or a folder, of which the last part is all that another machine, or a manifest, knows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from loratools.adapter.model import BaseIdentity
from loratools.storage import digest

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_ON_HUB = rf"(?:models/)?({_NAME}/{_NAME})(?:@.*|/(?:tree|resolve|blob)/.*)?"
_CACHED = rf"models--({_NAME}?)--({_NAME})(?:[/\\]snapshots[/\\].*)?$"
_SCHEME = r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)"
_FOLDER = r"[./\\~]|[A-Za-z]:[/\\]|file:"

Tier = Literal["schema", "tensors", "root", "logical"]
"""A part of the base hash: of names, dtypes and shapes; of each tensor; of all tensors; of the 16-bit numbers that a
quantized model stands for."""


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The digests that two identities state for one thing: the schema, one tensor by its `name`, or the root."""

    tier: Tier
    first: str | None
    second: str | None
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """What two identities say of each other: which digests agree, which differ, and which cannot be compared.

    `by_name` tells whether both state one model's id (`same_name`), None where either states none or a folder's last
    part is all that they share; `by_type` whether both state one `model_type`, which decides how weights lie, None
    where either states none.
    """

    agreeing: tuple[Pair, ...]
    differing: tuple[Pair, ...]
    unknown: tuple[Pair, ...]
    by_name: bool | None
    by_type: bool | None


def compare(first: BaseIdentity, second: BaseIdentity, *, complete: bool = False) -> Comparison:
    """Compare two identities of a base, digest by digest: schema, tensors by name, root, logical root.

    With `complete` the second lists every tensor of its base, so that one which it lacks differs; otherwise a tensor
    that only one of them lists is unknown, as an adapter lists those that it changes.
    """
    schema = Pair("schema", first.schema or None, second.schema or None)
    root = Pair("root", first.root or None, second.root or None)
    logical = Pair("logical", first.logical or None, second.logical or None)
    names = sorted(first.tensors.keys() | second.tensors.keys())
    tensors = [Pair("tensors", first.tensors.get(name), second.tensors.get(name), name) for name in names]

    def agree(pair: Pair) -> bool | None:
        if pair.first is None or pair.second is None:
            return False if complete and pair.tier == "tensors" and pair.second is None else None
        same_algorithm = digest.algorithm_of(pair.first) == digest.algorithm_of(pair.second)
        return pair.first == pair.second if same_algorithm else None

    stated = [(pair, agree(pair)) for pair in (schema, *tensors, root, logical) if pair.first or pair.second]
    agreeing, differing, unknown = ([pair for pair, own in stated if own is group] for group in (True, False, None))
    by_name = None if first.id is None or second.id is None else same_name(first.id, second.id)
    types = first.model_type, second.model_type
    by_type = None if None in types else types[0] == types[1]
    return Comparison(tuple(agreeing), tuple(differing), tuple(unknown), by_name, by_type)


def as_numbers(identity: BaseIdentity) -> BaseIdentity:
    """Return an identity of numbers: of a quantized base what its codes stand for, instead of what it stores."""
    if not identity.of_codes:
        return identity
    # Parts lie under their module's name; those of a stack, which has no `weight`, have its name before their own.
    starts = tuple(
        start
        for name in identity.weights
        for start in ([f"{name.removesuffix('weight')}"] if name.endswith(".weight") else [f"{name}.", f"{name}_"])
    )
    coded = {name for name in identity.tensors if name in identity.weights or name.startswith(starts)}
    tensors = {name: value for name, value in identity.tensors.items() if name not in coded or name.endswith(".bias")}
    return replace(identity, schema=None, root=identity.logical, tensors={**tensors, **identity.weights})


def same_name(first: str, second: str) -> bool | None:
    """Tell whether two ids of a base model, as adapters state them, name one model.

    None where one of them is a folder's, or a bare name, and no more than the last part of both is the same: a manifest
    keeps only that of a path, and one model lies in folders of different places.

    >>> same_name("hf://Org/Name", "org/name"), same_name("/models/name", "org/name"), same_name("a/name", "b/name")
    (True, None, False)
    """
    (one, one_on_hub), (other, other_on_hub) = (_normal(name) for name in (first, second))
    if one == other:
        return True
    last = [name.rpartition("/")[2].lower() for name in (one, other)]
    return None if last[0] == last[1] and not (one_on_hub and other_on_hub) else False


def is_on_hub(name: str) -> bool:
    """Tell whether an id names a repository on the Hub, `org/name`, in any spelling, and no folder."""
    return _normal(name)[1]


def one_name(names: Sequence[str]) -> str | None:
    """Return the name that others know best, where all can be one model's: one on the Hub, else the shortest.

    None where two of them contradict each other, or there are none.
    """
    if any(same_name(first, second) is False for first, second in combinations(names, 2)):
        return None
    return min(names, key=lambda name: (not is_on_hub(name), len(name), name), default=None)


def _normal(name: str) -> tuple[str, bool]:
    """Return a name in one spelling, and whether it is that of a repository on the Hub, whose case does not count."""
    bare = name.strip()
    bare = (re.sub(_SCHEME, "", bare) if "://" in bare else bare).rstrip("/\\")
    if "models--" in bare and (cached := re.search(_CACHED, bare)):
        return "/".join(cached.groups()).lower(), True
    if "/" in bare and (on_hub := re.fullmatch(_ON_HUB, bare)) and not re.match(_FOLDER, bare):
        return on_hub[1].lower(), True
    parts = [part for part in re.split(r"[/\\]+", bare.removeprefix("file:")) if part != "."]
    return "/".join(parts), False
