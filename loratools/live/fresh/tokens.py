"""Rows of an embedding that are trained for single tokens, new ones above all: where they are, and how they start.

They start as the rows of the base, take their place, and act in every module that has the same weight: a tied output
head learns with its embedding, as with PEFT's `trainable_token_indices`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.kinds.tokens import ROWS_PART
from loratools.adapter.model import Adapter
from loratools.adapter.naming.compact import suffixes
from loratools.errors import IncompatibleAdapter, InvalidOption
from loratools.live.place import Layout, Place, place, walk
from loratools.storage.lazy import LazyTensor

Tokens = Sequence[int] | Mapping[str, Sequence[int]] | None
"""Token indices of the input embedding, or by the name of a module."""


def problems(tokens: Any) -> list[str]:
    """Return a line for each thing that cannot be in the option."""
    if tokens is None:
        return []
    each = tokens.items() if isinstance(tokens, Mapping) else [("", tokens)]
    lines = [] if not isinstance(tokens, Mapping) or tokens else ["tokens is an empty mapping"]
    for name, rows in each:
        of = f" for {name!r}" if name else ""
        whole = isinstance(rows, Sequence) and not isinstance(rows, str) and len(rows) > 0
        if not whole or not all(isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in rows):
            lines.append(f"tokens is {str(rows)[:80]!r}{of}; it is a list of token indices, each 0 or more")
        elif len(set(rows)) < len(rows):
            lines.append(f"tokens{of} has an index twice")
    return lines


def stated(tokens: Tokens) -> Any:
    """Return the option as JSON values."""
    return {name: list(rows) for name, rows in tokens.items()} if isinstance(tokens, Mapping) else list(tokens or ())


def places(model: nn.Module, tokens: Tokens, dtype: torch.dtype) -> dict[str, Place]:
    """Return by the path of a module which trainable rows it gets; {} where there are none.

    Raises `InvalidOption` for a name that no embedding has, `IncompatibleAdapter` for a token beyond its rows.
    """
    if not tokens:
        return {}
    layout = Layout.of(model)
    updates: dict[str, Update] = {}
    for path, rows in _by_path(model, tokens).items():
        W = model.get_submodule(path).weight
        if not isinstance(W, torch.Tensor) or not W.is_floating_point() or W.dim() != 2:
            raise IncompatibleAdapter(f"{path}: its weight has no rows of numbers that could be trained")
        if W.is_meta:
            raise IncompatibleAdapter(
                f"{path}: its weight is on the meta device and has no values, of which rows could be trained",
                hint="Load the weights into the model first.",
            )
        if beyond := [row for row in rows if row >= len(W)]:
            raise IncompatibleAdapter(
                f"{path}: token {beyond[0]} is beyond its {len(W)} rows",
                hint="`model.resize_token_embeddings` makes rows for new tokens, before you attach.",
            )
        values = LazyTensor.of(W.detach()[list(rows)].to("cpu", dtype))
        updates[path] = kinds.get("tokens").build({ROWS_PART: values}, 1.0, 1.0, {"rows": list(rows)})
    made = place(layout, Adapter(updates), trainable=True)
    for each in {id(whole): whole for own in made.values() for whole in own.whole.values()}.values():
        for name, parameter in each.named_parameters():
            setattr(each, name, nn.Parameter(parameter.detach().to(dtype)))
    return made


def _by_path(model: Any, tokens: Sequence[int] | Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Return the path of each embedding with the tokens whose rows of it are trained."""
    modules = dict(walk(model))
    modules.pop("")
    if not isinstance(tokens, Mapping):
        return {_input(model, modules): tokens}
    rows: dict[str, Sequence[int]] = {}
    unused = []
    for name, own in tokens.items():
        fits = [path for path, module in modules.items() if name in suffixes(path) and "weight" in module._parameters]
        if not fits:
            unused.append(name)
        rows |= dict.fromkeys(fits, own)
    if unused:
        raise InvalidOption("tokens has names that no module with a weight of this model has", unused)
    return rows


def _input(model: Any, modules: Mapping[str, nn.Module]) -> str:
    """Return the path of the model's input embedding."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # no model of transformers, or one that does not say
        embedding = None
    named = [path for path, module in modules.items() if module is embedding]
    if not named:
        named = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
        if len(named) != 1:
            raise InvalidOption(
                "tokens is a list, and this model does not say which module is its input embedding",
                hint='Name it: tokens={"embed": [...]}.',
            )
    return named[0]
