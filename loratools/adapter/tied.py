"""Tied embeddings: a checkpoint that stores one weight for the input embedding and the output head.

A change of one of the two then has no place of its own. What is to happen is the user's to say:

    error   refuse, and say what the choices are (the default)
    untie   store the head as a tensor of its own, change only what the adapter changed, set tie_word_embeddings false
    both    let the change act on both, as models that keep the tie do
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loratools.adapter.model import Adapter
from loratools.adapter.names import normalized
from loratools.errors import IncompatibleAdapter

POLICIES = ("error", "untie", "both")
HEADS = ("lm_head", "embed_out", "output_projection")
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings")


@dataclass(frozen=True, slots=True, eq=False)
class Untied:
    """What a policy came to: the adapters as they are to be placed, and what the output needs for it.

    `copies` maps new tensors of the output to the base tensors that they start as; `config` holds changed fields.
    """

    adapters: tuple[Adapter, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def apply_policy(
    adapters: tuple[Adapter, ...], tensors: Mapping[str, Any], config: Mapping[str, Any], policy: str
) -> Untied:
    """Decide where changes of a tied head or embedding go.

    Raises `IncompatibleAdapter` under `error` when an adapter touches either, `ValueError` for an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r} for tied embeddings; one of {', '.join(POLICIES)}")
    embedding = main_tensor(tensors, EMBEDDINGS)
    head = main_tensor(tensors, HEADS)
    flag = is_tied(config)
    if embedding is None or (head is not None and not flag):
        return Untied(adapters)
    touched = sorted({module for adapter in adapters for module in _touched(adapter)})
    if not touched:
        return Untied(adapters)
    if policy == "error":
        raise IncompatibleAdapter(
            f"this base ties its output head to {embedding}, and the adapter changes one of the two",
            [f"{module}: shares its weight" for module in touched],
            hint="--tied untie gives the head a weight of its own; --tied both changes the shared weight.",
        )
    if policy == "untie":
        name = head or _head_name(adapters, embedding)
        return Untied(adapters, {} if head else {name: embedding}, _set_tie(config))
    if head is not None:
        raise IncompatibleAdapter(
            f"--tied both: this base stores {head} beside {embedding}, so there is no one weight to change",
            hint="Use --tied untie.",
        )
    renamed = tuple(_onto_embedding(adapter, embedding.removesuffix(".weight")) for adapter in adapters)
    return Untied(renamed)


def main_tensor(tensors: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Return the tensor of the main embedding or head: the shortest path wins over those of side towers."""
    found = [name for name in tensors if name.removesuffix(".weight").rpartition(".")[2] in names]
    found = [name for name in found if name.endswith(".weight")]
    return min(found, key=lambda name: (len(normalized(name)), name)) if found else None


def _touched(adapter: Adapter) -> list[str]:
    paths = [*adapter.updates, *(path.removesuffix(".weight") for path in adapter.replacements)]
    return [path for path in paths if path.rpartition(".")[2] in HEADS + EMBEDDINGS]


def _head_name(adapters: tuple[Adapter, ...], embedding: str) -> str:
    heads = [path for adapter in adapters for path in _touched(adapter) if path.rpartition(".")[2] in HEADS]
    return f"{heads[0] if heads else 'lm_head'}.weight"


def _onto_embedding(adapter: Adapter, embedding: str) -> Adapter:
    def place(path: str) -> str:
        return embedding if path.rpartition(".")[2] in HEADS else path

    updates = {place(module): update for module, update in adapter.updates.items()}
    if len(updates) < len(adapter.updates):
        raise IncompatibleAdapter(
            f"--tied both: one adapter changes the head and its embedding, which are one weight, {embedding}",
            hint="Use --tied untie.",
        )
    return replace(adapter, updates=updates)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Tell whether config.json ties the output head to the input embedding."""
    inner = config.get("text_config")
    found = config.get("tie_word_embeddings")
    if found is None and isinstance(inner, Mapping):
        found = inner.get("tie_word_embeddings")
    return bool(found)


def _set_tie(config: Mapping[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {"tie_word_embeddings": False}
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and "tie_word_embeddings" in inner:
        changed["text_config"] = {**inner, "tie_word_embeddings": False}
    return changed
