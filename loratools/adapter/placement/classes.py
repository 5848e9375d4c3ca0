"""What transformers' model classes tie: `ties.json` beside this file, which `tests/make/tie_table.py` makes.

A class is known for each major version of transformers that has it, by the parameters that are one object, for every
way in which config.json can say whether embeddings are tied. The table is read when a class is first asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from loratools.adapter.naming.wrappers import normalized

MAJORS = ("4", "5")
"""Major versions of transformers that the table tells of."""

_FLAG = "tie_word_embeddings"
_SAID = (None, False, True)  # the order of states in the table

Group = frozenset[str]
"""Names of tensors that are one weight in a model class."""


@dataclass(frozen=True, slots=True)
class Name:
    """One name of a weight that is tied: `name` in the model's class (None: not known), `tensor` in the base, if there.

    `is_head` says whether it is the output head; `key` is what its spellings have in common.
    """

    name: str | None
    tensor: str | None
    is_head: bool = False
    key: str = ""


@dataclass(frozen=True, slots=True)
class Tie:
    """One weight of several names, the head last; `asked` says whether only a user can tell if they are one."""

    names: tuple[Name, ...]
    asked: bool = False

    @property
    def stored(self) -> tuple[str, ...]:
        """Return the tensors of the base that hold it, the embedding first."""
        return tuple(each.tensor for each in self.names if each.tensor)

    @property
    def has_head(self) -> bool:
        """Tell whether the output head is one of its names."""
        return self.names[-1].is_head

    @property
    def is_bias(self) -> bool:
        """Tell whether it is a bias: a change of one name is then a change of all, in PEFT too."""
        return any(each.name is not None and each.name.endswith("bias") for each in self.names)


@dataclass(frozen=True, slots=True)
class ModelClass:
    """One class of transformers: what it calls its embedding and head, and what it ties.

    `types` are its model types; `head` and `embedding` names of tensors, None where it has none or no version tells.
    `prefix` is the part before the names of its inner model; `inner` the field of config.json that holds the text
    model's config. `scaled` says that the class multiplies the head's input by another number when it is tied. `states`
    gives for each major version the groups of every state of config.json, None where the class refuses it.
    """

    name: str
    types: frozenset[str]
    head: str | None
    embedding: str | None
    prefix: str
    inner: str | None
    scaled: bool
    states: Mapping[str, tuple[tuple[Group, ...] | None, ...]]

    @property
    def shares_words(self) -> bool:
        """Tell whether encoder and decoder have one embedding: the class then reads text and writes text."""
        groups = (group for states in self.states.values() for state in states for group in state or ())
        return any(all(any(side in name for name in group) for side in ("encoder.", "decoder.")) for group in groups)

    def groups(self, config: Mapping[str, Any]) -> dict[str, tuple[Group, ...]]:
        """Return for each major version what the class ties under this config.json."""
        state = _SAID.index(said(config))
        tied = {}
        for major, states in self.states.items():
            inner = config.get(self.inner) if self.inner else None
            number = 3 * state + _SAID.index(said(inner)) if len(states) > len(_SAID) else state
            tied[major] = states[number] or ()
        return tied

    def keys(self, config: Mapping[str, Any]) -> dict[str, list[frozenset[str]]]:
        """Return the same groups by the names' keys, which versions have in common."""
        return {
            major: [frozenset(map(self.key, group)) for group in groups]
            for major, groups in self.groups(config).items()
        }

    def untied(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of config.json that take the ties away, as far as the class lets go of them."""
        return self._flagged(config, False)

    def tied(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of config.json that make every version tie head and embedding."""
        return self._flagged(config, True)

    def _flagged(self, config: Mapping[str, Any], flag: bool) -> dict[str, Any]:
        changed: dict[str, Any] = {_FLAG: flag}
        inner = config.get(self.inner or "text_config")
        if isinstance(inner, Mapping):  # transformers 4 reads the inner one, transformers 5 the outer one
            changed[self.inner or "text_config"] = {**inner, _FLAG: flag}
        elif self.inner and any(len(states) > len(_SAID) for states in self.states.values()):
            changed[self.inner] = {_FLAG: flag}
        return changed

    def key(self, path: str) -> str:
        """Return what names of one tensor have in common, whichever wrappers are before them."""
        return normalized(path.removeprefix(f"{self.prefix}.") if self.prefix else path)


def model_class(config: Mapping[str, Any]) -> ModelClass | None:
    """Return the class that config.json names, else the one with a head of its model type; None if neither is known."""
    if not config:
        return None
    table = _table()
    names = config.get("architectures")
    named = [str(name) for name in names] if isinstance(names, list) else []
    if not named and isinstance(config.get("model_type"), str):
        named = _with_head(config["model_type"])
    return next((_entry(name) for name in named if name in table["classes"]), None)


def said(config: Any) -> bool | None:
    """Return what one level of a config says of the tie, None if nothing."""
    flag = config.get(_FLAG) if isinstance(config, Mapping) else None
    return flag if isinstance(flag, bool) else None


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("ties.json").read_text(encoding="utf-8"))
    return table


def _with_head(model_type: str) -> list[str]:
    """Return the classes of a model type that have a head, what is usually saved first."""
    order = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel", "ForPreTraining", "ForMaskedLM")
    classes = {name: _entry(name) for name in _table()["classes"]}
    names = [name for name, each in classes.items() if model_type in each.types and each.head]
    return sorted(names, key=lambda name: next((i for i, end in enumerate(order) if name.endswith(end)), len(order)))


@cache
def _entry(name: str) -> ModelClass:
    table = _table()
    entry = table["classes"][name]
    majors = {major: {**entry, **entry[major]} for major in MAJORS if major in entry}

    def latest(key: str) -> Any:
        return next((each[key] for each in reversed(majors.values()) if key in each), None)

    def groups(states: Sequence[int | None]) -> tuple[tuple[Group, ...] | None, ...]:
        partitions = table["partitions"]
        return tuple(None if i is None else tuple(map(frozenset, partitions[i])) for i in states)

    return ModelClass(
        name, frozenset(each["type"] for each in majors.values() if "type" in each), latest("head"),
        latest("embedding"), latest("prefix") or "", latest("inner"), any("scaled" in each for each in majors.values()),
        {major: groups(each["states"]) for major, each in majors.items()},
    )  # fmt: skip
