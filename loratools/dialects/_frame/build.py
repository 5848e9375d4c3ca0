"""From a file's tensors, sorted by module and part, to updates: the last step of reading, in every dialect."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.adapter.parts import A_EMBEDDING, B_EMBEDDING, A, B
from loratools.dialects._frame.numbers import tell_alpha
from loratools.errors import BadFile, UnsupportedAdapter, counted
from loratools.storage.lazy import LazyTensor

Groups = dict[str, dict[str, LazyTensor]]
"""module -> part, by PEFT's name of it -> tensor"""

EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "tok_embeddings", "word_embeddings", "embeddings", "embedding"})
"""What models call their embedding; its factors are shaped as a linear layer's, so only the name tells."""

_PARTNERS = (
    ("lora_down", "lora_up"), ("lora.down", "lora.up"), ("lora_A", "lora_B"), ("lora_a", "lora_b"),
    ("linear_in", "linear_out"),
)  # fmt: skip

Rule = Callable[[str, int], tuple[float, float]]
"""(module, rank) -> (scaling, alpha)"""


def is_embedding(module: str) -> bool:
    """Tell whether a module is an embedding, by the last segment of its name."""
    return module.rpartition(".")[2] in EMBEDDINGS


def check_gathered(
    path: Path, tensors: Mapping[str, LazyTensor], flattened: Callable[[str, LazyTensor], bool] | None = None
) -> None:
    """Raise `BadFile` for tensors that are empty, or that `flattened` recognises: a save of one rank's share."""
    ungathered = [
        f"{name}: shape {lazy.shape}"
        for name, lazy in tensors.items()
        if 0 in lazy.shape or (flattened and flattened(name, lazy))
    ]
    if ungathered:
        raise BadFile(
            f"{path}: {len(ungathered)} of {len(tensors)} tensors are empty{' or flattened' if flattened else ''}:"
            " saved under DeepSpeed ZeRO-3 or FSDP without gathering",
            ungathered[:12],
            hint="Save it again with the parameters gathered; what is missing is not in this file.",
        )


@dataclass(slots=True, eq=False, repr=False)
class Draft:
    """An adapter that is being read from `path`.

    `groups`   module -> part, by PEFT's name of it -> tensor
    `alphas`   module -> alpha, where the file has one for each
    `faults`   a line for each contradiction
    `unknown`  a line for each module that is sound, and of which the file does not say enough
    `alpha`    the user's, for every module; None: the file's
    `layout`   (module, kind) -> the keywords that a kind is built with besides its parts
    `names`    (module, part) -> what the tensor is called in the file
    """

    path: Path
    groups: Groups = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    alpha: float | None = None
    layout: Callable[[str, str], Mapping[str, Any]] = lambda *_: {}
    names: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, module: str, part: str, lazy: LazyTensor, name: str) -> None:
        """Put a tensor into its group; a second one in the same place is a fault."""
        home = self.groups.setdefault(module, {})
        if part in home:
            self.faults.append(f"{name}: a second tensor for {module}.{part}")
        home[part] = lazy
        self.names[module, part] = name

    def convert(self, change: Callable[[str, dict[str, LazyTensor]], Groups]) -> None:
        """Put what `change` makes of each module in its place; its `ValueError` is a fault, `LookupError` unknown."""
        groups, self.groups = self.groups, {}
        for module, parts in groups.items():
            try:
                self.groups |= change(module, parts)
            except LookupError as error:
                self.unknown.append(f"{module}: {error.args[0]}")
            except ValueError as error:
                self.faults.append(f"{module}: {error}")

    def check(self) -> None:
        """Raise `BadFile` with all faults; an alpha without factors is one too."""
        lonely = sorted(self.alphas.keys() - self.groups.keys())
        check_faults(self.path, self.faults + [f"{module}: an alpha without factors" for module in lonely])

    def build(self, rule: Rule | None = None) -> dict[str, Update]:
        """Return the update of each module; the kinds decide what its parts mean.


        By default s = alpha/r with the user's alpha or else the file's, and 1 where there is none. Raises `BadFile`
        with all that contradicts itself, or `UnsupportedAdapter` with all that is unknown or that no kind claims.
        """
        self.check()
        check_read(self.path, self.unknown)
        tell_alpha(self.path, self.alpha, self.alphas.values())
        updates, unsupported, faults = build_all(self.groups, rule or self.usual, layout=self.layout, names=self.names)
        check_faults(self.path, faults)
        check_read(self.path, unsupported)
        if not updates:
            raise BadFile(f"{self.path}: no LoRA tensors in it")
        return updates

    def usual(self, module: str, rank: int) -> tuple[float, float]:
        """Return s = alpha/r and alpha: the user's or else the file's, and 1 for s where there is none."""
        alpha = self.alphas.get(module, float(rank or 1)) if self.alpha is None else self.alpha
        return alpha / (rank or 1), alpha


