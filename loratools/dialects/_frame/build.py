"""From a file's tensors, sorted by module and part, to updates: the last step of reading, the same for every dialect.

PEFT has a loop of its own, since its config has rules of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage.lazy import LazyTensor

Groups = dict[str, dict[str, LazyTensor]]
"""module -> part, by PEFT's name of it -> tensor"""

EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "tok_embeddings", "word_embeddings", "embeddings", "embedding"})
"""What models call their embedding; its factors are shaped as a linear layer's, so only the name tells."""

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


def build(path: Path, groups: Mapping[str, Mapping[str, LazyTensor]], rule: Rule) -> dict[str, Update]:
    """Return the update of each module; the kinds decide what its parts mean.

    Raises `BadFile` with all that contradicts itself, or `UnsupportedAdapter` with all that no kind claims.
    """
    updates: dict[str, Update] = {}
    unclaimed: dict[str, list[str]] = defaultdict(list)
    faults = []
    for module, parts in groups.items():
        if hollow := sorted(part for part, lazy in parts.items() if 0 in lazy.shape):
            faults.append(f"{module}: {hollow[0]} is empty, as DeepSpeed ZeRO-3 and FSDP save what they did not gather")
            continue
        kind = kinds.claim(parts)
        if kind is None:
            unclaimed[described(parts)].append(module)
            continue
        make = kinds.get(kind).build
        try:
            rank = make(parts, 1.0, 1.0).rank  # each kind knows where its rank stands
            updates[module] = make(parts, *rule(module, rank))
        except ValueError as error:
            faults.append(f"{module}: {error}")
    check_faults(path, faults)
    check_read(
        path, [f"{some(modules)}: no kind of update consists of {parts}" for parts, modules in unclaimed.items()]
    )
    if not updates:
        raise BadFile(f"{path}: no LoRA tensors in it")
    return updates


def check_faults(path: Path, faults: Sequence[str]) -> None:
    """Raise `BadFile` with all faults of an adapter, if it has any."""
    if faults:
        raise BadFile(f"{path}: {len(faults)} problem(s) in this adapter", faults)


def check_read(path: Path, unsupported: Sequence[str], hint: str | None = None) -> None:
    """Raise `UnsupportedAdapter` with all of an adapter that is sound and not read, if there is any."""
    if unsupported:
        raise UnsupportedAdapter(f"{path}: it holds what loratools does not read", unsupported, hint=hint)


def lonely_alphas(alphas: Iterable[str], groups: Groups) -> list[str]:
    """List the modules that have an alpha and no factors."""
    return [f"{module}: an alpha without factors" for module in sorted(set(alphas) - groups.keys())]


def alpha_rule(alphas: Mapping[str, float]) -> Rule:
    """Return the rule of files with an alpha for each module: s = alpha/r, and 1 where there is no alpha."""

    def rule(module: str, rank: int) -> tuple[float, float]:
        alpha = alphas.get(module, float(rank or 1))
        return alpha / (rank or 1), alpha

    return rule


def add(groups: Groups, module: str, part: str, lazy: LazyTensor, name: str, faults: list[str]) -> None:
    """Put a tensor into its group; a second one in the same place is a fault."""
    home = groups.setdefault(module, {})
    if part in home:
        faults.append(f"{name}: a second tensor for {module}.{part}")
    home[part] = lazy


def described(parts: Mapping[str, LazyTensor]) -> str:
    """Return the parts of a module with their numbers of dimensions, for a message."""
    return ", ".join(sorted(f"{part} ({len(lazy.shape)}-D)" for part, lazy in parts.items()))


def some(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
