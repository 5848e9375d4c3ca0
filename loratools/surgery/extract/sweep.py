"""One pass over a base and a fine-tune, several tensors at a time: what differs, factors, ranks, digests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

from loratools.adapter.model import BaseIdentity
from loratools.decisions import warned
from loratools.errors import BadFile, LoraToolsError, counted
from loratools.linalg.ranks.rules import Fixed
from loratools.parallel import Progress, each, no_progress, one_blas_thread
from loratools.parallel.shared import shared
from loratools.storage import digest, files
from loratools.storage.checkpoint import Checkpoint, values
from loratools.storage.checkpoint.logical import encodings
from loratools.storage.dtypes import holders
from loratools.storage.header import TensorSpec
from loratools.surgery.extract.assemble import Outcome
from loratools.surgery.extract.factor import Factored, factor, factor_stack, is_sparse, row_factors
from loratools.surgery.extract.layers import layer as certify
from loratools.surgery.extract.options import ExtractOptions
from loratools.surgery.extract.pairs import Pair, Pairing
from loratools.surgery.extract.read import prefetch, read_delta, read_norm2
from loratools.surgery.extract.spool import Spool, Spooled
from loratools.surgery.hash import hash_tensors

WORKERS = 4
"""Tensors at once, whatever their size; more where the changes of all of them take no more than `MEMORY`."""

MOST_WORKERS = 16
MEMORY = 1 << 31


_Several = Callable[..., dict[str, "_Result"]]
"""`each`, with the threads of this run."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """One run over all pairs. The tensors `coded` belong to a quantization, whose name they
    have there, and may not differ."""

    base: Checkpoint
    tuned: Checkpoint
    pairing: Pairing
    options: ExtractOptions
    spool: Spool
    progress: Progress
    coded: Mapping[str, str] = field(default_factory=dict)

    def run(self, threads: int) -> tuple[list[Outcome], tuple[BaseIdentity, str]]:
        """Work on all pairs, several at a time, then on those whose ranks need a second look."""
        workers = min(threads, self._workers())
        # On one thread of torch each, where it is there: its sums are in another order on another number.
        several = partial(each, threads=workers, torch_threads=1 if "torch" in sys.modules else None, refuse=_refuse)
        with one_blas_thread():
            results = self._first(several, workers)
            return self._decided(several, results), self._hashes(results, threads)

    def _workers(self) -> int:
        """Return how many tensors there may be at once: of each its change is held in float32, and in bfloat16."""
        factored = [(pair, self.tuned.specs[pair.name]) for pair in self.pairing.pairs if pair.plan == "factor"]
        numbers = [spec.parameters // (spec.shape[0] if pair.kind == "experts" else 1) for pair, spec in factored]
        largest = 6 * max(numbers, default=1)
        return min(MOST_WORKERS, max(WORKERS, MEMORY // max(1, largest)))

    def _first(self, several: _Several, ahead: int) -> list[_Result]:
        pairs = sorted(self.pairing.pairs, key=lambda pair: (-self.tuned.specs[pair.name].nbytes, pair.path))
        shapes = [self._matrix(pair) for pair in pairs if pair.plan == "factor"]

        def some(wanted: Mapping[str, Pair]) -> dict[str, _Result]:
            order = list(wanted.values())

            def work(_: str, index: int) -> _Result:
                if index + ahead < len(order):
                    prefetch(self._specs(order[index + ahead]))
                return self._compared(order[index], shapes)

            return several(work, {path: i for i, path in enumerate(wanted)})

        compared = shared(some, {pair.path: pair for pair in pairs}, lambda pair: self.tuned.specs[pair.name].nbytes)
        return list(compared.values())

    def _decided(self, several: _Several, results: list[_Result]) -> list[Outcome]:
        """Decide all ranks; look again at layers that deserve more than was seen of them."""
        layers = [result for result in results if result.factored]
        shapes = [self._matrix(layer.pair) for layer in layers]
        while True:
            factored = [layer.factored for layer in layers if layer.factored]
            sigmas, complete = [each.sigma for each in factored], [each.complete for each in factored]
            decision = self.options.rank_choice.decide(sigmas, shapes, complete)
            if not decision.more:
                break
            again = {layers[i].pair.path: (layers[i], Fixed(decision.more[i])) for i in sorted(decision.more)}
            deeper = several(self._again, again)
            layers = [deeper.get(layer.pair.path, layer) for layer in layers]
        kept = {result.pair.path: (result, rank) for result, rank in zip(layers, decision.ranks, strict=True)}
        rounded = {
            path: layer.factored.rounding2(rank, self.options.stored)
            for path, (layer, rank) in kept.items()
            if layer.factored and rank
        }
        self._check_small(kept, rounded)
        return [
            self._outcome(*kept.get(result.pair.path, (result, 0)), rounded.get(result.pair.path, 0.0))
            for result in results
        ]

    def _check_small(self, kept: Mapping[str, tuple[_Result, int]], rounded: Mapping[str, float]) -> None:
        """Refuse factors that storing made zero; warn of those that lost far more than rounding costs."""
        lost = {}
        for path, rounding in rounded.items():
            layer, rank = kept[path]
            assert layer.factored is not None
            lost[path] = rounding / max(layer.norm2 - layer.factored.error2(rank), rounding)
        if gone := [path for path, share in lost.items() if share > 0.999]:
            raise BadFile(
                f"the factors of {counted(len(gone), 'module')} are too "
                f"small for {self.options.stored}: they would become zero",
                gone,
                hint=f"{holders(self.options.stored)} (--dtype).",
            )
        if worse := sorted((path for path, share in lost.items() if share > _USUAL_ROUNDING), key=lambda p: -lost[p]):
            warned(
                "factors of %s have numbers too small for %s, most of them in %s: %.2g of its energy is lost",
                counted(len(worse), "module"), self.options.stored, worse[0], lost[worse[0]],
            )  # fmt: skip

    def _compared(self, pair: Pair, shapes: Sequence[tuple[int, int]]) -> _Result:
        spec, source = self._specs(pair)
        if pair.name in self.coded:
            if not files.same_bytes(source, spec):
                scheme = self.coded[pair.name]
                raise LoraToolsError(
                    f"stored as {spec.dtype}: part of a quantized weight ({scheme}), which cannot be subtracted"
                )
            digests = hash_tensors({"": spec}, threads=1)[""]
            return _Result(pair, 0.0, 0.0, (digests, digests))
        if pair.base is None or source.shape != spec.shape:
            norm2, new = read_norm2(spec, self.progress)
            old = read_norm2(source, self.progress)[1] if pair.base else ""
            return _Result(pair, 0.0 if pair.plan == "ignore" else norm2, 0.0, (old, new))
        stacked = pair.kind == "experts"
        if pair.plan == "factor" and stacked and not (source.encoding or spec.encoding):
            hashers = [values.start(each) for each in (source, spec)]
            made = factor_stack(
                pair, source, spec, shapes, self.options, self.spool, hashers=hashers, progress=self.progress
            )
            old, new = map(digest.finish, hashers)
            return _Result(pair, made[1], made[2], (old, new), made[0], noise2=made[3])
        keep = pair.plan == "factor" and not stacked
        delta = read_delta(source, spec, self.progress, keep=keep, rounded=self.options.rounds)
        if pair.plan == "factor" and stacked and delta.norm2:
            factored, norm2, base_norm2, noise2 = factor_stack(pair, source, spec, shapes, self.options, self.spool)
            return _Result(pair, norm2, base_norm2, delta.digests, factored, noise2=noise2)
        if pair.plan == "factor" and delta.norm2:
            assert delta.D is not None
            factored = factor(pair, delta, spec, shapes, self.options, self.spool)
            return _Result(pair, delta.norm2, delta.base_norm2, delta.digests, factored, noise2=delta.noise2)
        if pair.plan == "whole" and is_sparse(pair, delta, spec.shape):
            few = replace(pair, path=pair.path.removesuffix(".weight"), plan="factor")
            spooled = self.spool.add(*row_factors(source, spec, delta.rows))
            return _Result(few, delta.norm2, delta.base_norm2, delta.digests, rows=len(delta.rows), exact=spooled)
        if delta.norm2 and spec.dtype not in _NUMBERS and len(spec.shape) > 1:
            raise LoraToolsError(f"stored as {spec.dtype}: a quantized weight, whose codes cannot be subtracted")
        return _Result(pair, delta.norm2, delta.base_norm2, delta.digests, rows=len(delta.rows))

    def _again(self, _: str, job: tuple[_Result, Fixed]) -> _Result:
        result, rule = job
        spec, source = self._specs(result.pair)
        if result.pair.kind == "experts":
            factored = factor_stack(result.pair, source, spec, (), self.options, self.spool, rule)[0]
        else:
            delta = read_delta(source, spec, no_progress, keep=True, rounded=self.options.rounds, hashed=False)
            factored = factor(result.pair, delta, spec, (), self.options, self.spool, rule)
        return replace(result, factored=factored)

    def _outcome(self, result: _Result, rank: int, rounding: float) -> Outcome:
        pair, spec = result.pair, self.tuned.specs[result.pair.name]
        known = (spec.shape, spec.dtype, result.norm2)
        if result.factored and rank:
            factored, shape = result.factored, self._shape(pair)
            error2, rounding = factored.error2(rank), rounding + self._difference2(result)
            layer = certify(
                pair.path, pair.kind, shape, rank, rank * sum(self._matrix(pair)),
                base_norm2=result.base_norm2, norm2=result.norm2,
                error2=error2 + rounding, excess2=factored.excess2 + rounding, bound2=factored.bound2 + rounding,
                noise2=result.noise2, sigma1=factored.sigma[0],
            )  # fmt: skip
            return Outcome(
                pair, "factored", *known, rank=rank, layer=layer, factors=factored.factors, rounded=factored.rounded
            )
        if result.exact:
            return Outcome(pair, "rows", *known, rows=result.rows, rank=result.rows, factors=result.exact)
        if result.factored:
            return Outcome(pair, "dropped", *known, why="the budget left it no rank")
        if pair.plan == "ignore":
            return Outcome(pair, "unchanged", *known, pair.why)
        if result.norm2 == 0 and pair.base is not None and spec.shape == self.base.specs[pair.base].shape:
            return Outcome(pair, "unchanged", *known)
        return Outcome(pair, "dropped" if pair.plan == "drop" else "whole", *known, pair.why, result.rows)

    def _difference2(self, result: _Result) -> float:
        """Return what forming ΔW in float32 can cost; BF16 and F16 lose nothing, and F64 has float64."""
        dtypes = {spec.dtype for spec in self._specs(result.pair)}
        exact = "F32" not in dtypes or "F64" in dtypes or not result.base_norm2
        return 0.0 if exact else 2.0**-48 * result.norm2

    def _hashes(self, results: list[_Result], threads: int) -> tuple[BaseIdentity, str]:
        """Return the base's identity and the fine-tune's root, from digests taken while the tensors were read."""
        old = {result.pair.base: result.digests[0] for result in results if result.pair.base}
        new = {result.pair.name: result.digests[1] for result in results}
        stored, numbers = _stored(self.base, old, threads)
        identity = BaseIdentity(
            None, None, self.base.schema(), stored, digest.root(stored), self.base.model_type,
            digest.root(numbers) if encodings(self.base) else None,
            {name: numbers[name] for name in encodings(self.base)},
        )  # fmt: skip
        return identity, digest.root(_stored(self.tuned, new, threads)[0])

    def _specs(self, pair: Pair) -> tuple[TensorSpec, TensorSpec]:
        """Return the fine-tune's tensor and the base's; where it is new, itself."""
        spec = self.tuned.specs[pair.name]
        return spec, self.base.specs[pair.base] if pair.base else spec

    def _shape(self, pair: Pair) -> tuple[int, ...]:
        """Return the shape of the weight as the module defines it."""
        shape = self.tuned.specs[pair.name].shape
        return (*shape[:-2], shape[-1], shape[-2]) if pair.transposed else shape

    def _matrix(self, pair: Pair) -> tuple[int, int]:
        """Return the sides whose sum a rank costs: (out, in), of a stack those of all experts together."""
        shape = self._shape(pair)
        return (shape[0] * shape[1], shape[0] * shape[2]) if pair.kind == "experts" else (shape[0], prod(shape[1:]))


def _stored(model: Checkpoint, known: Mapping[str, str], threads: int) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digests of all tensors as they are stored, and as numbers, from those that are `known` of numbers."""
    # A part of a fused tensor has no digest of its own: the tensor has.
    known = {name: digests for name, digests in known.items() if name not in model.origins}
    rest = {name: spec for name, spec in model.specs.items() if name not in known and name not in model.origins}
    if model.stored is not None:
        rest |= {name: model.stored.specs[name] for name in model.origins.values()}
    numbers = {**known, **hash_tensors(rest, threads=threads)}
    if model.stored is None:
        return numbers, numbers
    codes = {name: spec for name, spec in model.stored.specs.items() if model.specs.get(name) != spec}
    plain = {name: numbers[name] for name in model.stored.specs.keys() - codes.keys()}
    return {**plain, **hash_tensors(codes, threads=threads)}, numbers


# Share of the energy that BF16 may lose in two factors, and more: (2·2^-8)² = 6e-5.
_USUAL_ROUNDING = 1e-4

_NUMBERS = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "U16", "U32", "U64", "BOOL"})


@dataclass(frozen=True, slots=True, eq=False)
class _Result:
    """What one pass over a pair found."""

    pair: Pair
    norm2: float
    base_norm2: float
    digests: tuple[str, str]
    factored: Factored | None = None
    rows: int = 0
    noise2: float = 0.0
    exact: Spooled | None = None


def _refuse(problems: Sequence[str]) -> BadFile:
    return BadFile(f"{counted(len(problems), 'tensor')} cannot be compared", problems)
