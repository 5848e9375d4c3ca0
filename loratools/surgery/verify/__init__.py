"""Prove a merge after the fact, by another path than the one that made it.

For random probes X the change that is there, X·(W' − W)ᵀ, is compared with the change that should be, w·s·(X·Aᵀ)·Bᵀ, in
float64. With k independent standard normal probes the expectation of ‖X·Eᵀ‖² is k·‖E‖_F², so the residual estimates the
norm of the error E = W' − W − ΔW itself, to about 1/√(k·out). A correctly rounded merge has |E| ≤ 2^-p·|W'| in every
element, p the bits of the dtype's mantissa. As a change may be smaller than that, k unit vectors are probes as well:
they give whole columns of ΔW, so there every element of W' is known, and how much of ΔW must survive the rounding.

Nobody can know the probes beforehand: each run draws a seed of its own, which its account tells. An error that a model
was made to hide from the probes of one seed is an error like any other to those of the next.

    tensors   judge one tensor, changed or not
    probes    the vectors, and what a change is and should be along them
    tiles     read both tensors, tile by tile
    formulas  the arithmetic on a tile of both models, in NumPy, or in C where it serves
    beside    judge everything else in the model's folder
    run       judge by running the models, which shares no reading, naming or orientation with `merge`

The first two read names, orientation and layouts as `merge` reads them; the last is asked for with `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools.adapter.placement.gguf import under_adapters_names
from loratools.adapter.placement.layers import replicated
from loratools.adapter.placement.settle import settle
from loratools.adapter.placement.shared import flag_of
from loratools.decisions import decided, detailed, warned
from loratools.options import Options, Tied
from loratools.parallel import Progress, cores, no_progress, one_blas_thread, workers
from loratools.parallel.shared import agreed, shared
from loratools.storage.atomic.inputs import check_unchanged
from loratools.storage.checkpoint.logical import logical
from loratools.storage.codecs import schemes
from loratools.storage.header import TensorSpec
from loratools.storage.sources import session
from loratools.surgery.inputs import (
    AdapterSource,
    ModelSource,
    Weights,
    as_asked,
    check_weights,
    open_adapters,
    typed_model,
    under_names_of,
)
from loratools.surgery.merge.options import MergeOptions
from loratools.surgery.merge.plan import plan_merge
from loratools.surgery.merge.quantized import as_it_was_written
from loratools.surgery.verify import tensors
from loratools.surgery.verify.beside import Beside, Difference, judge
from loratools.surgery.verify.probes import PROBES
from loratools.surgery.verify.tensors import TensorCheck

if TYPE_CHECKING:
    from loratools.surgery.verify.run import Run

UNCHECKED = (
    "whether loaders give the tensors the meaning that they have here: names, orientation and layouts are read as "
    "`merge` reads them",
)
"""What no judge of a verification looks at."""

__all__ = ["Beside", "Difference", "TensorCheck", "Verification", "verify"]


@dataclass(frozen=True, slots=True)
class Verification:
    """The whole account: `ok` only if every tensor of both models is explained, and nothing beside them is against it.

    `tensors_ok` tells of the tensors alone; `beside` has what differs beside them, and `unchecked` what was not looked
    at. `replaced` are tensors that an adapter trained whole: they must be its own, and are not counted as the base's.
    Of the tensors that no adapter changes `identical` counts those that are the base's byte by byte, and `cast` those
    that are the base's in another float dtype, each number rounded once and none lost to infinity. `seed` drew the
    probes: the same call with it gives the same account. `unseen` says which errors are too small to be seen.
    """

    ok: bool
    checked: tuple[TensorCheck, ...]
    identical: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    error: float
    exact: bool
    seed: int
    cast: int = 0
    unseen: tuple[str, ...] = ()
    tensors_ok: bool = True
    beside: Beside = Beside()  # noqa: RUF009  (frozen)
    run: Run | None = None
    replaced: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = UNCHECKED


@session()
def verify(
    model: ModelSource,
    base: ModelSource,
    adapters: AdapterSource | Sequence[AdapterSource],
    *,
    weights: Weights = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    dialect: str | None = None,
    alpha: float | None = None,
    model_type: str | None = None,
    exact: bool = False,
    seed: int | None = None,
    run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Tell how far a model is from base + adapters: names, untouched bytes, every changed tensor, and what lies beside.

    Args:
        model: The merged model: a path, an `hf://` reference, or an open `Checkpoint`.
        base: The base model, likewise.
        adapters: The adapters of the merge, one or several, in its order.
        weights: The weights of the merge, a number for each adapter; one number for one adapter. Default: 1 for each.
        include: Patterns of the modules that count: a name (`"q_proj"`), a glob (`"layers.*.mlp.*"`), or `"re:…"`.
            Default: all.
        exclude: Patterns of modules that are left out. Default: none.
        dialect: The dialect to read paths as, one of `list_dialects()`. Default: what is found in each file.
        alpha: The alpha that the adapters were trained with, for files that do not record it; it wins over one that
            they record. Default: the file's.
        model_type: What the base is (`"gpt2"`, …), where its config.json does not say it. Default: what that says.
        exact: Whether to recompute each changed tensor in float64 and compare every element with it, rounded once.
            Where a float32 sum may come to the other side of a tie an element may be its neighbour, and F32 may err
            by 8·2^-24 of the largest terms. Default: no, 16 random columns (of small tensors up to 256) are compared
            so, with one unit allowed in each element, as other tools may have rounded twice, and 16 random probes
            estimate the error of the rest.
        seed: A whole number that draws the probes, to repeat a verification. Default: a fresh one, which nobody can
            know beforehand; the account tells it.
        run: Whether to run base and merged model in transformers besides, on a few random tokens, with the adapter
            applied in the running base by PEFT, or by `loratools.live`, and to compare the logits. It loads one model
            after the other into memory. Default: no.
        threads: Threads to work with. Default: one per core, at most 8.
        progress: Called with the bytes read since the last call, from any thread. Default: nobody is told.

    Returns:
        The account: `ok` only if every tensor of both models is explained, and no file beside them makes another model
        of it.

    Raises:
        InvalidOption: A number, or the count of weights, is wrong.
        IncompatibleAdapter, BadFile, UnsupportedAdapter: What planning a merge raises; `run` also for a model that
            transformers has no class for.
        MissingExtra: With `run`, transformers is not installed.

    Example:
        >>> verify("merged", "base", "adapter").ok
        True
    """
    Options().flag("exact", exact).flag("run", run).number("seed", seed, optional=True).threads(threads).done()
    adapters, weights = as_asked(adapters, weights, include, exclude, dialect, alpha, model_type)
    check_weights(adapters, weights)
    progress = progress or no_progress
    if seed is None:
        from secrets import randbits

        seed = agreed(randbits(48))
    model, base = logical(typed_model(model, model_type)), logical(typed_model(base, model_type))
    model.tell_unread()
    base.tell_unread()
    inputs = raw = open_adapters(adapters, base, weights)
    base = replicated(base, [each.adapter for each in inputs])
    base, model = (under_adapters_names(side, [each.adapter for each in inputs]) for side in (base, model))
    apart = flag_of(model.config) is False and flag_of(base.config) is not False
    tied: Tied = "untie" if apart or model.specs.keys() - base.specs.keys() else "both"
    inputs, notes = settle(base, under_names_of(base, inputs), strict=False)
    for note in notes:
        warned("%s", note)
    plan = plan_merge(base, inputs, MergeOptions(tied=tied, check_base="off"))
    plan = as_it_was_written(plan, model)
    found = {name: change for name, change in plan.changes.items() if name in model.specs}
    untouched = [name for name, change in found.items() if not change.placements]
    touched = sorted(found.keys() - untouched)
    how = "every element" if exact else f"{PROBES} columns and {PROBES} random probes of seed {seed}"
    decided("%d tensors change: %s of each are compared; %d are byte for byte", len(touched), how, len(untouched))
    codes = schemes.find(base.specs, base.config).tensors

    def judged(some: Mapping[str, TensorSpec]) -> dict[str, bool | TensorCheck]:
        with one_blas_thread(), workers(threads or min(8, cores())) as pool:
            futures = {
                name: pool.submit(tensors.same, found[name].source, spec, name in codes, progress)
                if not found[name].placements
                else pool.submit(tensors.check, plan, name, spec, exact, seed, progress)
                for name, spec in some.items()
            }
            return {name: future.result() for name, future in futures.items()}

    every = {name: model.specs[name] for name in (*untouched, *touched)}
    outcome = shared(judged, every, lambda spec: spec.nbytes)
    differing = tuple(sorted(name for name in untouched if not outcome[name]))
    checked = tensors.with_change(check for check in map(outcome.get, touched) if isinstance(check, TensorCheck))
    for check in checked:
        detailed("%s: error %.2e of the weight, bound %.2e", check.name, check.error_of_weight, check.bound)
    missing = tuple(sorted(plan.changes.keys() - model.specs.keys()))
    extra = tuple(sorted(model.specs.keys() - plan.changes.keys()))
    beside = judge(model, plan, [each.path for each in inputs])
    tensors_ok = not (differing or missing or extra) and all(check.within for check in checked)
    worst = max((check.error_of_weight for check in checked), default=0.0)
    replaced = tuple(sorted(name for name in untouched if found[name].replaced))
    equal = set(untouched).difference(differing, replaced)
    cast = sum(found[name].source.dtype != model.specs[name].dtype for name in equal)
    identical = len(equal) - cast
    unseen = tensors.unseen((model.specs[name] for name in touched), exact)
    ok = tensors_ok and not any(difference.decides for difference in beside.differences)
    second = None
    if run:
        from loratools.surgery.verify.run import run as run_models  # imports torch, and transformers by it

        second = run_models(model, plan.base, raw, touched, seed)
    check_unchanged()
    return Verification(
        ok and (second is None or second.ok), checked, identical, differing, missing, extra, worst, exact, seed, cast,
        unseen, tensors_ok, beside, second, replaced,
        (*beside.unchecked, *(() if second and second.tells else UNCHECKED)),
    )  # fmt: skip
