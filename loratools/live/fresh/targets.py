"""Which modules of a model get adapters: by names, by a regular expression, or every linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import regex
from torch import nn

from loratools.adapter.naming.compact import suffixes
from loratools.errors import IncompatibleAdapter, InvalidOption
from loratools.live.modules import conv1d, linear, type_of
from loratools.live.place import Layout, bypassed, walk

ALL_LINEAR = "all-linear"
_SECONDS = 5.0  # for all matches of one pattern together


def choose(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return path -> module of the targets, in the model's order.

    `targets` are names, each a path or what follows one of its dots; or a regular expression for the whole path; or
    "all-linear": every linear layer but the output head. So PEFT reads `target_modules`.

    Raises `InvalidOption` for a pattern that is none or names nothing, `IncompatibleAdapter` for a module that no
    low-rank change fits; each lists all.
    """
    modules = dict(walk(model))
    modules.pop("")
    if targets == ALL_LINEAR:
        heads = _heads(model)
        chosen = {path: m for path, m in modules.items() if (linear.claims(m) or conv1d.claims(m)) and m not in heads}
        chosen = {path: module for path, module in chosen.items() if not _in_attention(modules, path)}
        if not chosen:
            raise InvalidOption("targets is 'all-linear', and this model has no linear layer besides its output head")
        return chosen
    fits, unused = _matcher(targets, list(modules))
    chosen = {path: module for path, module in modules.items() if fits(path)}
    if isinstance(targets, str):
        # A regular expression may well meet a block besides its layers.
        chosen = {path: module for path, module in chosen.items() if _changeable(module)} or chosen
    if unused or not chosen:
        raise InvalidOption("these targets name no module of this model", unused or [str(targets)])
    _check(model, chosen)
    return chosen


def _matcher(targets: str | Sequence[str], paths: list[str]) -> tuple[Callable[[str], bool], list[str]]:
    """Return what tells whether a path is meant, and a line for each name that no path fits."""
    if isinstance(targets, str):
        try:
            pattern = regex.compile(targets)
        except regex.error as error:
            raise InvalidOption(f"targets is {targets!r}, which is no regular expression: {error}") from None
        return lambda path: pattern.fullmatch(path, timeout=_SECONDS) is not None, []
    names = list(targets)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidOption(f"targets is {targets!r}; it is a list of names, a regular expression or 'all-linear'")
    every = {suffix for path in paths for suffix in suffixes(path)}
    wanted, last = frozenset(names), sorted({path.rpartition(".")[2] for path in paths})
    unused = [
        name + (f"; nearest: {', '.join(alike)}" if (alike := get_close_matches(name, last, cutoff=0.4)) else "")
        for name in names
        if name not in every
    ]
    return lambda path: not wanted.isdisjoint(suffixes(path)), unused


def _changeable(module: nn.Module) -> bool:
    try:
        return type_of(module) is not None
    except IncompatibleAdapter:
        return True


def _check(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    problems, layout = [], Layout.of(model)
    for path, module in chosen.items():
        try:
            if type_of(module) is None:
                problems.append(f"{path}: a {type(module).__name__} has no weight that A and B fit")
        except IncompatibleAdapter as error:
            problems.append(f"{path}: {error}")
        if why := bypassed(layout, path):
            problems.append(f"{path}: {why}")
    if problems:
        raise IncompatibleAdapter(f"{len(problems)} of {len(chosen)} targets cannot have an adapter", problems)


def _heads(model: Any) -> list[nn.Module]:
    """Return the output heads: what the model calls its output embeddings, and heads of classifiers beside the body."""
    heads = [head] if (head := _asked(model, "get_output_embeddings")) is not None else []
    if type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")):
        heads += [child for name, child in model.named_children() if name in ("score", "classifier", "qa_outputs")]
    return heads


def _asked(model: Any, method: str) -> Any:
    ask = getattr(model, method, None)
    return ask() if callable(ask) else None


def _in_attention(modules: dict[str, nn.Module], path: str) -> bool:
    parent = modules.get(path.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)
