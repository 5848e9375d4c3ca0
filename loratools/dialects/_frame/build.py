"""From a file's tensors, sorted by module and part, to updates: the last step of reading, the same for every dialect.

PEFT has its own, since its config has rules of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from loratools.adapter import kinds
from loratools.adapter.kinds import Update
from loratools.errors import BadFile, UnsupportedAdapter
from loratools.storage import files
from loratools.storage.lazy import LazyTensor

Groups = dict[str, dict[str, LazyTensor]]
"""module -> part, by PEFT's name of it -> tensor"""

# An embedding's factors have the shapes of a linear layer's; where a dialect calls them alike, the module's name tells.
EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "tok_embeddings", "word_embeddings", "embeddings", "embedding"})
"""What models call their embedding."""

Rule = Callable[[str, int], tuple[float, float]]
"""(module, rank) -> (scaling, alpha)"""


def check_gathered(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Raise `BadFile` if tensors are empty: before their shapes are looked at for more."""
    found = [f"{name}: shape {lazy.shape}" for name, lazy in tensors.items() if 0 in lazy.shape]
    if found:
        raise BadFile(
            f"{path}: {len(found)} of {len(tensors)} tensors are empty: saved under DeepSpeed ZeRO-3 or FSDP without"
            " gathering",
            found[:12],
            hint="Save it again with the parameters gathered; what is missing is not in this file.",
        )


def build(path: Path, groups: Mapping[str, Mapping[str, LazyTensor]], rule: Rule) -> dict[str, Update]:
    """Return the update of each module; the kinds decide what its parts mean.

    Raises `BadFile` with all that contradicts itself, or `UnsupportedAdapter` with all that no kind claims.
    """
    built: dict[str, Update] = {}
    unclaimed: dict[str, list[str]] = defaultdict(list)
    faults = []
    for module, parts in groups.items():
        if hollow := sorted(part for part, lazy in parts.items() if 0 in lazy.shape):
            faults.append(f"{module}: {hollow[0]} is empty, as DeepSpeed ZeRO-3 and FSDP save what they did not gather")
            continue
        kind = kinds.claim(parts)
        if kind is None:
            unclaimed[", ".join(sorted(f"{part} ({len(lazy.shape)}-D)" for part, lazy in parts.items()))].append(module)
            continue
        make = kinds.get(kind).build
        try:
            rank = make(parts, 1.0, 1.0).rank  # each kind knows where its rank stands
            built[module] = make(parts, *rule(module, rank))
        except ValueError as error:
            faults.append(f"{module}: {error}")
    if faults:
        raise BadFile(f"{path}: {len(faults)} problem(s) in this adapter", faults)
    if unclaimed:
        raise UnsupportedAdapter(
            f"{path}: it holds what loratools does not read",
            [f"{some(found)}: no kind of update consists of {parts}" for parts, found in unclaimed.items()],
        )
    if not built:
        raise BadFile(f"{path}: no LoRA tensors in it")
    return built


def add(groups: Groups, module: str, part: str, lazy: LazyTensor, name: str, faults: list[str]) -> None:
    """Put a tensor into its group; a second one in the same place is a fault."""
    home = groups.setdefault(module, {})
    if part in home:
        faults.append(f"{name}: a second tensor for {module}.{part}")
    home[part] = lazy


def number(lazy: LazyTensor, name: str) -> float:
    """Return the one number that a stored tensor holds, without torch; raise `BadFile` where it is none."""
    import struct

    spec = lazy.spec
    if spec is None or lazy.parameters != 1 or lazy.dtype not in ("BF16", "F16", "F32", "F64", "I64", "I32"):
        raise BadFile(f"{name}: expected one number, found {lazy.dtype} of shape {lazy.shape}")
    raw = bytes(files.read_bytes(spec))
    if lazy.dtype == "BF16":
        raw, code = b"\0\0" + raw, "<f"
    else:
        code = {"F16": "<e", "F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i"}[lazy.dtype]
    value = float(struct.unpack(code, raw)[0])
    if not -1e300 < value < 1e300:
        raise BadFile(f"{name}: {value} is no alpha")
    return value


def some(names: list[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
