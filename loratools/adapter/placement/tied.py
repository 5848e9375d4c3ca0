"""Tied embeddings: a checkpoint that stores one weight for the input embedding and the output head.

A change of one of the two then has no weight of its own. The user says what happens to it:

    error   refuse, and say what the choices are (the default)
    untie   store the head as a tensor of its own, change only what the adapter changed, set tie_word_embeddings false
    both    let the change act on both, as models that keep the tie do
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratools.adapter.model import Adapter
from loratools.adapter.naming.wrappers import normalized
from loratools.errors import IncompatibleAdapter
from loratools.storage.lazy import LazyTensor

POLICIES = ("error", "untie", "both")
HEADS = ("lm_head", "embed_out", "output_projection")
_OTHER_HEADS = {"WhisperForConditionalGeneration": "proj_out", "GPTNeoXForCausalLM": "embed_out"}
"""Model classes whose head has another name than lm_head in their checkpoints."""

_HAS_LM_HEAD = re.compile(r"CausalLM|LMHeadModel|ForConditionalGeneration")

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings")


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

    Two kinds of change keep the tie by themselves, under any policy: rows trained for single tokens, which PEFT gives
    head and embedding alike, and a head that is replaced by the very tensor which replaces the embedding.

    Raises `IncompatibleAdapter` under `error` when an adapter touches either, `ValueError` for an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r} for tied embeddings; one of {', '.join(POLICIES)}")
    embedding = main_tensor(tensors, EMBEDDINGS)
    head = main_tensor(tensors, HEADS)
    silent = _flag(config) is None and bool(config)  # without any config no class is named, and nothing is tied
    if embedding is None or (head is not None and not is_tied(config) and not silent):
        return Untied(adapters)
    touched = sorted({module for adapter in adapters for module in _touched(adapter)})
    adapters = adapters if head else tuple(_without_same_head(adapter) for adapter in adapters)
    if not touched or (
        head is None and _is_headless(config) and not any(last_segment(path) in HEADS for path in touched)
    ):
        return Untied(_rows_on_both(adapters, head))
    if policy == "error" and head is not None and silent:
        raise IncompatibleAdapter(
            f"the adapter changes {' and '.join(touched)}, this base stores both {embedding} and {head}, and "
            "config.json does not say whether they are tied: some classes tie them by default, and load one for both",
            hint="--tied untie keeps them apart and writes tie_word_embeddings: false.",
        )
    if policy == "error":
        raise IncompatibleAdapter(
            f"this base ties its output head to {embedding}, and the adapter changes one of the two",
            [f"{module}: shares its weight" for module in touched],
            hint="--tied untie gives the head a weight of its own; --tied both changes the shared weight.",
        )
    if policy == "untie":
        name = head or _head_name(adapters, embedding, config)
        return Untied(_rows_on_both(adapters, name), {} if head else {name: embedding}, _set_tie(config))
    if head is not None:
        raise IncompatibleAdapter(
            f"--tied both: this base stores {head} beside {embedding}, so there is no one weight to change",
            hint="Use --tied untie.",
        )
    return Untied(tuple(_onto_embedding(adapter, embedding.removesuffix(".weight")) for adapter in adapters))


def main_tensor(tensors: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the tensor of the main embedding or head: the shortest path wins over those of side towers."""
    candidates = [name for name in tensors if name.endswith(".weight") and last_segment(name) in names]
    return min(candidates, key=lambda name: (len(normalized(name)), name), default=None)


def last_segment(path: str) -> str:
    """Return the last segment of a module's name, from its path or that of its weight."""
    return path.removesuffix(".weight").rpartition(".")[2]


def _touched(adapter: Adapter) -> list[str]:
    """Return the heads and embeddings whose change breaks the tie."""
    same = _shared_tensors(adapter)
    paths = [module for module, update in adapter.updates.items() if not update.replaced_rows]
    paths += [path.removesuffix(".weight") for path, lazy in adapter.replacements.items() if lazy not in same]
    return [path for path in paths if last_segment(path) in HEADS + EMBEDDINGS]


def _shared_tensors(adapter: Adapter) -> list[LazyTensor]:
    """Return the tensors that replace a head and an embedding alike."""
    heads = [lazy for path, lazy in adapter.replacements.items() if last_segment(path) in HEADS]
    return [lazy for path, lazy in adapter.replacements.items() if last_segment(path) in EMBEDDINGS and lazy in heads]


