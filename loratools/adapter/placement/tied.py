"""Tied embeddings: a checkpoint that stores one weight for the input embedding and the output head.

A change of one of its names then has no weight of its own. The user says what happens to it:

    error   refuse, and say what the choices are (the default)
    untie   store every name as a tensor of its own, change only what the adapter changed, set tie_word_embeddings false
    both    let the change act on the one weight, as models that keep the tie do

What is written is read alike by transformers 4 and 5, or refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import Names
from loratools.adapter.placement.apart import apart
from loratools.adapter.placement.shared import EMBEDDINGS, HEADS, Ties, last_segment, main_tensor, ties_for
from loratools.adapter.placement.spread import acting, breaking, spread
from loratools.errors import IncompatibleAdapter
from loratools.storage import files
from loratools.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from loratools.adapter.placement.classes import Name, Tie

POLICIES = ("error", "untie", "both")


@dataclass(frozen=True, slots=True, eq=False)
class Untied:
    """The result of a policy: the adapters to place, and what the output needs for them.

    `copies` maps new tensors of the output to the base tensors that they start as; `config` holds changed fields.
    """

    adapters: tuple[Adapter, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def apply_policy(
    adapters: tuple[Adapter, ...], tensors: Mapping[str, Any], config: Mapping[str, Any], policy: str
) -> Untied:
    """Decide where changes of a tied head or embedding go.

    Three kinds of change keep the tie by themselves, under any policy: rows trained for single tokens, which PEFT gives
    head and embedding alike; a head that is replaced by the very tensor which replaces the embedding; a bias.

    Raises `IncompatibleAdapter` under `error` when an adapter touches a tie otherwise, and where no output is read as
    the policy says by every version of transformers; `ValueError` for an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r} for tied embeddings; one of {', '.join(POLICIES)}")
    ties = ties_for(adapters, tensors, config)
    changed = [breaking(adapter, ties) for adapter in adapters]
    touched = {path: pair for paths in changed for path in paths if (pair := ties.find(path))}
    if not touched or (ties.headless and not any(name.is_head for _, name in touched.values())):
        return Untied(tuple(spread(adapter, ties) for adapter in adapters))
    if policy == "error":
        raise _question(touched)
    if policy == "untie":
        _refuse_rows_below(adapters, ties)
        names, copies, fields = apart(ties, tensors, config, acting(adapters, changed, ties))
        return Untied(tuple(spread(adapter, ties, names) for adapter in adapters), copies, fields)
    whole = {tie for tie, _ in touched.values()}
    _refuse_unequal(whole, tensors)
    both = tuple(spread(adapter, ties, chosen=paths) for adapter, paths in zip(adapters, changed, strict=True))
    return Untied(both, {}, _still_tied(whole, ties, config))


def _refuse_rows_below(adapters: tuple[Adapter, ...], ties: Ties) -> None:
    """Raise `IncompatibleAdapter` where one adapter has rows of tokens for a weight, and factors for a head tied to it.

    PEFT adds the factors to a head that has the rows, too: two changes of one new tensor.
    """
    for adapter in adapters:
        pairs = {path: pair for path in adapter.updates if (pair := ties.find(path))}
        heads = {tie: path for path, (tie, name) in pairs.items() if name.is_head}
        for path, (tie, name) in pairs.items():
            rows = adapter.updates[path].replaced_rows and not name.is_head
            if rows and tie in heads and not adapter.updates[heads[tie]].replaced_rows:
                raise IncompatibleAdapter(
                    f"--tied untie: the adapter has rows of tokens for {path}, which PEFT gives the tied head as well, "
                    f"and changes {heads[tie]} besides: both are changes of the head's own weight",
                    hint="Load it into a running model (`loratools.live.load`), which computes as PEFT does.",
                )


def onto_stored(adapter: Adapter, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Adapter:
    """Return an adapter with each change of a name that the base does not store on the tensor that is that weight.

    Raises `IncompatibleAdapter` where two of its changes are then of one tensor.
    """
    ties = ties_for([adapter], tensors, config)
    absent = [path for path in adapter.updates if (pair := ties.find(path)) and pair[1].tensor is None]
    absent += [path for path in adapter.replacements if (pair := ties.find(path)) and pair[1].tensor is None]
    return spread(adapter, ties, lambda tie: tie.stored[:1], chosen=absent) if absent else adapter


def _question(touched: Mapping[str, tuple[Tie, Name]]) -> IncompatibleAdapter:
    """Return the refusal that asks for a policy."""
    tie = next(iter(touched.values()))[0]
    if tie.asked:
        return IncompatibleAdapter(
            f"the adapter changes {' and '.join(sorted(touched))}, this base stores both {' and '.join(tie.stored)}, "
            "and config.json does not say whether they are tied: some classes tie them by default, and load one for "
            "both",
            hint="--tied untie keeps them apart and writes tie_word_embeddings: false.",
        )
    what = "its output head" if tie.has_head else "its embeddings"
    many = ", ".join(str(each.name).removesuffix(".weight") for each in tie.names)
    which = "one of the two" if len(tie.names) == 2 else f"some of the names of one weight, {many}"
    return IncompatibleAdapter(
        f"this base ties {what} to {tie.stored[0]}, and the adapter changes {which}",
        [f"{path}: shares its weight" for path in sorted(touched)],
        hint="--tied untie gives the head a weight of its own; --tied both changes the shared weight.",
    )


def _refuse_unequal(ties: Collection[Tie], tensors: Mapping[str, Any]) -> None:
    """Raise `IncompatibleAdapter` where the base stores a tied weight more than once, and not the same."""
    for tie in ties:
        first, *others = tie.stored
        if unlike := [name for name in others if not files.same_bytes(tensors[first], tensors[name])]:
            raise IncompatibleAdapter(
                f"--tied both: this base stores {' and '.join(unlike)} beside {first}, with other numbers, so there is "
                "no one weight to change",
                hint="Use --tied untie.",
            )


def _still_tied(whole: Collection[Tie], ties: Ties, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of config.json that let every version of transformers tie what the change acts on."""
    if ties.model is None:
        return {}
    keys = [{each.key for each in tie.names} for tie in whole]

    def apart_in_one(stated: Mapping[str, Any]) -> bool:
        assert ties.model is not None
        versions = ties.model.keys(stated).values()
        return not all(any(group <= tied for tied in groups) for groups in versions for group in keys)

    fields = ties.model.tied(config) if apart_in_one(config) else {}
    return {} if apart_in_one({**config, **fields}) else fields


def with_heads(adapter: Adapter, model: Checkpoint) -> tuple[Adapter, dict[str, str]]:
    """Return the adapter, and for heads that it changes and the base does not store the embedding that they start as.

    A head that is replaced by the tensor of the embedding is left out: there it is one weight.
    """
    names, embedding = Names(model.specs, model.config), main_tensor(model.specs, EMBEDDINGS)
    paths = {*adapter.updates, *(path.removesuffix(".weight") for path in adapter.replacements)}
    missing = [path for path in sorted(paths) if last_segment(path) in HEADS and not names.find(path)]
    if embedding is None or not missing:
        return adapter, {}
    of_embedding = [lazy for path, lazy in adapter.replacements.items() if last_segment(path) in EMBEDDINGS]
    kept = {
        path: lazy
        for path, lazy in adapter.replacements.items()
        if lazy not in of_embedding or path.removesuffix(".weight") not in missing
    }
    return replace(adapter, replacements=kept), {f"{path}.weight": embedding for path in missing}
