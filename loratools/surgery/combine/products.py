"""Sums of products, Σ wᵢ·sᵢ·Bᵢ·Aᵢ, of many modules at once: those of one shape and rank are one stack, in NumPy.

A stack is read, decomposed, and, where ranks are chosen module by module, rounded and let go, so that memory holds a
few stacks and what is stored. A budget, and one rank for all, are known when everything is decomposed: until then only
r × r cores are kept, and the factors are read again. A module has the same numbers alone as in any stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from loratools.adapter import low_rank
from loratools.adapter.kinds import Update
from loratools.adapter.naming.compact import natural
from loratools.linalg import stacks
from loratools.linalg.stacks import Array, Decomposition
from loratools.parallel import Progress, cores, each, one_blas_thread
from loratools.parallel.shared import shared
from loratools.storage.codecs import floats
from loratools.storage.lazy import LazyTensor
from loratools.surgery.combine import travel
from loratools.surgery.combine.change import Change, Kept, Known, Settled, choose, refused
from loratools.surgery.combine.inputs import Aligned, Input
from loratools.surgery.combine.options import CombineOptions

Factors = tuple[Array, Array]
"""B (n, out, r) and A (n, r, in) of a stack, with weights and scalings in them."""


@dataclass(frozen=True, slots=True, eq=False)
class _Module:
    """One module: weight and number of each adapter that changes it, and its products, one for each expert."""

    path: str
    weights: tuple[float, ...]
    adapters: tuple[int, ...]
    products: tuple[Sequence[Update], ...]
    is_stack: bool
    nbytes: int

    @property
    def sides(self) -> tuple[int, int]:
        """Sides of one product as a matrix."""
        out, *inner = self.products[0][0].shape
        return out, math.prod(inner)

    @property
    def alike(self) -> tuple[object, ...]:
        """What the modules of one stack have in common."""
        return self.is_stack, len(self.products[0]), self.sides, tuple(parts[0].rank for parts in self.products)

    @property
    def numbers(self) -> int:
        """How many numbers its factors have."""
        return sum(len(parts) * parts[0].rank for parts in self.products) * sum(self.sides)


_Batch = Sequence[_Module]

_Looked = tuple[Decomposition, Mapping[str, Change]]

Result = TypeVar("Result")


def settle(
    inputs: Sequence[Input], aligned: Aligned, options: CombineOptions, progress: Progress
) -> dict[str, Settled | None]:
    """Return module -> its change, decomposed, and what is stored of it; None where that is zero.

    No number depends on the threads. Others may share the work, stack by stack: all of it where each module's rank is
    its own matter, else the decompositions. Raises `IncompatibleAdapter` with every module that fails, and `ValueError`
    for a budget that is too small.
    """
    modules = _modules(inputs, aligned)
    weighed = [module for module in modules if module.weights]
    batches = list(stacks.batches(weighed, lambda module: module.alike, lambda module: module.numbers, stacks.NUMBERS))
    settled: dict[str, Settled | None] = dict.fromkeys(module.path for module in modules)
    own = options.rule is None or (options.rule.budget is None and not options.rule.uniform)
    problems: dict[str, str] = {}
    into, threads = travel.spool(), options.threads or min(8, cores())

    def decomposed(batch: _Batch) -> tuple[Factors, Decomposition, dict[str, Change]]:
        factors = _loaded(batch)
        found = stacks.decompose(*factors)
        changes = _changes(batch, found, problems)
        progress(sum(module.nbytes for module in batch))
        return factors, found, changes

    def stored(batch: _Batch, factors: Factors, found: Decomposition, changes: Mapping[str, Change],
               ranks: Mapping[str, int]) -> dict[str, Settled]:  # fmt: skip
        kept = _kept(batch, factors, found, ranks, options.stored)
        problems.update({path: fault for path, each in kept.items() if (fault := each.fault(options.stored))})
        return {
            path: travel.settled(Settled(changes[path], ranks[path], each), into)
            for path, each in kept.items()
            if path not in problems
        }

    def at_once(name: str, batch: _Batch) -> dict[str, Settled]:
        factors, found, changes = decomposed(batch)
        ranks = choose(list(changes.values()), options.rule)
        return stored(batch, factors, found, changes, dict(zip(changes, ranks, strict=True)))

    def first(name: str, batch: _Batch) -> _Looked | travel.Looked:
        found, changes = decomposed(batch)[1:]
        return travel.looked(found, changes, into) if into else (found, changes)

    def several(work: Callable[[str, _Batch], Result], some: Mapping[str, _Batch]) -> dict[str, Result]:
        with one_blas_thread():
            done = each(work, some, threads)
        if problems:
            raise refused(problems)
        return done

    numbered = {batch[0].path: batch for batch in batches}
    if own:  # each module has the rank that its own numbers ask for
        done = shared(partial(several, at_once), numbered, _nbytes)
    else:
        seen = shared(partial(several, first), numbered, _nbytes)
        looked = {name: of.read() if isinstance(of, travel.Looked) else of for name, of in seen.items()}
        changes = {path: change for _, of_batch in looked.values() for path, change in of_batch.items()}
        changes = dict(sorted(changes.items()))
        ranks = dict(zip(changes, choose(list(changes.values()), options.rule), strict=True))

        def second(name: str, batch: _Batch) -> dict[str, Settled]:
            return stored(batch, _loaded(batch), looked[name][0], changes, ranks)

        done = several(second, numbered)
    return settled | {path: one for of_batch in done.values() for path, one in of_batch.items()}


def _nbytes(batch: _Batch) -> int:
    """Return the bytes of the factors of a stack."""
    return sum(module.nbytes for module in batch)


def _modules(inputs: Sequence[Input], aligned: Aligned) -> list[_Module]:
    """Return the modules in natural order; an adapter whose weight is 0 there is left out."""
    modules = []
    for path in sorted(aligned.modules, key=natural):
        members = aligned.modules[path]
        weights = [inputs[member.adapter].weight.of(path) for member in members]
        counted = [(weight, member) for weight, member in zip(weights, members, strict=True) if weight != 0]
        modules.append(_Module(
            path, tuple(weight for weight, _ in counted), tuple(member.adapter for _, member in counted),
            tuple(member.update.members or [member.update] for _, member in counted), bool(members[0].update.members),
            sum(lazy.nbytes for member in members for lazy in member.update.parts.values()),
        ))  # fmt: skip
    return modules


def _loaded(batch: _Batch) -> Factors:
    """Read the factors of a stack; those of a stack of experts lie one after the other."""
    terms = []
    for number in range(len(batch[0].weights)):
        weights = [module.weights[number] for module in batch for _ in module.products[number]]
        left, right, scales = low_rank.stacked([part for module in batch for part in module.products[number]])
        terms.append((np.multiply(weights, scales), left, right))
    return stacks.side_by_side(terms)


def _changes(batch: _Batch, found: Decomposition, problems: dict[str, str]) -> dict[str, Change]:
    """Return module -> its change, unless that is zero; a module whose numbers are not finite becomes a problem."""
    count, sides = len(batch[0].products[0]), batch[0].sides
    sigma, true = found.sigma.tolist(), found.ranks.tolist()
    size = np.zeros(len(sigma))
    start = 0
    for parts in batch[0].products:
        size += found.term_norms(start, start + parts[0].rank)
        start += parts[0].rank
    changes, finite = {}, found.finite.reshape(len(batch), count).tolist()
    for place, module in enumerate(batch):
        own = range(place * count, (place + 1) * count)
        if not all(finite[place]):
            problems[module.path] = _not_finite(module)
            continue
        known = [
            Known(tuple(sigma[i][: true[i]]), math.fsum(value * value for value in sigma[i]), 0.0, sides)
            for i in own
            if true[i]
        ]
        if known and module.is_stack:
            changes[module.path] = Change.of_stack(known, count, math.hypot(*size[own.start : own.stop].tolist()))
        elif known:
            changes[module.path] = Change(*known[0], size=float(size[place]))
    return changes


def _kept(
    batch: _Batch, factors: Factors, found: Decomposition, ranks: Mapping[str, int], dtype: str
) -> dict[str, Kept]:  # fmt: skip
    """Return module -> its factors of the chosen rank, rounded to `dtype`, and what that costs."""
    count = len(batch[0].products[0])
    by_rank: dict[int, list[int]] = {}
    for place, module in enumerate(batch):
        if module.path in ranks:
            by_rank.setdefault(ranks[module.path], []).append(place)
    kept = {}
    for rank, places in by_rank.items():
        items = [place * count + expert for place in places for expert in range(count)]
        sigma = found.sigma[items, :rank]
        with np.errstate(invalid="ignore", over="ignore"):  # what overflows is a fault of what is kept
            exact = found.balanced(*factors, rank, items)
            bits = [floats.narrow(factor, dtype) for factor in exact]
            B, A = (floats.numbers(factor, dtype) for factor in bits)
            of_items = stacks.rounding2(sigma, exact, (B, A)), (sigma * sigma).sum(-1)
        costs = zip(*(each.reshape(-1, count).sum(-1).tolist() for each in of_items), strict=True)
        for number, (place, (rounding, energy)) in enumerate(zip(places, costs, strict=True)):
            whole = slice(number * count, (number + 1) * count) if batch[place].is_stack else number
            left, right = (
                LazyTensor.holding(dtype, factor[whole].shape, floats.bytes_of(factor[whole])) for factor in bits
            )
            kept[batch[place].path] = Kept(left, right, rounding, energy)
    return kept


def _not_finite(module: _Module) -> str:
    for adapter, parts in zip(module.adapters, module.products, strict=True):
        for left, right, _ in map(low_rank.arrays, parts):
            for name, factor in (("B", left), ("A", right)):
                if not np.isfinite(factor).all():
                    return f"adapter {adapter + 1} has NaN or infinite elements in factor {name}"
    return stacks.NO_SQUARES
