"""Combine adapters into one, in factor space: Σ wᵢ·ΔWᵢ exactly, or by a method of `methods/`, at any rank.

inputs     the adapters, open, with a weight each, and side by side: which of their modules are one module
options    the options, one value that is checked when it is built
entries    what the headers of several files say, in one
methods    the ways to combine, one file each
change     the combined change of a module, in numbers, and the rank that is chosen for it
products   sums of products, many modules at once
travel     what is found of changes, where others share the work
elementwise  what the other methods make, one module after the other
whole      tensors trained whole, and biases, combined
result     the adapter that several become: its settings and provenance
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools import dialects
from loratools.adapter.kinds import Update
from loratools.adapter.model import BaseIdentity
from loratools.adapter.weights import Weight
from loratools.decisions import decided, detailed, warned
from loratools.engine.device import check as check_device
from loratools.errors import IncompatibleAdapter, LoraToolsError, counted
from loratools.format.digest import adapter_digest
from loratools.linalg.ranks.allocate import Ranks
from loratools.options import CheckBase
from loratools.parallel import Progress, no_progress
from loratools.storage import atomic
from loratools.storage.dtypes import FloatName
from loratools.storage.lazy import LazyTensor
from loratools.storage.sources import Location, session
from loratools.surgery.base import agree
from loratools.surgery.combine import methods, whole
from loratools.surgery.combine.change import Settled, Share
from loratools.surgery.combine.inputs import Aligned, Input, align, open_inputs
from loratools.surgery.combine.methods._terms import Library
from loratools.surgery.combine.options import CombineOptions
from loratools.surgery.combine.result import assemble, dialect_of, dtype_of, plain, step_of
from loratools.surgery.inputs import AdapterSource, chosen_weights, names_of, planned, read_as, tell_twice

if TYPE_CHECKING:
    import torch

_SEAL = "`convert --base` seals it"
_MUCH = 0.1  # of the change, lost by rounding; what rounding to bfloat16 takes is a hundredth of it
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
    shares: tuple[Share, ...]
    dropped: tuple[str, ...]
    replaced: tuple[str, ...]
    base: BaseIdentity | None
    inputs: tuple[Mapping[str, Any], ...]
    seed: int | None = None
    warnings: tuple[str, ...] = ()


@session()
def combine(
    adapters: AdapterSource | Sequence[AdapterSource],
    output: Location,
    *,
    weights: float | str | Weight | Sequence[float | str | Weight] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    method: str = "linear",
    density: float | None = None,
    gamma: float | None = None,
    epsilon: float | None = None,
    seed: int | None = None,
    like: Library | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    ranks: Ranks | int | None = None,
    initial: AdapterSource | None = None,
    check_base: CheckBase = "strict",
    to: str | None = None,
    dtype: FloatName | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Combination:
    """Write one adapter whose change is that of several, combined in factor space, without the base model.

    `linear` is Σ wᵢ·sᵢ·Bᵢ·Aᵢ for any ranks, targets and scaling rules, exact without `ranks`: its rank is then the true
    one, at most Σrᵢ. With `ranks` it is truncated, and no adapter of these ranks is nearer. Methods whose result is no
    product take rank Σrᵢ (with `like` "peft" the largest rᵢ, as PEFT does) where none is given. The scaling is 1 in the
    result. The same inputs give the same bytes.

    Args:
        adapters: One adapter or several, each a path, an `hf://` reference, an `Adapter`, or one held in memory.
            Modules are one where their names are, past wrappers such as `base_model.model.`.
        output: The folder or file to write; it must not exist, unless `force`.
        weights: wᵢ, one for each adapter: a number, which may be negative; a text with a number for modules that
            patterns name (`"q_proj=0.5,v_proj=-1"`, `"0.7,*.mlp.*=0"`) or for each block of an image model
            (`"lbw:1,0,0,…"`: what is in no block, then each block of the family's lists in order; 12, 17, 20 or 26 for
            Stable Diffusion and 61 for Flux.1 as image people write them); or a `Weight`. Default: 1 for each.
        include: Patterns of the modules that count, as for `merge`. Default: all.
        exclude: Patterns of modules that are left out. Default: none.
        dialect: The dialect to read paths as, one of `list_dialects()`. Default: what is found in each file.
        alpha: The alpha of training, which wins over what files record. Default: the file's.
        method: How changes are combined: `"linear"`, or one that looks at single elements (`"ties"`, `"dare"`,
            `"dare_ties"`, `"della"`, `"della_linear"`, `"breadcrumbs"`, `"magnitude_prune"`, `"sce"`) or works in a
            space that the adapters share (`"knots"`, `"core_space"`). Default: `"linear"`.
        density: Share of elements that a method keeps, above 0 and at most 1; all methods but `linear` need it.
        gamma: Share of the largest elements that `breadcrumbs` drops, from 0 to below 1. Default: 0.01.
        epsilon: How far `della` lets the chance of keeping an element lie from the density. Default: 0.15 or less.
        seed: A whole number that chooses what `dare`, `dare_ties` and `della` keep. Default: 0.
        like: `"peft"` or `"mergekit"` takes that library's definition of a method where it differs from the paper's.
            Default: the paper's.
        normalize: With `like="mergekit"`: whether what is elected is divided by the sum of its weights. Default: as
            mergekit, yes but for `dare_ties`.
        rescale: With `like="mergekit"`: whether what is kept of each change is rescaled to the change's L1 norm.
            Default: as mergekit, yes but for `ties`.
        ranks: How ranks are chosen: a number for every module, or `Ranks`. Default: all there is.
        initial: The adapter from which the training of the one adapter started (PiSSA, OLoRA, CorDA), which is taken
            away: BA − B₀A₀ is plain LoRA for the unchanged base. Default: none.
        check_base: What happens where the adapters belong to different base models: `"strict"` raises, `"warn"`
            reports, `"off"` compares nothing. Default: `"strict"`.
        to: The dialect (`loratools.list_dialects()`). Default: that of the first adapter, and `"loratools"` for PEFT's,
            which reads it, for one that is only read, and for one that cannot say the result.
        dtype: The float dtype of the factors: `"f32"`, `"bf16"`, `"f16"`, `"f64"`, or torch's. Default: that of the
            adapters' factors, and `"F32"` where they have several, or a shorter one.
        device: Where changes are multiplied out and decomposed: `"cpu"`, `"cuda"`, `"cuda:1"`, or a device of torch; on
            a GPU the last digits of factors may differ, and their signs. Default: `"cpu"`.
        threads: Threads to work with; no byte depends on it. Default: one per core, at most 8.
        force: Whether to replace an output that exists. Default: no.
        progress: Called with the bytes of factors that were worked on since the last call. Default: nobody is told.

    Returns:
        What was written, its error ‖asked − stored‖/‖asked‖ beside the least at these ranks, and each module's share.

    Raises:
        InvalidOption: A word, a number or the count of weights is wrong, or a method takes no such option; all of them.
        UnsupportedAdapter: A change is no product, or a tensor trained whole cannot be combined without its base.
        IncompatibleAdapter: Shapes differ, numbers are not finite, or the result is empty.
        WrongBase: The adapters belong to different bases, and `check_base` is `"strict"`.
        LoraToolsError: A pattern names no module, or a budget is too small.
        OutputRefused, NoDevice: The output exists, or is an input; there is no such device, or its memory is full.

    Example:
        >>> report = combine(["adapter", "other"], "sum", weights=[0.7, -0.3], ranks=4)
        >>> report.method, max(share.rank for share in report.shares)
        ('linear', 4)
    """
    atomic.sweep(output)
    options = CombineOptions(
        density=density, gamma=gamma, epsilon=epsilon, seed=seed, like=like, normalize=normalize, rescale=rescale,
        method=method, ranks=ranks, check_base=check_base, dtype=dtype, device=device, threads=threads, force=force,
    )  # fmt: skip
    if to is not None:
        dialects.get(to)
    sources = read_as(adapters, dialect, alpha)
    initial = None if initial is None else read_as(initial, dialect, alpha)[0]
    numbers = [weights] if isinstance(weights, int | float | str | Weight) else weights
    numbers = chosen_weights(len(sources), numbers, include, exclude)
    return run(sources, output, options, numbers, initial, to=to, progress=progress)


def run(
    adapters: Sequence[AdapterSource], output: Location, options: CombineOptions,
    weights: Sequence[float | str | Weight] | None = None, initial: AdapterSource | None = None, *,
    operation: str = "combine", to: str | None = None, progress: Progress | None = None,
) -> Combination:  # fmt: skip
    """Do what `combine` says; `operation` is what the provenance calls it, `to` the dialect, None: theirs."""
    check_device(options.computes_on, wide=True)
    atomic.check_output(Path(output), force=options.force)
    atomic.refuse_inputs(Path(output), [Path(x) for x in (*adapters, initial) if isinstance(x, str | os.PathLike)])
    inputs = open_inputs(adapters, weights, initial, options.method)
    tell_twice([each.digest for each in inputs])
    opened = [each.adapter for each in inputs]
    options = replace(options, dtype=dtype_of(opened)) if options.dtype is None else options
    base, warnings = agree([each.name for each in inputs], [adapter.base for adapter in opened], options.check_base)
    aligned = align(inputs)
    planned(operation, output, names_of(adapters), method=options.method, modules=len(aligned.modules),
            dtype=options.stored, dialect=to or "as the first adapter has it, ours for PEFT's",
            ranks=None if options.rule is None else str(options.rule))  # fmt: skip
    replaced = whole.replacements(inputs, aligned, options.method)
    biases = whole.biases(inputs, aligned, options.stored)
    try:
        changes = _settled(inputs, aligned, options, progress or no_progress)
    except LoraToolsError:
        raise
    except ValueError as too_small:
        raise LoraToolsError(str(too_small)) from None
    updates, shares = _updates(aligned, changes, biases)
    if not updates and not replaced:
        raise IncompatibleAdapter(
            "the result is empty: the combined change is zero in every module, so nothing was written",
            [f"{each.name}: weight {each.weight.to_json()}" for each in inputs],
        )
    rule, cut = options.rule, sum(share.rank < share.true_rank for share in shares)
    decided("%s of %s: %d modules, %d of them at a lower rank than their own; ranks by %s; stored as %s",
            options.method, counted(len(inputs), "adapter"), len(shares), cut,
            rule or "what there is", options.stored)  # fmt: skip
    for share in shares:
        detailed("%s: rank %d of %d, error %.2e of its change", share.module, share.rank, share.true_rank,
                 share.error / share.norm if share.norm else 0.0)  # fmt: skip
    norm = math.hypot(*(share.norm for share in shares))
    error, optimum = math.hypot(*(share.error for share in shares)), math.hypot(*(share.optimum for share in shares))
    error, optimum = (error / norm, optimum / norm) if norm else (0.0, 0.0)
    if norm < _CANCELLED * math.fsum(settled.change.size for settled in changes.values() if settled):
        warnings.append(
            "the adapters take each other away almost completely: what is left may be the rounding of their numbers"
        )
    if error > max(_MUCH, 2 * optimum):
        lost = f"loses {error:.0%} of the change: too small or too large for it"
        warnings.append(f"rounding the factors to {options.stored} {lost}")
        warned("%s", warnings[-1])
    done = step_of(operation, inputs, options, initial is not None, error)
    final = aligned.for_peft(updates)
    own_name = dict(zip(aligned.modules, final.modules, strict=True))
    named = {own_name[path]: update for path, update in updates.items()}
    result = assemble(opened, final, named, replaced, base, done, [each.weight.to_json() for each in inputs])
    if unsettled := sorted({update.unsettled for update in updates.values() if update.unsettled}):
        # The format says of every stack how it lies; PEFT says it with its version, as the input did.
        warnings.append(
            f"written as PEFT does, without provenance: only the base tells {'; '.join(unsettled)} ({_SEAL})"
        )
        warned("%s", warnings[-1])
        to = "peft"
    if to is None:
        to, result = dialect_of(opened, result)
    elif to != "loratools":
        result = plain(result, opened[0].settings)
    dialects.save_adapter(result, output, dialect=to, force=options.force)
    return Combination(
        atomic.spelled(output), adapter_digest(result), options.method,
        sum(lazy.parameters for lazy in result.tensors().values()),
        norm, error, optimum, tuple(shares), tuple(sorted(aligned.modules.keys() - updates.keys())),
        tuple(sorted(replaced)), result.base, done.inputs, done.seed, tuple(warnings),
    )  # fmt: skip


def _settled(
    inputs: Sequence[Input], aligned: Aligned, options: CombineOptions, progress: Progress
) -> dict[str, Settled | None]:
    """Return module -> its change and what is stored of it; a sum of products takes no torch."""
    merge = methods.get(options.method).merge
    if merge is None and options.computes_on == "cpu":
        from loratools.surgery.combine import products

        return products.settle(inputs, aligned, options, progress)
    from loratools.surgery.combine import elementwise

    return elementwise.settle(inputs, aligned, options, progress, merge or elementwise.side_by_side)


def _updates(
    aligned: Aligned, changes: Mapping[str, Settled | None], biases: Mapping[str, Any]
) -> tuple[dict[str, Update], list[Share]]:
    """Rebuild updates of what is stored; a module whose change and bias are zero is left out."""
    updates: dict[str, Update] = {}
    shares = []
    for module, settled in sorted(changes.items()):
        if settled is None:
            continue
        members, (change, rank, kept) = aligned.modules[module], settled
        like, given = members[0].update, sum(member.update.rank for member in members)
        bias = biases.get(module)
        try:
            updates[module] = like.with_factors(kept.left, kept.right, None if bias is None else LazyTensor.of(bias))
        except ValueError as error:
            raise IncompatibleAdapter(f"{module}: {error}") from None
        optimum2 = change.optimum2(rank)
        shares.append(Share(
            module, like.kind, like.shape, given, len(change.sigma), rank, math.sqrt(change.norm2),
            math.sqrt(optimum2 + kept.rounding2), math.sqrt(optimum2), change.sigma[0], change.sigma[rank - 1],
        ))  # fmt: skip
    for module, bias in biases.items():
        if module not in updates and bool(bias.any()):
            updates[module] = whole.only_bias(aligned.modules[module][0].update, bias)
    return updates, shares
