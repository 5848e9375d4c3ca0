"""Combine adapters into one, in factor space: Σ wᵢ·ΔWᵢ exactly, or by a method of `methods/`, at any rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loratools import dialects
from loratools.adapter.kinds import Update
from loratools.adapter.model import Adapter, BaseIdentity, Step
from loratools.errors import IncompatibleAdapter, LoraToolsError, OutputRefused
from loratools.format.digest import adapter_digest, checked_digest
from loratools.linalg.ranks.allocate import Ranks
from loratools.parallel import Progress
from loratools.storage import atomic
from loratools.surgery.base import agree
from loratools.surgery.combine import methods, truncate
from loratools.surgery.combine import whole as undivided
from loratools.surgery.combine.align import Aligned, align
from loratools.surgery.combine.change import Found, Task, for_each_module
from loratools.surgery.combine.methods._terms import Options
from loratools.surgery.combine.result import joined
from loratools.surgery.combine.weights import Weight
from loratools.surgery.record import TOOL

Source = str | Path | Adapter
_CANCELLED = 1e-5  # of what went in; float32 factors are rounded to 6e-8, bfloat16 to 4e-3


@dataclass(frozen=True, slots=True)
class Combination:
    """What was written, and how near it is to what was asked for.

    `error` is ‖asked − stored‖_F/‖asked‖_F over all modules, `optimum` the least at these ranks; `norm` is ‖asked‖_F.
    `shares` tells what each module keeps, `dropped` names those whose change is zero, `replaced` the tensors that are
    replaced whole; `inputs` are those of the provenance.
    """

    output: str
    digest: str
    method: str
    parameters: int
    norm: float
    error: float
    optimum: float
    shares: tuple[truncate.Share, ...]
    dropped: tuple[str, ...]
    replaced: tuple[str, ...]
    base: BaseIdentity | None
    inputs: tuple[Mapping[str, Any], ...]
    seed: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Inputs:
    """Adapters, opened, with a name for messages, a weight and a digest each."""

    adapters: tuple[Adapter, ...]
    names: tuple[str, ...]
    weights: tuple[Weight, ...]
    digests: tuple[str, ...]


def combine(
    adapters: Sequence[Source],
    output: str | Path,
    *,
    weights: Sequence[float | str | Weight] | None = None,
    method: str = "linear",
    options: Options | None = None,
    ranks: Ranks | None = None,
    initial: Source | None = None,
    check_base: str = "strict",
    dtype: str = "F32",
    threads: int | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
    operation: str = "combine",
) -> Combination:
    """Write one adapter whose change is that of several, combined by `method`.

    `linear` is Σ wᵢ·sᵢ·Bᵢ·Aᵢ for any ranks, targets and scaling rules, exact without `ranks`: its rank is then the true
    one, at most Σrᵢ. With `ranks` it is truncated, and no adapter of these ranks is nearer. Methods whose result is no
    product take rank Σrᵢ (with `like` "peft" the largest rᵢ, as PEFT does) where none is given. Scaling is 1 in the
    result. With `initial`, the one adapter's change is taken against that of `initial`, from which its training started
    (PiSSA, OLoRA, CorDA): BA − B₀A₀, plain LoRA for the unchanged base. `weights` are numbers, texts that
    `Weight.parse` reads, or `Weight`s; `progress` counts bytes of factors; `operation` is what the provenance calls it.

    Raises `UnsupportedAdapter` for kinds and tensors that cannot be combined, `IncompatibleAdapter` for shapes that
    differ, numbers that are not finite and a result that is empty, `WrongBase` where the bases differ, `OutputRefused`,
    and `LoraToolsError` for options that a method does not take, patterns that match nothing and impossible budgets.
    """
    options = options or Options()
    methods.check(method, options)
    atomic.check_output(Path(output), force=force)
    _refuse_inputs(Path(output), [*adapters, *([initial] if initial is not None else [])])
    given = _open(adapters, weights, initial, method)
    agreement = agree(given.names, [adapter.base for adapter in given.adapters], check_base)
    aligned = align(given.names, given.adapters)
    _check_patterns(given, aligned)
    whole = undivided.replacements(given.names, given.adapters, given.weights, aligned, method)
    biases = undivided.biases(aligned.modules, lambda i, module: given.weights[i].of(module), dtype)
    found = Task(aligned, given.digests, given.weights, method, options, ranks).run(threads, progress)
    updates, shares = _updates(aligned, found, biases, ranks, dtype, threads)
    if not updates and not whole:
        raise IncompatibleAdapter(
            "the result is empty: the combined change is zero in every module, so nothing was written",
            [f"{name}: weight {weight.to_json()}" for name, weight in zip(given.names, given.weights, strict=True)],
        )
    norm = math.hypot(*(share.norm for share in shares))
    error, optimum = (math.hypot(*sizes) / norm if norm else 0.0 for sizes in truncate.errors(shares))
    warnings = [*agreement.warnings]
    if norm < _CANCELLED * math.fsum(one.size for one in found.values() if one):
        warnings.append(
            "the adapters take each other away almost completely: what is left may be the rounding of their numbers"
        )
    done = _step(operation, given, method, options, ranks, initial is not None, dtype, error)
    result = joined(given.adapters, aligned, updates, whole, agreement.base, done)
    dialects.save_adapter(result, output, force=force)
    return Combination(
        str(output), adapter_digest(result), method, sum(lazy.parameters for lazy in result.tensors().values()),
        norm, error, optimum, tuple(shares), tuple(sorted(aligned.modules.keys() - updates.keys())),
        tuple(sorted(whole)), result.base, done.inputs, done.seed, tuple(warnings),
    )  # fmt: skip


def _open(
    adapters: Sequence[Source], weights: Sequence[float | str | Weight] | None, initial: Source | None, method: str
) -> _Inputs:
    given = [one if isinstance(one, Weight) else Weight.parse(one) for one in weights or [1.0] * len(adapters)]
    if not adapters or len(given) != len(adapters):
        raise ValueError(f"{len(adapters)} adapter(s) and {len(given)} weight(s); each adapter takes one weight")
    sources = list(adapters)
    if initial is not None:
        if len(adapters) > 1 or method != "linear":
            raise LoraToolsError("an initial adapter is taken away from one adapter, with method linear")
        sources, given = [*sources, initial], [given[0], given[0].negated()]
    opened = [
        one if isinstance(one, Adapter) else dialects.open_adapter(one, initial=initial is not None) for one in sources
    ]
    if initial is not None:
        opened[1] = _starting_point(opened[0], opened[1])
    names = [f"adapter {i + 1}" if isinstance(one, Adapter) else str(one) for i, one in enumerate(sources)]
    digests = [checked_digest(adapter, name) for adapter, name in zip(opened, names, strict=True)]
    return _Inputs(tuple(opened), tuple(names), tuple(given), tuple(digests))


def _starting_point(trained: Adapter, initial: Adapter) -> Adapter:
    """Return the updates of an initial adapter; raise `IncompatibleAdapter` unless it is of the same modules."""
    if trained.updates.keys() != initial.updates.keys():
        other = sorted(trained.updates.keys() ^ initial.updates.keys())
        raise IncompatibleAdapter(
            "the initial adapter is not that of the trained one: they have different modules",
            [f"{module}: only in the {'trained' if module in trained.updates else 'initial'} one" for module in other],
        )
    return Adapter(initial.updates, base=initial.base, dialect=initial.dialect, settings=initial.settings)


def _check_patterns(given: _Inputs, aligned: Aligned) -> None:
    problems = []
    for number, weight in enumerate(given.weights):
        paths = [*aligned.renamed[number].values(), *given.adapters[number].replacements]
        problems += [
            f"{given.names[number]}: {pattern} names none of its modules" for pattern in weight.unmatched(paths)
        ]
    if problems:
        raise LoraToolsError(f"{len(problems)} weight(s) are for nothing", problems)


def _updates(
    aligned: Aligned,
    found: Found,
    biases: Mapping[str, Any],
    ranks: Ranks | None,
    dtype: str,
    threads: int | None,
) -> tuple[dict[str, Update], list[truncate.Share]]:
    """Choose ranks, round, and rebuild updates; a module whose change and bias are zero is left out."""
    there = {module: one for module, one in sorted(found.items()) if one is not None}
    try:
        chosen = truncate.choose(list(there.values()), ranks)
    except ValueError as error:
        raise LoraToolsError(str(error)) from None
    ranked = dict(zip(there, zip(there.values(), chosen, strict=True), strict=True))
    rounded = for_each_module(lambda _, item: truncate.keep(*item, dtype), ranked, threads)
    updates: dict[str, Update] = {}
    shares = []
    for module, (one, rank) in ranked.items():
        members, kept = aligned.modules[module], rounded[module]
        like = members[0].update
        updates[module] = like.with_factors(kept.left, kept.right, biases.get(module))
        shares.append(truncate.share(module, like, sum(member.update.rank for member in members), one, rank, kept))
    for module, bias in biases.items():
        if module not in updates and bool(bias.any()):
            updates[module] = undivided.only_bias(aligned.modules[module][0].update, bias)
    return updates, shares


def _step(
    operation: str, given: _Inputs, method: str, options: Options, ranks: Ranks | None, initial: bool,
    dtype: str, error: float,
) -> Step:  # fmt: skip
    recorded: dict[str, Any] = {"method": method, "dtype": dtype, "error": float(f"{error:.6g}")}
    recorded |= {key: value for key, value in asdict(options).items() if value is not None and key != "seed"}
    if ranks is not None:
        chosen = {"rule": repr(ranks.rule) if ranks.rule else None, "budget": ranks.budget, "uniform": ranks.uniform,
                  "minimum": ranks.minimum, "maximum": ranks.maximum, "multiple_of": ranks.multiple_of}  # fmt: skip
        recorded["ranks"] = {key: value for key, value in chosen.items() if value is not None}
    if initial:
        recorded["initial"] = True
    if not all(weight.plain for weight in given.weights):
        recorded["weights"] = [weight.to_json() for weight in given.weights]
    inputs = tuple(
        {"digest": digest} | ({"weight": weight.default} if weight.plain else {})
        for digest, weight in zip(given.digests, given.weights, strict=True)
    )
    return Step(operation, TOOL, recorded, inputs, methods.seed_of(method, options))


def _refuse_inputs(output: Path, sources: Sequence[Source]) -> None:
    target = output.resolve()
    for one in sources:
        if not isinstance(one, Adapter):
            source = Path(one).resolve()
            if target == source or target in source.parents or source in target.parents:
                raise OutputRefused(f"{output} is, holds or lies in the input {one}", hint="Choose another output.")
