"""loratools verify"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from loratools.cli import _options as options
from loratools.cli import _show as show
from loratools.cli._group import command as make
from loratools.cli._shares import crew
from loratools.cli._talk import Talk, pass_talk

if TYPE_CHECKING:
    from loratools.surgery.verify import Verification

_MOST = 10  # lines of one kind, where not all are asked for


@make(section="Check", each="model")
@click.argument("model", type=options.INPUT)
@options.option("--base", type=options.INPUT, required=True)
@options.option("--adapter", "adapters", type=options.INPUT, required=True, multiple=True)
@options.weight_option
@options.module_options
@options.adapter_options
@options.model_type_option
@options.option("--exact", is_flag=True)
@options.option("--modules", is_flag=True, more="Here: for every changed tensor, not only for those that fail.")
@options.option("--certificate", is_flag=True)
@options.option("--seed", type=int, more="Of the probes.  [default: a fresh one, which is printed]")
@options.option("--run", is_flag=True)
@options.threads_option
@options.workers_option
@pass_talk
def command(
    talk: Talk, model: str, base: str, adapters: tuple[str, ...], weights: tuple[float | str, ...], exact: bool,
    modules: bool, include: tuple[str, ...], exclude: tuple[str, ...], dialect: str | None, alpha: float | None,
    model_type: str | None, certificate: bool, seed: int | None, run: bool, threads: int | None,
    workers: str | None,
) -> show.Report:  # fmt: skip
    """Tell how far a model is from base + adapter.

    A proof that shares no arithmetic with `merge`: tensors that no adapter touches must be equal byte by byte, names
    must be accounted for on both sides, and the change of every other tensor is held against the adapter's, on random
    probes in float64, which each run draws afresh. config.json, tokenizer, chat template and code are compared too.
    Exit code 0 within the rounding of the dtype, 1 beyond it or where a file makes another model of it; errors too
    small to be seen, and what was not checked, are named. For an adapter that was extracted from a fine-tune, the error
    is what the low rank lost; --certificate then gives the table of `loratools extract-svd`, for an adapter of any
    origin, and fails nothing.

    \b
    Examples:
      loratools verify merged --base base --adapter adapter
      loratools verify merged --base base --adapter adapter --exact --modules
      loratools verify merged --base base --adapter adapter --run
      loratools verify tuned --base base --adapter adapter --certificate
    """
    from loratools.storage.checkpoint import Checkpoint
    from loratools.surgery.verify import verify

    options.require_one_each(weights, adapters)
    merged = Checkpoint.open(model)
    if certificate:
        from loratools.cli._certificate import report

        if len(adapters) > 1 or weights or workers:
            raise click.UsageError("--certificate measures one adapter, at full strength, in one process")
        return report(
            talk, merged, base, adapters[0], seed=seed or 0, threads=threads, include=include or None,
            exclude=exclude or None, dialect=dialect, alpha=alpha, model_type=model_type,
        )  # fmt: skip
    given: dict[str, Any] = {
        "base": base, "adapters": list(adapters), "weights": list(weights) or None, "include": include or None,
        "exclude": exclude or None, "dialect": dialect, "alpha": alpha, "model_type": model_type, "exact": exact,
        "seed": seed, "run": run, "threads": threads,
    }  # fmt: skip
    with (
        talk.progress("verifying", merged.nbytes) as advance,
        crew("verify", {"model": model, **given}, workers, advance),
    ):
        verification = verify(merged, **given, progress=advance)
    line = None if modules else _in_a_line(verification)
    return show.Report(show.plain(verification), lines(verification, every=modules), verification.ok, line)


def _in_a_line(verification: Verification) -> str:
    good = sum(check.within for check in verification.checked)
    reason = _reason(verification)
    return (
        f"{'verified' if verification.ok else 'NOT verified'}: {reason and f'{reason}; '}"
        f"{good} of {len(verification.checked)} changed tensors are base + adapter within rounding, "
        f"largest error {verification.error:.2e}, seed {verification.seed}"
    )


def _reason(verification: Verification) -> str:
    """Return the first thing beside the changed tensors for which a model is not verified; "" where there is none."""
    untouched, whole = (_of(verification, replaced=replaced) for replaced in (False, True))
    for names, what in (
        (untouched, "that no adapter changes differ from the base"),
        (whole, "are not those that an adapter trained whole"),
        (verification.missing, "are missing"),
        (verification.extra, "are neither in the base nor in an adapter"),
    ):
        if names:
            return f"tensors {what} ({show.exact(len(names))}, first {names[0]})"
    decides = next((each for each in verification.beside.differences if each.decides), None)
    disagrees = verification.run is not None and not verification.run.ok
    return str(decides) if decides else "the models that --run runs disagree" if disagrees else ""


def lines(verification: Verification, *, every: bool) -> Iterator[str]:
    """Yield a verification for people: the tensors that fail (or every one), then the sums."""
    shown = [check for check in verification.checked if every or not check.within]
    if shown:
        yield from show.table(
            ("tensor", "error of change", "error of weight", "bound", "applied", ""),
            [
                (
                    check.name, f"{check.error:.2e}", f"{check.error_of_weight:.2e}", f"{check.bound:.2e}",
                    f"{check.applied:.4f}", "ok" if check.within else "BEYOND",
                )
                for check in (shown if every else shown[:_MOST])
            ],
            right=(1, 2, 3, 4),
        )  # fmt: skip
        if not every and len(shown) > _MOST:
            yield f"… and {len(shown) - _MOST} more; --modules shows all"
        yield ""
    for kind, names in (
        ("differs from the base, and no adapter changes it", _of(verification, replaced=False)),
        ("is not the tensor that an adapter trained whole", _of(verification, replaced=True)),
        ("missing in the model", verification.missing),
        ("in the model, but neither in the base nor in an adapter", verification.extra),
    ):
        yield from (f"{name}: {kind}" for name in names[:_MOST])
        if len(names) > _MOST:
            yield f"… and {len(names) - _MOST} more"
    yield from _beside(verification)
    good = sum(check.within for check in verification.checked)
    untouched = verification.identical + verification.cast + len(_of(verification, replaced=False))
    own = len(verification.replaced) - len(_of(verification, replaced=True))
    cast = f", {verification.cast} are the base's, rounded to another dtype" if verification.cast else ""
    applied = [check.applied for check in verification.checked]
    yield from show.fields(
        ("verified", "yes" if verification.ok else "NO"),
        ("changed", f"{good} of {len(verification.checked)} tensors are base + adapter within rounding"),
        ("untouched", f"{verification.identical} of {untouched} are equal byte by byte{cast}"),
        ("whole", f"{own} of {len(verification.replaced)} are the adapter's own" if verification.replaced else None),
        ("largest error", f"{verification.error:.2e} of the weight"),
        ("applied", f"{min(applied):.4f} to {max(applied):.4f} of the adapter's change" if applied else "nothing"),
        ("beside", _agreeing(verification)),
        ("not seen", verification.unseen or None),
        ("not checked", verification.unchecked),
        ("run", _ran(verification)),
        ("seed", None if verification.exact else f"{verification.seed}, which --seed repeats"),
    )


def _beside(verification: Verification) -> Iterator[str]:
    """Yield what differs beside the tensors: first what decides."""
    differences = sorted(verification.beside.differences, key=lambda difference: not difference.decides)
    for difference in differences[: 2 * _MOST]:
        yield f"{difference}" if difference.decides else f"{difference} (decides nothing)"
    if len(differences) > 2 * _MOST:
        yield f"… and {len(differences) - 2 * _MOST} more"


def _agreeing(verification: Verification) -> str | None:
    """Return how many files are as they should be; None where there is nothing beside the tensors."""
    beside = verification.beside
    files = {difference.file for difference in beside.differences} | set(beside.agreeing)
    return f"{len(beside.agreeing)} of {len(files)} files are as base and adapter have them" if files else None


def _ran(verification: Verification) -> str | None:
    ran = verification.run
    if ran is None:
        return None
    numbers = (
        f"the logits differ from those of the base with the adapter live ({ran.applied_by}) by {ran.distance:.2e}, the "
        "norm of the difference"
    )
    explained = f"rounding makes {ran.noise:.2e}, the adapter {ran.effect:.2e}"
    if ran.ok and not ran.tells:
        return f"tells nothing: {numbers}; {explained}, which is not more than rounding"
    return f"{'agrees' if ran.ok else 'DISAGREES'}: {numbers}; {explained}"


def _of(verification: Verification, *, replaced: bool) -> list[str]:
    """Return the tensors that differ among those that an adapter trained whole, or among the others."""
    return [name for name in verification.differing if (name in verification.replaced) is replaced]
