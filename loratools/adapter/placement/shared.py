"""Which names of a model are one weight: what its class ties, found among the tensors of a base model.

The class is looked up in transformers' own table (`classes.py`); for a class that is not there, names and config.json
tell as far as they can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import normalized

if TYPE_CHECKING:
    from loratools.adapter.placement.classes import Group, ModelClass, Name, Tie

HEADS = ("lm_head", "embed_out", "output_projection")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings")

_HAS_LM_HEAD = ("CausalLM", "LMHeadModel", "ForConditionalGeneration")
_NUMBERED = re.compile(r"\.\d+\.", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class Ties:
    """What of a base is tied. `embedding` and `head` are its tensors, None where it stores none.

    `model` is the class; None for one that is not in the table, or whose names the base does not have. `headless` says
    that its class has no head by its name, so that only an adapter which changes one makes it one.
    """

    embedding: str | None
    head: str | None
    ties: tuple[Tie, ...] = ()
    model: ModelClass | None = None
    headless: bool = False

    @property
    def of_embedding(self) -> Tie | None:
        """Return the tie of the embedding: with the head, or of encoder and decoder."""
        ties = (tie for tie in self.ties if self.embedding in tie.stored)
        return next(ties, None) if not self.headless else None

    def find(self, path: str) -> tuple[Tie, Name] | None:
        """Return the tie that a module, or a parameter, belongs to, and which name of it that is."""
        if not self.ties or in_layer(path):
            return None
        tensor = path if path.endswith((".weight", ".bias")) else f"{path}.weight"
        if self.model is not None:
            key = self.model.key(tensor)
            return next(((tie, each) for tie in self.ties for each in tie.names if each.key == key), None)
        (tie,), last = self.ties, last_segment(tensor)
        names = [each for each in tie.names if last in (HEADS if each.is_head else EMBEDDINGS)]
        return (tie, names[0]) if names else None


def ties_for(adapters: Iterable[Adapter], tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Ties:
    """Return what is tied of a base that these adapters change; nothing where they only change numbered layers."""
    changed = (path for each in adapters for path in (*each.updates, *each.replacements, *each.copies))
    return Ties(None, None) if all(map(in_layer, changed)) else ties_of(tensors, config)


def ties_of(tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Ties:
    """Return what is tied in a base with these tensors and this config.json."""
    from loratools.adapter.placement.classes import model_class  # an adapter of numbered layers asks for no class

    model = model_class(config)
    if model is not None and model.embedding is not None:
        places = _places(model, tensors)
        if places:
            return _known(model, places, config)
    return _guessed(model, tensors, config)


def _places(model: ModelClass, tensors: Iterable[str]) -> dict[str, str]:
    """Return key -> tensor of the base, outside its layers; the shortest name wins over those of side towers."""
    places: dict[str, str] = {}
    for tensor in tensors:
        if not in_layer(tensor):
            key = model.key(tensor)
            if key not in places or len(tensor) < len(places[key]):
                places[key] = tensor
    groups = [group for states in model.states.values() for state in states for group in state or ()]
    embeddings = {model.embedding, *(name for group in groups for name in group)} - {model.head, None}
    return places if any(model.key(str(name)) in places for name in embeddings) else {}


def _known(model: ModelClass, places: Mapping[str, str], config: Mapping[str, Any]) -> Ties:
    def place(name: str | None) -> str | None:
        return places.get(model.key(name)) if name else None

    from loratools.adapter.placement.classes import Name, Tie, said

    head, head_key = place(model.head), model.key(model.head or "")
    versions = model.groups(config)
    titles = {model.key(name): name for groups in reversed(versions.values()) for group in groups for name in group}
    keys = list(model.keys(config).values())
    if head and said(config) is False:  # it is stored apart, and said to be
        keys = [[group - {head_key} for group in groups] for groups in keys]
    ties = []
    for group in _joined(keys):
        names = [Name(titles[key], places.get(key), key == head_key, key) for key in group]
        names.sort(key=lambda each: (each.is_head, each.name != model.embedding, each.name))
        asked = said(config) is None or not all(group in groups for groups in keys)
        tie = Tie(tuple(names), asked and sum(each.tensor is not None for each in names) > 1)
        if len(group) > 1 and tie.stored:
            ties.append(tie)
    embedding = place(model.embedding) or next((tie.stored[0] for tie in ties if tie.has_head), None)
    return Ties(embedding, head, tuple(ties), model)


def _joined(versions: list[list[Group]]) -> list[Group]:
    """Return the groups of all versions, those with a name in common as one."""
    joined: list[Group] = []
    for group in (group for groups in versions for group in groups):
        meeting = [each for each in joined if each & group]
        joined = [each for each in joined if not each & group] + [frozenset(group.union(*meeting))]
    return sorted(joined, key=sorted)


def _guessed(model: ModelClass | None, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> Ties:
    """Tell by usual names: without a head that is stored apart, and is not said to be tied, nothing is."""
    embedding, head = main_tensor(tensors, EMBEDDINGS), main_tensor(tensors, HEADS)
    flag = flag_of(config)
    silent = flag is None and bool(config)  # without any config no class is named, and nothing is tied
    if embedding is None or (head is not None and not flag and not silent):
        return Ties(embedding, head)
    from loratools.adapter.placement.classes import Name, Tie

    names = architectures(config)
    usual = "lm_head.weight" if not names or any(part in name for name in names for part in _HAS_LM_HEAD) else None
    name = head or (model.head if model else usual)
    tie = Tie((Name(embedding, embedding), Name(name, head, True)), asked=head is not None and silent)
    return Ties(embedding, head, (tie,), headless=head is None and _is_headless(config))


def in_layer(path: str) -> bool:
    """Tell whether a path is inside a numbered layer, where nothing is tied to an embedding."""
    return _NUMBERED.search(path) is not None


def flag_of(config: Mapping[str, Any]) -> bool | None:
    """Return what config.json says of the tie, None if nothing."""
    from loratools.adapter.placement.classes import said

    outer = said(config)
    return said(config.get("text_config")) if outer is None else outer


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the model classes that config.json names; [] where it names none."""
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _is_headless(config: Mapping[str, Any]) -> bool:
    """Tell whether the architecture has no output head over the vocabulary, so that nothing is tied."""
    names = architectures(config)
    return bool(names) and not any(re.search("LM|Generation|Causal|PreTraining", name) for name in names)


def main_tensor(tensors: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the tensor of the main embedding or head: the shortest path wins over those of side towers."""
    candidates = [name for name in tensors if name.endswith(".weight") and last_segment(name) in names]
    return min(candidates, key=lambda name: (len(normalized(name)), name), default=None)


def last_segment(path: str) -> str:
    """Return the last segment of a module's name, from its path or that of its weight."""
    return path.removesuffix(".weight").rpartition(".")[2]
