"""What was measured while the tensors of a merge were written, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from loratools.decisions import warned
from loratools.engine.plan import MergePlan
from loratools.engine.task import TensorResult, retention
from loratools.errors import IncompatibleAdapter, counted
from loratools.storage import digest
from loratools.storage.files import same_bytes
from loratools.surgery.merge.options import MergeOptions

_ENOUGH = 0.9  # delta retention under which a merge is warned about
_TOO_LITTLE = 0.5  # through a quantization: what is left of the adapter is no longer the adapter
_SHOWN = 20


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """The results of a plan's tensors, one for each that was rewritten."""

    plan: MergePlan
    results: Sequence[TensorResult]

    @classmethod
    def of(cls, plan: MergePlan, results: Sequence[TensorResult]) -> Self:
        """Take what was measured in each file: once of codes whose parts lie in several, which are made for each."""
        return cls(plan, tuple({result.name: result for result in results}.values()))

    @property
    def digests(self) -> dict[str, str]:
        """The digests of the base's tensors that were read and changed, by their names on disk."""
        base = self.plan.base
        read = [result for result in self.results if result.digests and result.name in base.specs]
        hashed = [result for result in read if base.specs[result.name].encoding is None]
        return {base.origin(result.name): result.digests[digest.DEFAULT] for result in hashed}

    @property
    def retention(self) -> float | None:
        """⟨W' − W, ΔW⟩/‖ΔW‖² in total; None where nothing was measured."""
        return retention(self.results)

    @property
    def by_tensor(self) -> dict[str, float]:
        """The same for each changed tensor."""
        each = {result.name: retention([result]) for result in self.results}
        return {name: kept for name, kept in each.items() if kept is not None}

    @property
    def verified(self) -> int:
        """Number of tensors that are those of the recorded base."""
        changes = self.plan.changes
        return sum(bool(changes[r.name].expected or changes[r.name].stored) and not r.warnings for r in self.results)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What differs from the recorded base, where that is no error."""
        return tuple(warning for result in self.results for warning in result.warnings)

    def tell(self, options: MergeOptions, written: Path) -> None:
        """Warn of what the numbers lost; raise `IncompatibleAdapter` where a cast made infinities.

        `written` is the folder with the files of tensors.
        """
        self._check_casts(options)
        self._tell_unchanged(options, written)
        for warning in self.warnings:
            warned("%s", warning)
        codes = self.recoded
        self._tell_recoded(options)
        rounded = retention([result for result in self.results if result.name not in codes])
        if rounded is not None and rounded < _ENOUGH:
            what = "the change of what is no codes" if codes else "the change"
            lost = "only %s of %s survives rounding to the base's dtype; a wider --dtype of `merge` keeps more"
            warned(lost, f"{rounded:.1%}", what)

    def _tell_unchanged(self, options: MergeOptions, written: Path) -> None:
        """Warn of tensors of which no bit changed; only those are compared of which no measured element changed."""
        if options.retention == "off":
            return
        changes, still = self.plan.changes, {result.name for result in self.results if not result.changed}
        unchanged = [
            name
            for file in self.plan.files
            for name, spec in file.specs(written).items()
            if name in still and changes[name].placements and changes[name].source.file != spec.file
            if same_bytes(changes[name].source, spec)
        ]
        if unchanged:
            count = sum(bool(change.placements) for change in changes.values())
            warned(
                "no bit of %d of %s changed that adapters are for, such as %s: the change is zero there, or "
                "too small for the dtype (see alpha and weights)",
                len(unchanged), counted(count, "tensor"), unchanged[0],
            )  # fmt: skip

    @property
    def recoded(self) -> dict[str, float]:
        """⟨W'' − W, ΔW⟩/‖ΔW‖² of each weight that became codes W'' again, all of it measured."""
        changes = self.plan.changes
        return {name: kept for name, kept in self.by_tensor.items() if changes[name].recoded}

    def _tell_recoded(self, options: MergeOptions) -> None:
        """Warn where the quantization erased much of the change; raise `IncompatibleAdapter` where most of it."""
        kept = self.recoded
        total = retention([result for result in self.results if result.name in kept])
        lowest = sorted(kept, key=lambda name: kept[name])
        little = [name for name in lowest if kept[name] < _ENOUGH]
        if total is None or total >= _ENOUGH:
            if little:
                warned(
                    "less than %s of the change survives as codes in %d of %s, least in %s (%s)",
                    f"{_ENOUGH:.0%}", len(little), counted(len(kept), "module"),
                    little[0], f"{kept[little[0]]:.1%}",
                )  # fmt: skip
            return
        why = "a change smaller than a step of the codes is rounded away, one beyond what their scales reach is cut off"
        if total >= _TOO_LITTLE or options.force:
            warned(
                "only %s of the change survives as codes, for %s; least in %s (%s)", f"{total:.1%}", why, lowest[0],
                f"{kept[lowest[0]]:.1%}",
            )  # fmt: skip
            return
        more = [f"and {len(lowest) - _SHOWN} more"] if len(lowest) > _SHOWN else []
        raise IncompatibleAdapter(
            f"only {total:.1%} of the change survives as codes, for {why}",
            [*(f"{name}: {kept[name]:.1%}" for name in lowest[:_SHOWN]), *more],
            hint="--quantized partial or dequantize keeps all of it, --original PATH quantizes the sum anew, "
            "--rounding stochastic keeps it on average; --force writes it all the same.",
        )

    def _check_casts(self, options: MergeOptions) -> None:
        """Refuse infinities that a cast made, with every tensor that has some; warn of numbers that it made zero."""
        if overflowed := [result for result in self.results if result.overflowed]:
            problems = [f"{result.name}: {counted(result.overflowed, 'number')} beyond it" for result in overflowed]
            raise IncompatibleAdapter(
                f"numbers of {counted(len(overflowed), 'tensor')} are "
                "larger than any that their new dtype holds, and would be "
                f"infinite in {options.output_dtype or 'the dtype of the base'}",
                problems,
                hint="Choose a dtype with a wider range: --dtype bf16 or f32.",
            )
        if flushed := sorted((each for each in self.results if each.flushed), key=lambda each: -each.flushed):
            warned(
                "too small for their new dtype, and became zero: %s of %s, most of them in %s (%d)",
                counted(sum(each.flushed for each in flushed), "number"), counted(len(flushed), "tensor"),
                flushed[0].name, flushed[0].flushed,
            )  # fmt: skip