def build_all(
    groups: Mapping[str, Mapping[str, LazyTensor]],
    rule: Rule,
    choose: Callable[[str, Mapping[str, LazyTensor]], str | None] = lambda _, parts: kinds.claim(parts),
    layout: Callable[[str, str], Mapping[str, Any]] = lambda *_: {},
    names: Mapping[tuple[str, str], str] | None = None,
) -> tuple[dict[str, Update], list[str], list[str]]:
    """Return the updates, a line for each set of parts that no kind claims, and a line for each contradiction.

    Of factors whose partner is missing, `names` are those in the file.
    `choose` returns the kind of a module with these parts, `layout` the keywords that a module of a kind needs besides.
    A `rule` that finds a contradiction raises `ValueError`.
    """
    updates: dict[str, Update] = {}
    unclaimed: dict[str, list[str]] = defaultdict(list)
    faults = []
    for module, parts in groups.items():
        if hollow := sorted(part for part, lazy in parts.items() if 0 in lazy.shape):
            faults.append(f"{module}: {hollow[0]} is empty, as DeepSpeed ZeRO-3 and FSDP save what they did not gather")
            continue
        kind = choose(module, parts)
        if kind is None and len(half := sorted(parts.keys() & {A, B})) == 1:
            faults.append(f"{module}: {_missing((names or {}).get((module, half[0]), half[0]))}")
            continue
        if kind is None:
            described = ", ".join(sorted(f"{part} ({len(lazy.shape)}-D)" for part, lazy in parts.items()))
            unclaimed[described].append(module)
            continue
        make = partial(kinds.get(kind).build, parts, **layout(module, kind))
        try:
            updates[module] = make(*rule(module, make(1.0, 1.0).rank))  # each kind knows where its rank stands
        except ValueError as error:
            faults.append(f"{module}: {error}")
    unsupported = [
        f"{some(modules)}: no kind of update that loratools knows consists of {parts}"
        for parts, modules in unclaimed.items()
    ]
    return updates, unsupported, faults


def _missing(name: str) -> str:
    """Say of a factor, by its name in the file, that its partner is missing, and what that would be called.

    >>> _missing("lora_unet_mid.lora_down.weight")
    'lora_up.weight is missing, the partner of lora_unet_mid.lora_down.weight'
    """
    for one, other in _PARTNERS:
        for found, missing in ((one, other), (other, one)):
            head, there, tail = name.rpartition(found)
            if there and "." not in tail.removesuffix(".weight"):
                return f"{missing}{tail} is missing, the partner of {head}{found}{tail}"
    return f"the partner of {name} is missing"


def both(parts: Mapping[str, LazyTensor], a: str, b: str) -> tuple[LazyTensor, LazyTensor]:
    """Return the factors under two names; raise `ValueError` where one is missing."""
    for name in (a, b):
        if name not in parts:
            raise ValueError(f"no {name}, while its partner is there")
    return parts[a], parts[b]


def factors_of(update: Update) -> tuple[LazyTensor, LazyTensor]:
    """Return the two factors of a linear layer or of an embedding."""
    a, b = (A_EMBEDDING, B_EMBEDDING) if A_EMBEDDING in update.parts else (A, B)
    return update.parts[a], update.parts[b]


def check_faults(path: Path, faults: Sequence[str]) -> None:
    """Raise `BadFile` with all faults of an adapter, if it has any."""
    if faults:
        raise BadFile(f"{path}: {counted(len(faults), 'problem')} in this adapter", faults)


def check_read(path: Path, unsupported: Sequence[str], hint: str | None = None) -> None:
    """Raise `UnsupportedAdapter` with all of an adapter that is sound and not read, if there is any."""
    if unsupported:
        raise UnsupportedAdapter(f"{path}: it holds what loratools does not read", unsupported, hint=hint)


def some(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