def _without_same_head(adapter: Adapter) -> Adapter:
    """Leave out the replacement of a head that is the same tensor as the embedding's, to which it is tied."""
    same, whole = _shared_tensors(adapter), adapter.replacements.items()
    kept = {path: lazy for path, lazy in whole if lazy not in same or last_segment(path) not in HEADS}
    return replace(adapter, replacements=kept) if same else adapter


def _rows_on_both(adapters: tuple[Adapter, ...], head: str | None) -> tuple[Adapter, ...]:
    """Give the rows of single tokens to a head that the output stores beside its embedding."""
    if head is None:
        return adapters
    module = head.removesuffix(".weight")

    def grown(adapter: Adapter) -> Adapter:
        updates = adapter.updates
        rows = [update for path, update in updates.items() if update.replaced_rows and last_segment(path) in EMBEDDINGS]
        if not rows or any(last_segment(path) in HEADS for path in updates):
            return adapter
        return replace(adapter, updates={**updates, module: rows[0]})

    return tuple(map(grown, adapters))


def _is_headless(config: Mapping[str, Any]) -> bool:
    """Tell whether the architecture has no output head over the vocabulary, so that nothing is tied."""
    names = architectures(config)
    return bool(names) and not any(re.search("LM|Generation|Causal|PreTraining", name) for name in names)


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the model classes that config.json names; [] where it names none."""
    names = config.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _head_name(adapters: tuple[Adapter, ...], embedding: str, config: Mapping[str, Any]) -> str:
    """Return what the model calls the head that it ties; raise `IncompatibleAdapter` where untying it is not known."""
    names = architectures(config)
    if last_segment(embedding) == "shared":
        raise IncompatibleAdapter(
            f"--tied untie: {embedding} is the embedding of encoder and decoder as well as the head; untying the head "
            "would take all of them apart, or change the scale of its outputs (T5)",
            hint="--tied both changes the shared weight.",
        )
    touched = (path for adapter in adapters for path in _touched(adapter) if last_segment(path) in HEADS)
    known = next((_OTHER_HEADS[name] for name in names if name in _OTHER_HEADS), None)
    usual = "lm_head" if not names or any(_HAS_LM_HEAD.search(name) for name in names) else None
    if (head := next(touched, known or usual)) is None:
        raise IncompatibleAdapter(
            f"--tied untie: what {', '.join(names)} calls its head is not known; under another name it is not loaded",
            hint="--tied both changes the shared weight.",
        )
    return f"{head}.weight"


def _onto_embedding(adapter: Adapter, embedding: str) -> Adapter:
    def place(path: str) -> str:
        return embedding if last_segment(path) in HEADS else path

    updates = {place(module): update for module, update in adapter.updates.items()}
    whole = {
        f"{place(path.removesuffix('.weight'))}.weight" if path.endswith(".weight") else path: lazy
        for path, lazy in adapter.replacements.items()
    }
    if len(updates) < len(adapter.updates) or len(whole) < len(adapter.replacements):
        raise IncompatibleAdapter(
            f"--tied both: one adapter changes the head and its embedding, which are one weight, {embedding}",
            hint="Use --tied untie.",
        )
    return replace(adapter, updates=updates, replacements=whole)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether config.json ties the output head to the input embedding."""
    return bool(_flag(config))


def has_tied_head(config: Mapping[str, Any], head: str | None) -> bool:
    """Tell whether a model with this stored head, or none, has one that is tied to its embedding.

    Where config.json is silent and no head is stored, a model class with a head must tie it.
    """
    return is_tied(config) or (
        head is None and _flag(config) is None and bool(architectures(config)) and not _is_headless(config)
    )


def _flag(config: Mapping[str, Any]) -> Any:
    """Return what config.json says of the tie, None if nothing."""
    inner = config.get("text_config")
    tied = config.get("tie_word_embeddings")
    return inner.get("tie_word_embeddings") if tied is None and isinstance(inner, Mapping) else tied


def _set_tie(config: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {"tie_word_embeddings": False}
    inner = config.get("text_config")
    if isinstance(inner, Mapping):  # transformers 4 reads the inner one, transformers 5 the outer one
        changed["text_config"] = {**inner, "tie_word_embeddings": False}
    return changed
