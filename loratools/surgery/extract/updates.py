"""From the two factors of a difference to the update that a module of each kind takes, in PEFT's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from loratools.adapter.kinds import Update
from loratools.adapter.kinds.conv import ConvUpdate
from loratools.adapter.kinds.embedding import EmbeddingUpdate
from loratools.adapter.kinds.experts import ExpertsUpdate
from loratools.adapter.kinds.lora import LoraUpdate
from loratools.adapter.naming.stacked import nested
from loratools.storage.lazy import LazyTensor
from loratools.surgery.extract.pairs import Pair

Factors = tuple[LazyTensor, LazyTensor]


def build(pair: Pair, shape: tuple[int, ...], rank: int, factors: Factors) -> Update:
    """Return the update B·A with alpha = r, so that the scaling is 1 for every reader.

    `factors` are (B, A) of ΔW as a matrix (`factor.py`), `shape` is that of the stored weight.
    """
    return _BUILD[pair.kind](pair, shape, rank, *factors)


def module_names(pairs: Iterable[Pair]) -> dict[str, str]:
    """Return the adapter's module for each factored path.

    PEFT wraps a module of stacked experts once for each parameter, the inner ones under `base_layer`.
    """
    pairs = list(pairs)
    stacks: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.kind == "experts":
            module, _, parameter = pair.path.rpartition(".")
            stacks.setdefault(module, []).append(parameter)
    names = {pair.path: pair.path for pair in pairs}
    for module, parameters in stacks.items():
        names |= {f"{module}.{name}": wrapper for name, wrapper in nested(module, parameters).items()}
    return names


def _conv(pair: Pair, shape: tuple[int, ...], rank: int, B: LazyTensor, A: LazyTensor) -> Update:
    outer, inner = (*B.shape, *(1 for _ in shape[2:])), (rank, *shape[1:])
    return ConvUpdate(A.reshaped(inner), B.reshaped(outer), 1.0, float(rank))


def _experts(pair: Pair, shape: tuple[int, ...], rank: int, B: LazyTensor, A: LazyTensor) -> Update:
    # The expert comes first in A and last in B.
    count = shape[0]
    out, inner = B.shape[0] // count, A.shape[1] // count
    left = B.map(lambda B: B.view(count, out, rank).permute(1, 2, 0).reshape(out, -1), (out, rank * count))
    right = A.map(lambda A: A.view(rank, count, inner).transpose(0, 1).reshape(-1, inner), (count * rank, inner))
    return ExpertsUpdate(right, left, 1.0, float(rank), count, pair.path.rpartition(".")[2], pair.transposed)


_BUILD: Mapping[str, Callable[[Pair, tuple[int, ...], int, LazyTensor, LazyTensor], Update]] = {
    "linear": lambda pair, shape, rank, B, A: LoraUpdate(A, B, 1.0, float(rank)),
    "conv": _conv,
    "embedding": lambda pair, shape, rank, B, A: EmbeddingUpdate(A, B, 1.0, float(rank)),
    "experts": _experts,
}
