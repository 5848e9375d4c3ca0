"""Which modules of a model get adapters: by names, by a regular expression, or every linear layer.

A name that no module of the model has can be that of a slice: `q_proj` and `v_proj` of GPT-2 are rows of its `c_attn`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import regex
from torch import nn

from loratools.adapter.naming.compact import suffixes
from loratools.adapter.placement.slices import Slice, slices
from loratools.errors import IncompatibleAdapter, InvalidOption
from loratools.live.below.meta import refuse_uninitialized, uninitialized
from loratools.live.modules import conv1d, linear, type_of
from loratools.live.place import Layout, bypassed, output_head, walk

ALL_LINEAR = "all-linear"
_SECONDS = 5.0  # for all matches of one pattern together


@dataclass(frozen=True, slots=True)
class Target:
    """A module that gets factors, at `path`; of a fused weight perhaps one projection alone, `part`."""

    path: str
    module: nn.Module
    part: Slice | None = None

    @property
    def name(self) -> str:
        """What the adapter calls it."""
        return self.part.path if self.part else self.path


def choose(model: nn.Module, targets: str | Sequence[str]) -> list[Target]:
    """Return the targets, in the model's order.

    `targets` are names, each a path or what follows one of its dots; or a regular expression for the whole path; or
    "all-linear": every linear layer but the output head. So PEFT reads `target_modules`. Beyond PEFT a name can be that
    of a projection which the model has only as a slice of a fused weight; so can one that stands in a regular
    expression, or that an expression means which fits no module.

    Raises `InvalidOption` for a pattern that is none or names nothing, `IncompatibleAdapter` for a module that no
    low-rank change fits; each lists all.
    """
    if not model._modules and _changeable(model):
        raise InvalidOption(
            f"the model is itself a {type(model).__name__}, and a target is a module inside a model, by its name there",
            hint="Put it into a module, as torch.nn.Sequential(layer), whose target is then '0'.",
        )
    modules = dict(walk(model))
    modules.pop("")
    if targets == ALL_LINEAR:
        heads = _heads(model)
        chosen = {path: m for path, m in modules.items() if (linear.claims(m) or conv1d.claims(m)) and m not in heads}
        chosen = {path: module for path, module in chosen.items() if not _in_attention(modules, path)}
        if not chosen:
            raise InvalidOption("targets is 'all-linear', and this model has no linear layer besides its output head")
        refuse_uninitialized([path for path, module in chosen.items() if uninitialized(module)])
        return [Target(path, module) for path, module in chosen.items()]
    fits = _matcher(targets)
    chosen = {path: module for path, module in modules.items() if fits(path)}
    if isinstance(targets, str):
        # A regular expression may well meet a block besides its layers.
        chosen = {path: module for path, module in chosen.items() if _changeable(module)} or chosen
    layout = Layout.of(model)
    every = list(slices(layout.shapes, layout.config))
    parts = _parts(targets, fits, list(modules), bool(chosen), every)
    unused = _unused(targets, [*modules, *(part.path for part in every)])
    if unused or not (chosen or parts):
        hint = f"A string is a regular expression for whole paths; names come in a list: targets=[{targets!r}]."
        raise InvalidOption(
            "these targets name no module of this model", unused or [str(targets)],
            hint=hint if isinstance(targets, str) else None,
        )  # fmt: skip
    _refuse(parts, chosen)
    _check(chosen | {part.fused: modules[part.fused] for part in parts}, layout)
    inside = {path: [part for part in parts if part.fused == path] for path in modules}
    return [
        target
        for path, module in modules.items()
        for target in ([Target(path, module)] if path in chosen else [Target(path, module, p) for p in inside[path]])
    ]


def _parts(
    targets: str | Sequence[str], fits: Callable[[str], bool], paths: Sequence[str], any_module: bool,
    every: Sequence[Slice],
) -> list[Slice]:  # fmt: skip
    """Return the slices that are meant: of those that no module has the name of, each part once."""
    if isinstance(targets, str):
        taken = {path.rpartition(".")[2] for path in paths}

        def meant(part: Slice) -> bool:
            last = part.path.rpartition(".")[2]
            written = not any_module or regex.search(rf"\b{regex.escape(last)}\b", targets) is not None
            return last not in taken and written and fits(part.path)
    else:
        free = set(targets) - {suffix for path in paths for suffix in suffixes(path)}

        def meant(part: Slice) -> bool:
            return not free.isdisjoint(suffixes(part.path))

    parts: dict[tuple[str, int], Slice] = {}
    for part in every:
        if meant(part):
            parts.setdefault((part.fused, part.number), part)
    return list(parts.values())


def _refuse(parts: Sequence[Slice], chosen: Mapping[str, nn.Module]) -> None:
    """Raise for slices whose place is not known, and for those of a module that is chosen as a whole."""
    if unknown := [f"{part.path}: in {part.fused}" for part in parts if part.shape is None]:
        raise IncompatibleAdapter(
            "the config of this model does not tell where these lie in its fused weights", unknown,
            hint="Name the fused module as a whole.",
        )  # fmt: skip
    if twice := [f"{part.path}: in {part.fused}" for part in parts if part.fused in chosen]:
        raise InvalidOption("these targets are parts of modules that are targets as a whole", twice)


def _matcher(targets: str | Sequence[str]) -> Callable[[str], bool]:
    """Return what tells whether a path is meant."""
    if isinstance(targets, str):
        try:
            pattern = regex.compile(targets)
        except regex.error as error:
            raise InvalidOption(f"targets is {targets!r}, which is no regular expression: {error}") from None
        return lambda path: pattern.fullmatch(path, timeout=_SECONDS) is not None
    names = list(targets)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise InvalidOption(f"targets is {targets!r}; it is a list of names, a regular expression or 'all-linear'")
    wanted = frozenset(names)
    return lambda path: not wanted.isdisjoint(suffixes(path))


def _unused(targets: str | Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return a line for each name that no path fits."""
    if isinstance(targets, str):
        return []
    every = {suffix for path in paths for suffix in suffixes(path)}
    last = sorted({path.rpartition(".")[2] for path in paths})
    return [
        name + (f"; nearest: {', '.join(alike)}" if (alike := get_close_matches(name, last, cutoff=0.4)) else "")
        for name in targets
        if name not in every
    ]


def _changeable(module: nn.Module) -> bool:
    try:
        return type_of(module) is not None
    except IncompatibleAdapter:
        return True


def _check(chosen: Mapping[str, nn.Module], layout: Layout) -> None:
    problems = []
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
    heads = [head] if (head := output_head(model)) is not None else []
    if type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")):
        heads += [child for name, child in model.named_children() if name in ("score", "classifier", "qa_outputs")]
    return heads


def _in_attention(modules: dict[str, nn.Module], path: str) -> bool:
    parent = modules.get(path.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention)
